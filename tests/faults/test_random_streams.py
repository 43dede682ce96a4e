"""Random number generators that are kept with the training state, on real jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import start

from chaos_mpi.elastic.checkpoint import list_checkpoints, step_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]

Draws = dict[int, list[float]]


def run(folder: Path, ranks: int, wanted: int, seeds: str, *options: str) -> dict[int, Draws]:
    """What each rank drew in each step, in a job that starts with ``ranks`` and ends with ``wanted`` ranks."""
    folder.mkdir(exist_ok=True)
    with start("random_stream.py", folder, str(folder), str(wanted), seeds, ranks=ranks, options=options) as job:
        finished = job.finish()
    assert finished.status == 0
    assert [result["identical"] for result in finished.results().values()] == [True] * wanted
    drawn = {}
    for path in folder.glob("draws-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        drawn[int(path.stem.partition("-")[2])] = {line["step"]: line["drawn"] for line in lines}
    return drawn


@pytest.mark.parametrize("policy", ["blocking", "overlap"])
def test_a_newcomer_draws_what_the_others_draw(policy: str, tmp_path: Path) -> None:
    drawn = run(tmp_path, 2, 3, "alike", "--join-policy", policy)
    assert set(drawn) == {0, 1, 100}
    assert drawn[0] == drawn[1]
    assert len(drawn[100]) == 10
    assert {step: drawn[0][step] for step in drawn[100]} == drawn[100]


@pytest.mark.parametrize("seeds", ["alike", "own"])
def test_a_resumed_job_draws_as_if_it_had_not_stopped(seeds: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 2, 2, seeds)
    checkpoints = tmp_path / "checkpoints"
    options = ["--checkpoint-dir", str(checkpoints), "--checkpoint-every", "4"]
    run(tmp_path / "first", 2, 2, seeds, *options)
    *_, before, last = list_checkpoints(checkpoints)
    last.unlink()
    again = run(tmp_path / "again", 2, 2, seeds, *options, "--resume")
    assert (whole[0] == whole[1]) == (seeds == "alike")
    for rank in (0, 1):
        assert list(again[rank]) == list(range(step_of(before) + 1, 11))
        assert again[rank] == {step: whole[rank][step] for step in again[rank]}
