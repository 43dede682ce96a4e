"""Scripts written for Horovod, on ``chaos_mpi.horovod.torch``: ranks are killed, join and leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_points import Rule
from horovod_problem import SAMPLES, history, replay, times_trained
from jobs import Finished, start
from problem import largest_difference

pytestmark = pytest.mark.timeout(120)
TOLERANCE = 1e-10
STEPS = 12


#: However long a newcomer takes to start: the others are not through before it is about to enter the training function.
NOT_BEFORE_IT_ENTERS: list[Rule] = [
    {"rank": 100, "at": "entry"},
    {"rank": 0, "at": "boundary", "step": 60, "wait": ["entry.100"], "limit_s": 80},
]


def run(folder: Path, script: str, faults: list[Rule], *, plain_mpirun: bool = False, **job: Any) -> Finished:
    """Run a script with faults to its end."""
    ranks, options = job.pop("ranks", 3), job.pop("options", ())
    (folder / "job.json").write_text(json.dumps({"folder": str(folder), "faults": faults, **job}))
    told = str(folder / "job.json")
    how: dict[str, Any] = {"ranks": ranks, "plain_mpirun": plain_mpirun, "options": options, "limit_s": 150}
    with start(script, folder, told, **how) as under_way:
        return under_way.finish()


def check(job: Finished, finals: set[str]) -> dict[int, list[str]]:
    """Assert that these members came to the end, equal to each other and to one process with the same history."""
    assert job.status == 0, f"the launcher returned {job.status}"
    assert "without chaos_mpi.finalize" not in job.output
    steps, traces = history(job.folder)
    results = job.results()
    assert set(results) == finals
    assert {result["steps"] for result in results.values()} == {len(steps)}
    states = [torch.load(job.folder / f"final-{member}.pt", weights_only=True) for member in sorted(finals)]
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, other[name]) for other in states), f"{name} differs between ranks"
    assert largest_difference(replay(steps, traces), states[0]) < TOLERANCE
    return steps


@pytest.mark.parametrize(
    ("victim", "point"),
    [(0, "between buckets"), (1, "before optimizer"), (2, "settle"), (0, "boundary"), (1, "forward")],
)
def test_kill(tmp_path: Path, victim: int, point: str) -> None:
    job = run(tmp_path, "horovod_train.py", [{"rank": victim, "at": point, "step": 5, "do": "die"}], steps=STEPS)
    steps = check(job, {job.member(rank) for rank in range(3) if rank != victim})
    assert len(steps) == STEPS
    assert [len(members) for members in steps.values()].count(2) in (STEPS - 5, STEPS - 6)


def test_a_learning_rate_that_follows_the_size(tmp_path: Path) -> None:
    rules: list[Rule] = [
        {"rank": 3, "at": "boundary", "step": 3, "do": "die"},
        {"rank": 1, "at": "settle", "step": 6, "do": "die"},
    ]
    job = run(tmp_path, "horovod_train.py", rules, steps=STEPS, ranks=4, by_size=True)
    rates = [result["rates"] for result in job.results().values()]
    assert len(rates) == 2
    assert rates[0] == rates[1]
    assert (rates[0][0], rates[0][-1]) == (0.04, 0.02)
    finals = [torch.load(path, weights_only=True) for path in tmp_path.glob("final-*.pt")]
    assert all(torch.equal(tensor, other[name]) for name, tensor in finals[0].items() for other in finals)


def test_two_kills_down_to_one_rank(tmp_path: Path) -> None:
    rules: list[Rule] = [
        {"rank": 0, "at": "between buckets", "step": 3, "do": "die"},
        {"rank": 2, "at": "phase:exchange", "do": "die"},
    ]
    job = run(tmp_path, "horovod_train.py", rules, steps=STEPS, plain_mpirun=True, passes=2)
    steps = check(job, {job.member(1)})
    assert len(steps) == STEPS


def test_leave_of_a_script_that_is_not_elastic(tmp_path: Path) -> None:
    job = run(tmp_path, "horovod_train.py", [{"rank": 1, "at": "boundary", "step": 4, "do": "leave"}], steps=STEPS)
    steps = check(job, {job.member(0), job.member(2)})
    assert len(steps) == STEPS
    assert len(steps[STEPS]) == 2


def test_leave_and_checkpoints_of_a_script_with_adasum(tmp_path: Path) -> None:
    rules: list[Rule] = [{"rank": 1, "at": "boundary", "step": 4, "do": "leave"}]
    saved = tmp_path / "saved"
    options = ("--checkpoint-dir", str(saved), "--checkpoint-every", "3")
    job = run(tmp_path, "horovod_train.py", rules, steps=STEPS + 1, op="Adasum", state=True, options=options)
    assert job.status == 0
    assert set(job.results()) == {job.member(0), job.member(2)}
    assert {(result["steps"], result["size"]) for result in job.results().values()} == {(STEPS + 1, 2)}
    finals = [torch.load(job.folder / f"final-{job.member(rank)}.pt", weights_only=True) for rank in (0, 2)]
    assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())
    assert len(list(saved.glob("*"))) > 1, "only the last one was written"
    assert "the replicas differ" not in job.output


def test_join_of_a_script_with_adasum_whose_optimizers_differ_between_ranks(tmp_path: Path) -> None:
    rules: list[Rule] = [{"rank": 1, "at": "boundary", "step": 4, "do": "join"}]
    job = run(tmp_path, "horovod_train.py", rules, steps=400, pause_s=0.02, ranks=2, op="Adasum", state=True)
    assert job.status == 0
    assert "the replicas differ" not in job.output
    newcomer = next(iter(job.events("join_active")))["member"]
    assert set(job.results()) == {job.member(0), job.member(1), newcomer}
    finals = [torch.load(path, weights_only=True) for path in tmp_path.glob("final-*.pt")]
    assert len(finals) == 3
    assert all(torch.equal(tensor, other[name]) for name, tensor in finals[0].items() for other in finals)


def test_join_of_a_script_with_a_training_state(tmp_path: Path) -> None:
    rules: list[Rule] = [{"rank": 1, "at": "boundary", "step": 4, "do": "join"}]
    job = run(tmp_path, "horovod_train.py", rules, steps=400, pause_s=0.02, ranks=2, state=True)
    newcomer = next(iter(job.events("join_active")))["member"]
    steps = check(job, {job.member(0), job.member(1), newcomer})
    assert newcomer in steps[400]


def test_a_job_whose_rank_0_has_less_to_do_is_not_taken_for_finished(tmp_path: Path) -> None:
    job = run(tmp_path, "horovod_train.py", [], steps=STEPS, steps_of_rank_0=3)
    assert job.status == 1
    assert "The script of rank 0 is at its end, or has called hvd.shutdown()" in job.output
    assert "Exception ignored" not in job.output
    assert set(job.results()) == {job.member(0)}


def test_too_few_ranks_are_left(tmp_path: Path) -> None:
    rules: list[Rule] = [{"rank": 1, "at": "settle", "step": 4, "do": "die"}]
    (tmp_path / "job.json").write_text(json.dumps({"folder": str(tmp_path), "faults": rules, "steps": STEPS}))
    script, told = "horovod_train.py", str(tmp_path / "job.json")
    with start(script, tmp_path, told, ranks=3, options=("--min-ranks", "3"), limit_s=90) as under_way:
        job = under_way.finish()
    assert job.status == 3
    assert "stopped at step 4: 2 of 3 ranks are left" in job.output
    assert not job.results()


@pytest.mark.parametrize(("victim", "point"), [(0, "between buckets"), (1, "before optimizer"), (2, "boundary")])
def test_kill_of_an_elastic_one(tmp_path: Path, victim: int, point: str) -> None:
    job = run(tmp_path, "horovod_elastic.py", [{"rank": victim, "at": point, "step": 3, "do": "die"}], epochs=2)
    steps = check(job, {job.member(rank) for rank in range(3) if rank != victim})
    check_samples(steps, job, 2, 3)
    for result in job.results().values():
        assert [entry["size"] for entry in result["entries"]] == [3, 2]
        assert result["resets"] == [2]
        assert result["epoch"] == 2


def test_two_kills_of_an_elastic_one_that_checks_rarely(tmp_path: Path) -> None:
    rules: list[Rule] = [
        {"rank": 0, "at": "between buckets", "step": 1, "do": "die"},
        {"rank": 3, "at": "settle", "step": 2, "do": "die"},
    ]
    job = run(tmp_path, "horovod_elastic.py", rules, epochs=2, ranks=4, check_every=3)
    steps = check(job, {job.member(1), job.member(2)})
    check_samples(steps, job, 2, 4)


def test_kill_of_an_elastic_one_on_its_way_back(tmp_path: Path) -> None:
    rules: list[Rule] = [
        {"rank": 0, "at": "between buckets", "step": 1, "do": "die"},
        {"rank": 3, "at": "reset", "do": "die"},
    ]
    job = run(tmp_path, "horovod_elastic.py", rules, epochs=2, ranks=4)
    steps = check(job, {job.member(1), job.member(2)})
    check_samples(steps, job, 2, 4)
    assert {result["resets"][-1] for result in job.results().values()} == {2}, "nobody was told of the second death"


def test_elastic_state_is_resumed_from_a_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    options = ["--checkpoint-dir", str(saved), "--checkpoint-every", "3"]
    run(tmp_path, "horovod_elastic.py", [], ranks=3, epochs=1, options=options)
    for path in [*tmp_path.glob("result-*"), *tmp_path.glob("final-*")]:
        path.unlink()
    job = run(tmp_path, "horovod_elastic.py", [], ranks=2, epochs=3, options=[*options, "--resume"])
    steps = check(job, {job.member(0), job.member(1)})
    check_samples(steps, job, 3, 3)
    assert [result["entries"][0]["epoch"] for result in job.results().values()] == [1, 1]


def test_join_and_leave(tmp_path: Path) -> None:
    rules: list[Rule] = [
        {"rank": 1, "at": "boundary", "step": 2, "do": "join"},
        {"rank": 2, "at": "boundary", "step": 6, "do": "leave"},
        *NOT_BEFORE_IT_ENTERS,
    ]
    job = run(tmp_path, "horovod_elastic.py", rules, epochs=30, pause_s=0.02, process_set=True)
    newcomer = next(iter(job.events("join_active")))["member"]
    steps = check(job, {job.member(0), job.member(1), newcomer})
    assert newcomer in steps[len(steps)]
    check_samples(steps, job, 30, 4)
    results = job.results()
    assert len(results[job.member(0)]["entries"]) >= 2
    assert results[newcomer]["entries"][0]["step"] > 0
    assert all(entry["seen"] == [0] for result in results.values() for entry in result["entries"])
    assert len({result["lr"] for result in results.values()}) == 1


def test_a_rank_joins_where_the_optimizer_is_made_in_the_training_function(tmp_path: Path) -> None:
    rules: list[Rule] = [{"rank": 1, "at": "boundary", "step": 2, "do": "join"}, *NOT_BEFORE_IT_ENTERS]
    job = run(tmp_path, "horovod_elastic.py", rules, epochs=20, pause_s=0.02, ranks=2, makes_optimizer=True)
    newcomer = next(iter(job.events("join_active")))["member"]
    steps = check(job, {job.member(0), job.member(1), newcomer})
    assert newcomer in steps[len(steps)]
    assert len(job.results()[job.member(0)]["entries"]) == 2


def check_samples(steps: dict[int, list[str]], job: Finished, epochs: int, ranks: int) -> None:
    """Assert that every epoch has every sample once, but for those that make the ranks' parts equal."""
    counts = times_trained(steps, history(job.folder)[1])
    assert sorted(counts) == list(range(epochs))
    changes = len({tuple(members) for members in steps.values()})
    for epoch, seen in counts.items():
        assert sorted(seen) == list(range(SAMPLES)), f"epoch {epoch}: {set(range(SAMPLES)) - set(seen)} were skipped"
        assert sum(seen.values()) - SAMPLES <= changes * (ranks - 1)


