"""Collective calls of all kinds in which ranks die."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import start

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]

CALLS = 300


@pytest.mark.parametrize("seed", range(4))
def test_survivors_see_the_same_in_every_call(seed: int, tmp_path: Path) -> None:
    deaths = 1 + seed % 2
    with start("calls.py", tmp_path, str(tmp_path), str(seed), str(CALLS), str(deaths), ranks=4) as job:
        finished = job.finish()
    results = finished.results()
    assert finished.status == 0, finished.output
    assert set(results) == {"0", *map(str, range(1 + deaths, 4))}
    first = results["0"]["seen"]
    assert len(first) == CALLS
    assert all(result["seen"] == first for result in results.values())
    assert {result["size"] for result in results.values()} == {4 - deaths}
    assert results["0"]["lost_pair"] is True  # rank 1 was in it
