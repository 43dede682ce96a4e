"""Tests with real Horovod; left out where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "faults"))  # jobs, problem, checks, fault_points


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs Horovod."""
    if importlib.util.find_spec("horovod") is not None:
        return
    here = Path(__file__).resolve().parent
    skip = pytest.mark.skip(reason="Horovod is not installed: bash launch/install_horovod.sh")
    for item in items:
        if here in item.path.parents and item.get_closest_marker("without_horovod") is None:
            item.add_marker(skip)