def test_kill_in_calls(tmp_path: Path) -> None:
    job = run(tmp_path, "horovod_calls.py", [{"rank": 1, "at": "call", "do": "die"}], ranks=4, what="calls")
    assert job.status == 0
    results = {rank: job.results()[job.member(rank)] for rank in (0, 2, 3)}
    for rank, result in results.items():
        assert result["before"] == 2.0
        assert result["sums"] == [0.0, 3.0, 6.0, 9.0]
        assert result["mean"] == 3.0
        assert result["object"] == ["from", job.member(2)], "rank 1 is the one that had been rank 2"
        assert result["all"] == [job.member(r) for r in (0, 2, 3)]
        assert result["order"] == [97.0, 98.0, 99.0]
        assert result.get("again") == (None if rank == 3 else 2.0)
    assert "lost one of them" in results[0]["first"]
    assert results[2]["second"] == results[3]["second"] == 2.0


@pytest.mark.parametrize("point", ["row", "column"])
def test_kill_of_a_rank_in_process_sets_that_overlap(tmp_path: Path, point: str) -> None:
    """Rank 0 waits, in a set that has lost nobody, for a rank that has failed in another one."""
    rules: list[Rule] = [{"rank": 3, "at": point, "step": 2, "do": "die"}]
    job = run(tmp_path, "horovod_grid.py", rules, ranks=4, options=("--timeout", "20"))
    assert job.status == 0, job.output
    results = [job.results()[job.member(rank)] for rank in range(3)]
    assert [result["sizes"] for result in results] == [[4, 3]] * 3
    assert all("has ended" in result["ended"] for result in results)
    assert len({json.dumps(result["parameters"]) for result in results}) == 1


