"""What must hold after every run, whoever died on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jobs import Finished
from problem import Problem, agreed_steps, check_exactly_once, largest_difference, read_traces, replay

TOLERANCE = 1e-10


def check_survival(
    job: Finished,
    problem: Problem,
    dead: Collection[int],
    *,
    status: int | None = 0,
    events_of: Collection[int] | None = None,
    ended: Collection[int] = (),
    is_named: bool = True,
) -> dict[int, list[str]]:
    """Assert everything that the package promises about a run in which the ranks ``dead`` were killed.

    Args:
        status: what the launcher must return; None when it is not chaosrun.
        events_of: the deaths that survivors must have logged, if not all of ``dead``: one that comes
            when all work is done needs no recovery.
        ended: ranks that died after they had reported their result.
        is_named: whether some survivor knows at once who died. From Horovod it learns only that something broke; who
            died is then in the view that all commit.

    Returns:
        The members whose gradients are in each step.
    """
    if status is not None:
        assert job.status == status, f"the launcher returned {job.status}"
    traces = read_traces(job.folder)
    alive = [job.member(rank) for rank in range(problem.ranks) if rank not in dead]
    gone = {job.member(rank) for rank in dead}

    results = job.results()
    assert set(results) - {job.member(r) for r in ended} == set(alive), "not all survivors came to the end"
    steps = traces[alive[0]].steps
    assert sorted(steps) == list(range(1, len(steps) + 1)), f"steps are missing: {sorted(steps)}"
    for member in alive:
        assert traces[member].steps == steps, f"{member} and {alive[0]} disagree on who contributed"
    check_exactly_once(problem, steps, traces)
    for member, result in results.items():
        assert result["steps"] == result["scheduler"] == len(steps), (member, result)
        assert result["identical"], f"{member} saw replicas that differ"
    assert len({result["digest"] for result in results.values()}) == 1, results

    finals = {member: torch.load(job.folder / f"final-{member}.pt", weights_only=True) for member in alive}
    first = finals[alive[0]]
    for member, final in finals.items():
        for name, tensor in final.items():
            assert torch.equal(tensor, first[name]), f"{name} differs between {alive[0]} and {member}"
    reference = replay(problem, steps, traces)
    difference = largest_difference(reference, first)
    assert difference < TOLERANCE, f"the result is {difference:.1e} away from one process with the same history"

    _check_events(
        job, alive, gone, {job.member(r) for r in (dead if events_of is None else events_of)}, len(steps), is_named
    )
    return steps


def check_history(job: Finished, problem: Problem, finals: Collection[str]) -> dict[int, list[str]]:
    """Assert all that is promised of the training in a run in which members came and went.

    Args:
        finals: the members that must have come to the end.

    Returns:
        The members whose gradients are in each step.
    """
    assert job.status == 0, f"the launcher returned {job.status}"
    traces = read_traces(job.folder)
    results = job.results()
    assert set(results) == set(finals)
    steps = agreed_steps(job.folder, traces)
    assert sorted(steps) == list(range(1, len(steps) + 1))
    check_exactly_once(problem, steps, traces)
    for member, result in results.items():
        assert result["steps"] == result["scheduler"] == len(steps), (member, result)
        assert result["identical"], f"{member} saw replicas that differ"
    assert len({result["digest"] for result in results.values()}) == 1, results
    reference = replay(problem, steps, traces)
    for member in finals:
        final = torch.load(job.folder / f"final-{member}.pt", weights_only=True)
        assert largest_difference(reference, final) < TOLERANCE
    return steps


def check_move(events: Sequence[Mapping[str, Any]], before: Collection[str], began: float) -> None:
    """Assert that a job has moved to another launcher bit for bit, between two steps.

    Args:
        events: of all members, in order of time.
        before: the members that ended for it.
        began: when it was asked for, Unix seconds.
    """
    moved = [e for e in events if e["event"] == "session_ended" and e["outcome"] == "moved"]
    assert {e["member"] for e in moved} == set(before)
    resumed = [e for e in events if e["event"] == "resumed"]
    assert resumed
    assert not {e["member"] for e in resumed} & set(before)
    assert len({(e["step"], e["params_digest"]) for e in (*moved, *resumed)}) == 1, (moved, resumed)
    step = moved[0]["step"]
    steps = [e for e in events if e["event"] == "step"]
    last = next(e for e in reversed(steps) if e["member"] in before)
    following = next(e for e in steps if e["member"] not in before)
    assert (last["step"], following["step"]) == (step, step + 1)
    print(f"from the request to the next finished step after the move: {following['t'] - began:.2f} s")
    print(f"from one step to the next over the move: {following['t'] - last['t']:.2f} s")


def _check_events(
    job: Finished, alive: list[str], gone: set[str], noticed: set[str], steps: int, is_named: bool
) -> None:
    finals = {e["member"]: e for e in job.events("session_ended")}
    assert set(alive) <= set(finals), "a survivor has no session_ended in its event log"
    assert {finals[m]["outcome"] for m in alive} == {"finished"}
    assert len({finals[m]["params_digest"] for m in alive}) == 1
    for member in alive:
        own = [e for e in job.events() if e["member"] == member]
        names = [e["event"] for e in own]
        assert names[0] == "session_started", names
        views = [e for e in own if e["event"] == "view_committed"]
        lost = [m for view in views for m in view["lost"]]
        assert len(lost) == len(set(lost)), f"{member} lost somebody twice: {lost}"
        assert noticed <= set(lost) <= gone, f"{member} logged the loss of {lost}, not of {sorted(noticed)}"
        assert [view["epoch"] for view in views] == list(range(1, len(views) + 1))
        assert [e["step"] for e in own if e["event"] == "step"] == list(range(1, steps + 1))
        if noticed:
            assert "failure_detected" in names, f"{member} logged no failure_detected"
            recovered = [e for e in own if e["event"] == "recovered"]
            assert recovered, f"{member} logged no recovery"
            for event in recovered:
                parts = [event[f"{part}_ms"] for part in ("detect", "revoke", "shrink", "redo", "total")]
                assert min(parts) >= 0.0
                assert parts[-1] >= max(parts[:-1])
    detected = {m for e in job.events("failure_detected") for m in e["failed"]}
    assert detected <= gone, f"{detected - gone} were said to have failed and are alive"
    if is_named and len(noticed) == 1:
        assert detected == noticed, "nobody's failure_detected names the one that died"
