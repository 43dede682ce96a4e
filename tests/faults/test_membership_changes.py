"""Ranks join and leave while others die: no step is lost, none is applied twice, and no replica differs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from checks import check_history
from fault_points import Rule
from jobs import Finished, start, start_training
from problem import Problem

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]

#: The first newcomer, and the second; see fault_points.own_label.
FIRST, SECOND = 100, 200
#: Epochs enough for a newcomer to come up while the others train.
LONG = Problem(ranks=3, epochs=40)


def rule(rank: int, at: str, do: str | None = None, *wait: str, step: int | None = None) -> Rule:
    """See :mod:`fault_points`."""
    made: Rule = {"rank": rank, "at": at, "wait": list(wait)}
    return made | ({"do": do} if do else {}) | ({"step": step} if step is not None else {})


def until_ready(newcomer: int = FIRST, rank: int = 0, step: int = 8) -> list[Rule]:
    """``rank`` keeps the others from training through before the newcomer is about to say that it is ready."""
    return [
        rule(newcomer, "newcomer:register"),
        rule(rank, "boundary", None, f"newcomer:register.{newcomer}", step=step),
    ]


def until_both_are_ready(step: int = 8) -> list[Rule]:
    """Rank 2 keeps all from going on until the first two newcomers can be taken in, so that they are, together."""
    arrived = "members:propose arrived"
    return [
        *(rule(sponsor, arrived) for sponsor in (0, 1)),
        rule(2, "boundary", None, f"{arrived}.0", f"{arrived}.1", step=step),
    ]


def check_changes(
    job: Finished,
    problem: Problem,
    *,
    dead: Collection[int] = (),
    left: Collection[int] = (),
    joined: Collection[int] = (),
) -> dict[int, list[str]]:
    """Assert all that is promised, whoever came and went; returns the members whose gradients are in each step."""
    finals = {job.member(r) for r in [*range(problem.ranks), *joined] if r not in dead and r not in left}
    steps = check_history(job, problem, finals)
    for label in joined:
        if label in dead:
            continue
        (active,) = [e for e in job.events("join_active") if e["member"] == job.member(label)]
        assert job.member(label) in steps[active["step"]], "it said that it contributed to a step, and did not"
    for label in left:
        (ended,) = [e for e in job.events("session_ended") if e["member"] == job.member(label)]
        assert ended["outcome"] == "left"
    return steps


def test_a_rank_joins(tmp_path: Path) -> None:
    rules = [rule(1, "boundary", "join", step=3), *until_ready()]
    with start_training(tmp_path, LONG, rules) as job:
        finished = job.finish()
        steps = check_changes(finished, LONG, joined=[FIRST])
    assert len(steps[max(steps)]) == 4
    (received,) = finished.events("shards_received")
    (cut, *_) = finished.events("join_cut")
    assert sum(received["sources"].values()) == cut["state_bytes"]


def test_ranks_join_together(tmp_path: Path) -> None:
    rules = [rule(1, "boundary", "join", step=3), rule(2, "boundary", "join", step=3)]
    rules += [*until_ready(FIRST), *until_ready(SECOND, rank=1)]
    with start_training(tmp_path, LONG, rules) as job:
        finished = job.finish()
        steps = check_changes(finished, LONG, joined=[FIRST, SECOND])
    assert len(steps[max(steps)]) == 5


def test_a_rank_joins_with_prefetching_loaders(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=12, workers=2)
    with start_training(tmp_path, problem, [rule(1, "boundary", "join", step=3), *until_ready()]) as job:
        check_changes(job.finish(), problem, joined=[FIRST])


LEAVES: dict[str, tuple[list[Rule], set[int]]] = {
    "one": ([rule(1, "boundary", "leave", step=3)], {1}),
    "rank 0": ([rule(0, "boundary", "leave", step=3)], {0}),
    "two at once": ([rule(0, "boundary", "leave", step=3), rule(2, "boundary", "leave", step=3)], {0, 2}),
    "in the last step of an epoch": ([rule(1, "boundary", "leave", step=7)], {1}),
}


@pytest.mark.parametrize("case", LEAVES, ids=lambda case: case.replace(" ", "-"))
def test_ranks_leave(case: str, tmp_path: Path) -> None:
    rules, left = LEAVES[case]
    problem = Problem(ranks=3)
    with start_training(tmp_path, problem, rules) as job:
        finished = job.finish()
        check_changes(finished, problem, left=left)
    assert not finished.events("failure_detected"), "a leave is no failure"


def test_the_last_rank_stays(tmp_path: Path) -> None:
    problem = Problem(ranks=1)
    with start_training(tmp_path, problem, [rule(0, "boundary", "leave", step=3)]) as job:
        finished = job.finish()
        check_changes(finished, problem)
    assert "cannot leave: it is the last rank" in finished.output


def test_a_newcomer_leaves_and_another_one_comes(tmp_path: Path) -> None:
    rules = [
        rule(1, "boundary", "join", step=3), *until_ready(),
        rule(FIRST, "boundary", "leave"), rule(0, "boundary", "join", step=60), *until_ready(SECOND, step=70),
    ]  # fmt: skip
    with start_training(tmp_path, LONG, rules) as job:
        check_changes(job.finish(), LONG, joined=[FIRST, SECOND], left=[FIRST])


JOIN = [rule(1, "boundary", "join", step=3), *until_ready()]
#: The second newcomer is the one that is started in place of the first; rank 1 waits for it.
RETRY = [rule(SECOND, "newcomer:register"), rule(1, "boundary", None, f"newcomer:register.{SECOND}", step=40)]

#: Rules, who dies, and who has joined in the end.
DEATHS: dict[str, tuple[list[Rule], set[int], set[int]]] = {
    "the sponsor while it starts the newcomer": ([JOIN[0], rule(0, "forward", "die", step=6), *RETRY], {0}, {SECOND}),
    "the proposer": ([*JOIN, rule(1, "forward", "die", step=6)], {1}, {FIRST}),
    "a member when it is to grow": ([*JOIN, rule(2, "members:grow", "die"), *RETRY], {2}, {SECOND}),
    "a member when it is to serve": ([*JOIN, rule(2, "members:serve", "die")], {2}, {FIRST}),
    "rank 0 when it is to serve": ([*JOIN, rule(0, "members:serve", "die")], {0}, {FIRST}),
    "a member after it served": ([*JOIN, rule(1, "members:change_view", "die")], {1}, {FIRST}),
    "the newcomer before it is ready": ([*JOIN, rule(FIRST, "newcomer:register", "die"), *RETRY], {FIRST}, {SECOND}),
    "the newcomer when it is called in": ([*JOIN, rule(FIRST, "newcomer:enter", "die"), *RETRY], {FIRST}, {SECOND}),
    "the newcomer when it fetches": ([*JOIN, rule(FIRST, "newcomer:fetch", "die"), *RETRY], {FIRST}, {SECOND}),
    "the newcomer when it has all": ([*JOIN, rule(FIRST, "newcomer:enter_view", "die")], {FIRST}, set()),
    "the newcomer in its first step": ([*JOIN, rule(FIRST, "forward", "die")], {FIRST}, set()),
}  # fmt: skip


@pytest.mark.parametrize("case", DEATHS, ids=lambda case: case.replace(" ", "-"))
def test_a_death_in_a_join(case: str, tmp_path: Path) -> None:
    rules, dead, joined = DEATHS[case]
    with start_training(tmp_path, LONG, rules) as job:
        finished = job.finish()
        check_changes(finished, LONG, dead=dead, joined=joined | {label for label in dead if label >= FIRST})


def test_a_newcomer_dies_when_it_fetches_beside_another_one(tmp_path: Path) -> None:
    """No view is begun with one that is known to be dead: both are started again, and both come in."""
    again = [300, 400]
    rules = [rule(1, "boundary", "join", step=3), rule(2, "boundary", "join", step=3)]
    rules += [*until_both_are_ready(), rule(FIRST, "newcomer:fetch", "die")]
    rules += [rule(label, "newcomer:register") for label in again]
    rules += [rule(0, "boundary", None, *(f"newcomer:register.{label}" for label in again), step=40)]
    with start_training(tmp_path, LONG, rules) as job:
        finished = job.finish()
        steps = check_changes(finished, LONG, dead={FIRST}, joined=again)
    assert len(steps[max(steps)]) == 5
    assert not finished.events("failure_detected"), "it was never a member"


LEAVE = rule(1, "boundary", "leave", step=3)
LEAVE_DEATHS: dict[str, tuple[list[Rule], set[int], set[int]]] = {
    "a member when they part": ([LEAVE, rule(2, "members:part", "die")], {2}, {1}),
    "the one that leaves, when they part": ([LEAVE, rule(1, "members:part", "die")], {1}, set()),
    "a member right afterwards": ([LEAVE, rule(0, "members:change_view", "die")], {0}, {1}),
    "all others, when they part": (
        [LEAVE, *(rule(rank, "members:part", "die") for rank in (0, 2, 3))],
        {0, 2, 3},
        set(),
    ),
    "all that were to stay": (
        [LEAVE, rule(0, "boundary", "leave", step=3), *(rule(rank, "members:part", "die") for rank in (2, 3))],
        {2, 3},
        {1},
    ),
}


@pytest.mark.parametrize("case", LEAVE_DEATHS, ids=lambda case: case.replace(" ", "-").replace(",", ""))
def test_a_death_in_a_leave(case: str, tmp_path: Path) -> None:
    rules, dead, left = LEAVE_DEATHS[case]
    problem = Problem(ranks=4)
    with start_training(tmp_path, problem, rules) as job:
        finished = job.finish()
        check_changes(finished, problem, dead=dead, left=left)
    assert ("cannot leave: too few ranks would be left" in finished.output) == (len(dead) > 1)


def test_a_death_in_a_leave_that_would_leave_too_few(tmp_path: Path) -> None:
    problem = Problem(ranks=3)
    rules = [LEAVE, rule(2, "members:part", "die")]
    with start_training(tmp_path, problem, rules, options=["--min-ranks", "2"]) as job:
        finished = job.finish()
        check_changes(finished, problem, dead={2})
    assert "cannot leave: too few ranks would be left" in finished.output


def test_a_rank_joins_a_loop_over_two_models_without_a_sampler(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "joined_between_two_models", ranks=2) as job:
        finished = job.finish()
    assert finished.status == 0
    assert len(finished.events("join_active")) == 1
    assert finished.output.count("came to the end") == 3


def test_a_newcomer_dies_and_leaves_workers_behind(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=12, workers=2)
    with start_training(tmp_path, problem, [*JOIN, rule(FIRST, "forward", "die")]) as job:
        finished = job.finish()
        check_changes(finished, problem, dead={FIRST}, joined={FIRST})
    died = (tmp_path / f"mark-forward.{FIRST}").stat().st_mtime
    detected = finished.events("failure_detected")
    assert detected
    # The workers look every 5 s whether their rank is there.
    assert max(event["t"] for event in detected) - died < 4.0


@pytest.mark.parametrize("policy", ["blocking", "overlap"])
def test_a_rank_joins_where_buffers_differ(policy: str, tmp_path: Path) -> None:
    environment = {"CHAOS_JOIN_POLICY": policy}
    with start("scenarios.py", tmp_path, "joined_with_buffers_that_differ", ranks=3, environment=environment) as job:
        finished = job.finish()
    assert finished.status == 0
    assert [event["attempt"] for event in finished.events("join_spawned")] == [1]
    assert len(finished.events("join_active")) == 1
    assert finished.output.count("came to the end") == 4
    assert "differ between the ranks" in finished.output


def test_a_source_dies_in_the_middle_of_a_large_transfer(tmp_path: Path) -> None:
    problem = Problem(ranks=3, epochs=40, ballast_bytes=400 << 20)
    rules = [*JOIN, rule(FIRST, "newcomer:fetch")]
    with start_training(tmp_path, problem, rules, environment={"CHAOS_JOIN_POLICY": "blocking"}, limit_s=90) as job:
        victim = job.pid(2)
        begun = tmp_path / "mark-newcomer:fetch.100"
        job.wait_until(begun.exists, "the newcomer fetches")
        job.kill(victim)
        finished = job.finish()
        check_changes(finished, problem, dead={2}, joined={FIRST})
    sent: dict[str, Any] = finished.events("shards_received")[0]
    assert sent["moved"], "the source died too late, so this run has tested nothing"
