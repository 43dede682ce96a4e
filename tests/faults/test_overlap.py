"""Ranks join while the others train on: the newcomer repeats their steps, and comes to the same bits as they have."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_points import Rule
from jobs import Finished, Job, start_training
from problem import Problem
from test_membership_changes import FIRST, SECOND, check_changes, rule, until_both_are_ready, until_ready

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150, method="signal")]

#: Steps enough for a newcomer to measure its links, get the cut and catch up while the others train. They are long, so
#: that one that repeats them catches up also where there are few cores.
LONG = Problem(ranks=3, epochs=45, pause_s=0.02)
JOIN = [rule(1, "boundary", "join", step=3), *until_ready()]
#: It gets behind on purpose, so that there is something to repeat.
BEHIND = rule(FIRST, "newcomer:follow", None, "done 100.0")
#: The second newcomer is the one that is started in place of the first; rank 1 waits for it.
RETRY = [rule(SECOND, "newcomer:register"), rule(1, "boundary", None, f"newcomer:register.{SECOND}", step=200)]
WAITED = "have to wait for this rank"


def start(folder: Path, problem: Problem, rules: list[Rule]) -> Job:
    return start_training(folder, problem, rules, environment={"CHAOS_JOIN_POLICY": "overlap"}, limit_s=90)


def repeated(finished: Finished) -> int:
    return sum(event["repeated_steps"] for event in finished.events("join_active"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rank_joins_while_the_others_train(optimizer: str, tmp_path: Path) -> None:
    problem = Problem(ranks=3, epochs=40, optimizer=optimizer, clip=1.0, pause_s=0.02)
    with start(tmp_path, problem, [*JOIN, BEHIND]) as job:
        finished = job.finish()
        steps = check_changes(finished, problem, joined=[FIRST])
    assert len(steps[max(steps)]) == 4
    assert repeated(finished) > 0, "it never had a step to repeat, so this run has tested nothing"
    assert WAITED not in finished.output
    cut = finished.events("join_cut")[0]["step"]
    (active,) = finished.events("join_active")
    assert active["step"] - 1 - cut >= repeated(finished) > 0


def test_ranks_join_together_while_the_others_train(tmp_path: Path) -> None:
    rules = [rule(1, "boundary", "join", step=3), rule(2, "boundary", "join", step=3)]
    rules += [*until_ready(FIRST), *until_ready(SECOND, rank=1), BEHIND]
    with start(tmp_path, LONG, rules) as job:
        finished = job.finish()
        steps = check_changes(finished, LONG, joined=[FIRST, SECOND])
    assert len(steps[max(steps)]) == 5
    assert WAITED not in finished.output


def test_learning_rates_follow_the_size(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=45, policy="linear", pause_s=0.02)
    with start(tmp_path, problem, [*JOIN, rule(FIRST, "newcomer:follow", None, "done 100.0")]) as job:
        finished = job.finish()
        check_changes(finished, problem, joined=[FIRST])
    assert repeated(finished) > 0
    assert "in other ways than by optimizer steps" not in finished.output


def test_a_job_that_ends_sends_the_newcomer_home(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=40)
    rules = [*JOIN, rule(FIRST, "newcomer:follow", None, "close.0"), rule(0, "close")]
    with start(tmp_path, problem, rules) as job:
        finished = job.finish()
        check_changes(finished, problem)
    assert "was to join a job that ended" in finished.output


#: Rules, who dies, and who has joined in the end.
DEATHS: dict[str, tuple[list[Rule], set[int], set[int]]] = {
    "a member when it is to cut": ([*JOIN, rule(2, "members:cut", "die")], {2}, {FIRST}),
    "a member before the cut is fetched": (
        [*JOIN, rule(FIRST, "newcomer:fetch_planned", None, "dead:2"),
         rule(2, "forward", "die", "newcomer:fetch_planned.100", step=100)], {2}, {FIRST},
    ),
    "rank 0 while the newcomer follows": (
        [*JOIN, rule(FIRST, "newcomer:follow", None, "dead:0"),
         rule(0, "forward", "die", "newcomer:follow.100", step=100)], {0}, {FIRST},
    ),
    "a member when it is to stop": ([*JOIN, rule(1, "members:activate", "die")], {1}, {FIRST}),
    "a member when it is to serve": ([*JOIN, rule(2, "members:serve", "die")], {2}, {FIRST}),
    "a member after it served": ([*JOIN, rule(1, "members:change_view", "die")], {1}, {FIRST}),
    "the newcomer when it measures": ([*JOIN, rule(FIRST, "newcomer:measure", "die"), *RETRY], {FIRST}, {SECOND}),
    "the newcomer when it fetches": ([*JOIN, rule(FIRST, "newcomer:fetch_planned", "die"), *RETRY], {FIRST}, {SECOND}),
    "the newcomer when it follows": ([*JOIN, rule(FIRST, "newcomer:follow", "die"), *RETRY], {FIRST}, {SECOND}),
    "the newcomer when all have stopped": ([*JOIN, rule(FIRST, "newcomer:fetch", "die"), *RETRY], {FIRST}, {SECOND}),
    "the newcomer when it has all": ([*JOIN, rule(FIRST, "newcomer:enter_view", "die")], {FIRST}, set()),
}  # fmt: skip


@pytest.mark.parametrize("case", DEATHS, ids=lambda case: case.replace(" ", "-"))
def test_a_death_while_a_newcomer_catches_up(case: str, tmp_path: Path) -> None:
    rules, dead, joined = DEATHS[case]
    with start(tmp_path, LONG, rules) as job:
        finished = job.finish()
        check_changes(finished, LONG, dead=dead, joined=joined | {label for label in dead if label >= FIRST})


def test_a_member_leaves_while_a_newcomer_catches_up(tmp_path: Path) -> None:
    rules = [
        *JOIN, rule(FIRST, "newcomer:follow", None, "dead:2"),
        rule(2, "boundary", "leave", "newcomer:follow.100", step=100),
    ]  # fmt: skip
    with start(tmp_path, LONG, rules) as job:
        finished = job.finish()
        check_changes(finished, LONG, left=[2], joined=[FIRST])
    assert WAITED in finished.output


def test_a_member_that_leaves_and_does_not_end_holds_nobody_up(tmp_path: Path) -> None:
    """It is in the communicator with the newcomer, which could not be shrunk while its process lives."""
    rules = [
        *JOIN, rule(FIRST, "newcomer:follow", None, "members:depart.2"),
        rule(2, "boundary", "leave", "newcomer:follow.100", step=100),
        rule(2, "members:depart", None, f"newcomer:register.{SECOND}"), *RETRY,
    ]  # fmt: skip
    with start(tmp_path, LONG, rules) as job:
        finished = job.finish()
        check_changes(finished, LONG, left=[2], dead={FIRST}, joined={SECOND})


def test_one_of_two_newcomers_dies_while_both_catch_up(tmp_path: Path) -> None:
    third = 300
    rules = [rule(1, "boundary", "join", step=3), rule(2, "boundary", "join", step=3)]
    rules += [*until_both_are_ready(), rule(FIRST, "newcomer:follow", "die")]
    rules += [rule(SECOND, "newcomer:follow", None, "dead:100"), rule(third, "newcomer:register")]
    rules += [rule(0, "boundary", None, f"newcomer:register.{third}", step=200)]
    with start(tmp_path, LONG, rules) as job:
        finished = job.finish()
        steps = check_changes(finished, LONG, dead={FIRST}, joined=[SECOND, third])
    assert len(steps[max(steps)]) == 5


def test_a_large_state_that_stands_still_is_fetched_once(tmp_path: Path) -> None:
    """Frozen parts are compared when the newcomer is activated, and need not come again."""
    problem = Problem(ranks=3, epochs=45, ballast_bytes=100 << 20, pause_s=0.04)
    with start_training(tmp_path, problem, JOIN, limit_s=90) as job:  # the policy is auto
        finished = job.finish()
        check_changes(finished, problem, joined=[FIRST])
    cut, rest = finished.events("shards_received")
    assert sum(cut["sources"].values()) > 100 << 20
    assert len(cut["sources"]) > 1
    assert sum(rest["sources"].values()) < 1 << 20