@pytest.mark.parametrize("elastic", [False, True])
def test_kill_of_the_rank_whose_optimizer_state_is_given_out(tmp_path: Path, elastic: bool) -> None:
    rules: list[Rule] = [{"rank": 0, "at": "between tensors", "do": "die"}]
    job = run(tmp_path, "horovod_root.py", rules, elastic=elastic)
    assert job.status == 0, job.output
    first, second = (job.results()[job.member(rank)] for rank in (1, 2))
    assert first == second
    assert first["sum"] == 2.0
    assert first["state"] == 0, "something else than the state of a living rank was loaded"
    if elastic:
        assert first["sizes"] == [2]
        assert first["buffers"] == [[[1.0, 1.0]], [1.0]]
    else:
        assert len(first["errors"]) == 1
        assert "before a member died, and cannot be done without it" in first["errors"][0]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("alltoall", [[0, 1, 2, 3] * 3, [4, 5, 6, 7] * 3, [8, 9, 10, 11] * 3]),
        ("reducescatter", [[0, 3, 6, 9], [12, 15, 18, 21], [24, 27, 30, 33]]),
        ("broadcast", None),
        ("splits", None),
    ],
)
def test_kill_in_a_call_that_depends_on_the_number_of_ranks(
    tmp_path: Path, call: str, expected: list[list[int]] | None
) -> None:
    rules: list[Rule] = [{"rank": 1, "at": "call", "do": "die"}]
    job = run(tmp_path, "horovod_calls.py", rules, ranks=4, what="bound", call=call)
    assert job.status == 0
    got = [job.results()[job.member(rank)]["got"] for rank in (0, 2, 3)]
    if call == "broadcast":
        assert got == [[2]] * 3, "not what the rank had that was rank 2 when the call was made"
    elif call == "splits":
        assert all("for the 3 ranks that are left" in text for text in got)
    else:
        assert got == expected
    assert {job.results()[job.member(rank)]["next"] for rank in (0, 2, 3)} == {3.0}


