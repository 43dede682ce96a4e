"""The members change their order, alone and while others join, leave and die."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_points import Rule
from jobs import start_training
from problem import Problem
from test_membership_changes import FIRST, LONG, check_changes, rule, until_ready

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]

FOUR = Problem(ranks=4)
#: Any member may ask; here it is the last one.
ORDER = rule(3, "boundary", "order", step=3)


@pytest.mark.parametrize("wrapper", ["chaos", "hook"])
def test_another_order(wrapper: str, tmp_path: Path) -> None:
    problem = Problem(ranks=4, wrapper=wrapper)
    with start_training(tmp_path, problem, [ORDER]) as job:
        finished = job.finish()
        check_changes(finished, problem)
    changed = finished.events("view_committed")
    assert [event["cause"] for event in changed] == ["order"] * 4
    wanted = [finished.member(rank) for rank in (0, 3, 2, 1)]
    assert all(event["members"] == wanted and event["epoch"] == 1 for event in changed)
    assert {event["member"]: event["rank"] for event in changed} == {name: i for i, name in enumerate(wanted)}
    assert len(finished.events("stalled")) == 4
    assert not finished.events("failure_detected")


def test_one_order_after_the_other(tmp_path: Path) -> None:
    rules = [rule(rank, "boundary", "order", step=3 + 2 * rank) for rank in range(4)]
    with start_training(tmp_path, FOUR, rules) as job:
        finished = job.finish()
        check_changes(finished, FOUR)
    assert max(event["epoch"] for event in finished.events("view_committed")) == 4


#: Who dies where, and which order the others are in at the end.
DEATHS: dict[str, tuple[list[Rule], int, tuple[int, ...]]] = {
    "before anybody has begun": ([rule(2, "members:arrange", "die")], 2, (0, 1, 3)),
    "the first, when others wait": ([rule(0, "members:arrange", "die")], 0, (1, 2, 3)),
    "afterwards": ([rule(2, "members:change_view", "die")], 2, (0, 3, 1)),
}


@pytest.mark.parametrize("case", DEATHS, ids=lambda case: case.replace(" ", "-").replace(",", ""))
def test_a_death_in_a_change_of_the_order(case: str, tmp_path: Path) -> None:
    rules, dead, order = DEATHS[case]
    with start_training(tmp_path, FOUR, [ORDER, *rules]) as job:
        finished = job.finish()
        check_changes(finished, FOUR, dead=[dead])
    last = max(finished.events("view_committed"), key=lambda event: event["epoch"])
    assert last["members"] == [finished.member(rank) for rank in order]


def test_a_leave_comes_first(tmp_path: Path) -> None:
    with start_training(tmp_path, FOUR, [ORDER, rule(1, "boundary", "leave", step=3)]) as job:
        finished = job.finish()
        check_changes(finished, FOUR, left=[1])
    assert {event["cause"] for event in finished.events("view_committed")} == {"leave"}


def test_orders_while_a_rank_joins(tmp_path: Path) -> None:
    """One while it starts, one while it catches up, which is not carried out then, and one when it is in."""
    rules = [
        rule(1, "boundary", "join", step=3), rule(2, "boundary", "order", step=5), *until_ready(),
        rule(1, "members:cut", "order"), rule(1, "boundary", "order", step=200),
    ]  # fmt: skip
    with start_training(tmp_path, LONG, rules) as job:
        finished = job.finish()
        check_changes(finished, LONG, joined=[FIRST])
    causes = {event["epoch"]: event["cause"] for event in finished.events("view_committed")}
    assert [causes[epoch] for epoch in sorted(causes)] == ["order", "join", "order"]
