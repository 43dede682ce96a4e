"""Random number generators that are kept with the training state, on real jobs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
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
    return drawn_in(folder)


def drawn_in(folder: Path) -> dict[int, Draws]:
    """What each rank of a job drew in each step."""
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


def test_a_job_that_was_told_to_end_draws_on_when_it_is_resumed(tmp_path: Path) -> None:
    options = ["--checkpoint-dir", str(tmp_path / "checkpoints")]
    folder = tmp_path / "first"
    folder.mkdir()
    forever = 0  # ranks that it would end with
    with start("random_stream.py", folder, str(folder), str(forever), "own", ranks=2, options=options) as job:
        job.wait_until(lambda: min(map(len, drawn_in(folder).values()), default=0) > 3, "the first steps")
        job.signal(signal.SIGTERM)
        assert job.finish().status == 128 + signal.SIGTERM
    first = drawn_in(folder)
    again = run(tmp_path / "again", 2, 2, "own", *options, "--resume")
    for rank in (0, 1):
        stream = torch.Generator().manual_seed(7 + rank)
        torch.rand(3, generator=stream)
        drawn = {step: numbers[0] for step, numbers in {**first[rank], **again[rank]}.items()}
        assert list(drawn) == list(range(1, len(first[rank]) + 11))
        assert list(drawn.values()) == [torch.rand(1, generator=stream).item() for _ in drawn]
