"""Options of the test suite."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

# How long one example takes says more of what else the machine does than of the code.
hypothesis.settings.register_profile("chaos_mpi", deadline=None)
hypothesis.settings.load_profile("chaos_mpi")

#: Tests that start real jobs, and of which others are nearly the same: their node ids.
VARIANTS = frozenset(
    line
    for line in Path(__file__).with_name("variants.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the churn test is, what it draws, and whether variants are run."""
    group = parser.getgroup("churn")
    group.addoption("--churn-events", type=int, default=20, help="joins, leaves and deaths in each run (default: 20)")
    group.addoption("--churn-seed", type=int, default=None, help="what they are drawn from (default: a fixed one)")
    parser.addoption("--without-variants", action="store_true", help="leave the cases in tests/variants.txt out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave variants out where they are not wanted."""
    if config.getoption("--without-variants"):
        left_out = [item for item in items if item.nodeid in VARIANTS]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
