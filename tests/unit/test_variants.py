"""The list of test cases that can be left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
LINES = (TESTS / "variants.txt").read_text(encoding="utf-8").splitlines()
VARIANTS = [line for line in LINES if not line.startswith("#")]


def collected(*options: str) -> set[str]:
    """Node ids of the tests that start real jobs, when pytest is called with these options."""
    folders = [str(TESTS / name) for name in ("faults", "testbed", "horovod_jobs")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options, *folders]
    found = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=100, check=True)
    return {line for line in found.stdout.splitlines() if "::" in line}


def test_variants_are_tests_and_are_left_out_on_request() -> None:
    assert len(set(VARIANTS)) == len(VARIANTS)
    everything = collected()
    assert everything.issuperset(VARIANTS)
    assert collected("--without-variants") == everything.difference(VARIANTS)