def test_kill_between_the_forward_and_the_backward_of_a_call(tmp_path: Path) -> None:
    job = run(tmp_path, "horovod_calls.py", [{"rank": 1, "at": "call", "do": "die"}], ranks=4, what="gradient")
    assert job.status == 0
    gradients = [job.results()[job.member(rank)]["gradient"] for rank in (0, 2, 3)]
    assert gradients == [[0.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0]]


def test_kill_while_a_rank_has_joined(tmp_path: Path) -> None:
    job = run(tmp_path, "horovod_calls.py", [{"rank": 1, "at": "call", "do": "die"}], ranks=4, what="join")
    assert job.status == 0
    results = {rank: job.results()[job.member(rank)] for rank in (0, 2, 3)}
    assert {result["members"] for result in results.values()} == {3}
    assert results[2]["sum"] == results[3]["sum"] == 2.0
    assert len({result["last"] for result in results.values()}) == 1
    assert results[0]["last"] in (1, 2)


def test_calls_of_a_rank_that_has_not_entered_yet(tmp_path: Path) -> None:
    rules: list[Rule] = [{"rank": 1, "at": "boundary", "step": 1, "do": "join"}, *NOT_BEFORE_IT_ENTERS]
    job = run(tmp_path, "horovod_elastic.py", rules, epochs=15, pause_s=0.02, ranks=2, asks_before_entry=True)
    newcomer = next(iter(job.events("join_active")))["member"]
    results = job.results()
    assert set(results) == {job.member(0), job.member(1), newcomer}
    assert "is in it from hvd.elastic.run on" in results[newcomer]["before_entry"]
    assert results[job.member(0)]["before_entry"] == 2.0
    check(job, set(results))


def test_a_newcomer_that_dies_on_its_way_in(tmp_path: Path) -> None:
    rules: list[Rule] = [
        {"rank": 1, "at": "boundary", "step": 1, "do": "join"},
        {"rank": 100, "at": "newcomer:fetch", "do": "die"},
        *NOT_BEFORE_IT_ENTERS,
    ]
    job = run(tmp_path, "horovod_elastic.py", rules, epochs=15, pause_s=0.02, ranks=2)
    assert (tmp_path / "mark-newcomer:fetch.100").exists()
    finals = set(job.results())
    assert {job.member(0), job.member(1)} <= finals
    steps = check(job, finals)
    check_samples(steps, job, 15, 3)
