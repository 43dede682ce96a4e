"""A newcomer that hangs, or that ends before MPI knows of it, is given up, and another one comes in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_points import Rule
from jobs import start_training
from problem import Problem, as_trained
from test_membership_changes import FIRST, SECOND, check_changes, rule, until_both_are_ready

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150, method="signal")]

THIRD, FOURTH = 300, 400
#: Trains until it is told to stop. All of it is computed once more afterwards, so it is not to be too many steps.
ENDLESS = Problem(ranks=3, epochs=100_000, pause_s=0.02)
JOIN = rule(1, "boundary", "join", step=3)

#: The join policy, rules, and who does not get in, and who does.
CASES: dict[str, tuple[str, list[Rule], int, set[int]]] = {
    "ends before MPI knows of it": ("blocking", [rule(FIRST, "start", "die")], FIRST, {SECOND}),
    "hangs when it fetches": ("blocking", [rule(FIRST, "newcomer:fetch", "stop")], FIRST, {SECOND}),
    "hangs when it has all, and another one has not": (
        "blocking",
        [rule(2, "boundary", "join", step=3), *until_both_are_ready(),
         rule(FIRST, "newcomer:await_word", "stop"), rule(SECOND, "newcomer:fetch", None, "newcomer:await_word.100")],
        FIRST, {THIRD, FOURTH},
    ),
    "hangs when it measures": ("overlap", [rule(FIRST, "newcomer:measure", "stop")], FIRST, {SECOND}),
    "hangs when it follows": ("overlap", [rule(FIRST, "newcomer:follow", "stop")], FIRST, {SECOND}),
    "hangs while it waits for its turn": (
        "overlap",
        [rule(2, "boundary", "join", step=3), rule(SECOND, "start", None, "newcomer:follow.100"),
         rule(SECOND, "newcomer:await_call", "stop"),
         rule(FIRST, "newcomer:follow", None, "newcomer:await_call.300"), rule(THIRD, "newcomer:await_call")],
        SECOND, {FIRST, THIRD},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_a_newcomer(case: str, tmp_path: Path) -> None:
    policy, rules, lost, joined = CASES[case]
    rules = [JOIN, *rules]
    # Long enough for a process to start on a busy machine, and for one to wait for others that start.
    limit_s = 60 if "another" in case or case == "hangs while it waits for its turn" else 15
    environment = {"CHAOS_JOIN_POLICY": policy, "CHAOS_JOIN_TIMEOUT_S": str(limit_s)}
    with start_training(tmp_path, ENDLESS, rules, environment=environment, limit_s=120) as job:

        def trains() -> bool:
            return sum('"join_active"' in log.read_text() for log in tmp_path.glob("events-*")) == len(joined)

        job.wait_until(trains, "another newcomer trains")
        (tmp_path / "stop").touch()
        finished = job.finish()
        check_changes(finished, as_trained(ENDLESS, tmp_path), dead={lost}, joined=joined)
    failures = [event for event in finished.events("failure_detected") if event["failed"]]
    assert not failures, "no member has failed"
