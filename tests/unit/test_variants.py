"""The list of test cases that can be left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
VARIANTS = (TESTS / "variants.txt").read_text(encoding="utf-8").splitlines()


def test_every_variant_is_a_test() -> None:
    folders = [str(TESTS / name) for name in ("faults", "testbed", "horovod_jobs")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *folders]
    found = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=100, check=False)
    names = {line.rpartition("/")[2] for line in found.stdout.splitlines()}
    assert not set(VARIANTS) - names
    assert len(set(VARIANTS)) == len(VARIANTS)


@pytest.mark.parametrize("option", [[], ["--without-variants"]])
def test_variants_are_left_out_on_request(option: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *option]
    command.append(str(TESTS / "faults" / "test_kills.py"))
    found = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=100, check=False)
    assert ("survives_a_kill[two-at-once]" in found.stdout) is (not option)
    assert "survives_a_kill[in-forward]" in found.stdout
