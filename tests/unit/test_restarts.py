"""How often ranks that crash are started again, and that all members come to the same about it."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.membership import Agenda, Crash, Limits, Outcome, Proposal, Restart, View, negotiate
from chaos_mpi.membership.restarts import PERIOD_S, judge

ABC = View(0, ("a:1", "b:1", "c:1"))
LIMIT = Limits(restarts_an_hour=2)


def crash(member: str, at_s: float = 0.0, obstacle: str = "") -> Proposal:
    return Proposal("restart", f"restart-{member}", member, member.partition(":")[0], reason="SIGSEGV", asked_at=at_s,
                    obstacle=obstacle)  # fmt: skip


def settle(agenda: Agenda, *rows: list[Proposal], view: View = ABC, limits: Limits = LIMIT) -> Outcome:
    return negotiate(agenda, view, [*rows, *([] for _ in range(view.size - len(rows)))], limits)


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.floats(0, 3 * PERIOD_S)), max_size=30),
    st.integers(0, 4),
)
def test_never_more_within_an_hour_than_there_may_be(crashes: list[tuple[str, float]], limit: int) -> None:
    history: tuple[Restart, ...] = ()
    started: list[tuple[str, float]] = []
    for host, at_s in sorted(crashes, key=lambda entry: entry[1]):
        verdict, history = judge(history, host, "SIGSEGV", at_s, limit)
        recent = [when for where, when in started if where == host and at_s - when < PERIOD_S]
        assert (verdict.obstacle == "") == (len(recent) < limit)
        if not verdict.obstacle:
            started.append((host, at_s))
            assert verdict.number == len(recent) + 1
        assert all(at_s - restart.at_s < PERIOD_S for restart in history)


@given(st.lists(st.floats(0, 1e9), max_size=20), st.integers(1, 4))
def test_clocks_that_differ_do_no_harm(times: list[float], limit: int) -> None:
    """Within any order of times at most ``limit`` restarts are remembered, so no number grows without bound."""
    history: tuple[Restart, ...] = ()
    for at_s in times:
        _, history = judge(history, "x", "SIGSEGV", at_s, limit)
        assert len(history) <= limit


def test_what_people_are_told() -> None:
    assert str(Crash("edge2", "SIGSEGV", 1, 3)) == (
        "edge2: its rank crashed (SIGSEGV) and is started again (1 of 3 this hour)"
    )
    verdict, _ = judge([Restart("x", 0.0)], "x", "exit status 1", 10.0, 1)
    assert str(verdict) == (
        "x: its rank crashed (exit status 1) and is not started again: that was done 1 times within the hour, and "
        "--restarts is 1"
    )


def test_a_crash_that_all_report_counts_once() -> None:
    rows = [[crash("d:7", at_s)] for at_s in (5.0, 6.0, 7.0)]
    outcome = settle(Agenda(), *rows)
    (join,) = outcome.start
    assert (join.id, join.host, join.asked_at) == ("restart-d:7", "d", 5.0)
    assert outcome.crashes == (Crash("d", "SIGSEGV", 1, 2),)
    assert outcome.agenda.restarts == (Restart("d", 5.0),)
    late = settle(outcome.agenda, [], [crash("d:7", 9.0)])
    assert (late.start, late.crashes, late.agenda.restarts) == ((), (), outcome.agenda.restarts)


def test_the_limit_is_known_to_newcomers() -> None:
    agenda = Agenda()
    for pid in range(2):
        outcome = settle(agenda, [crash(f"d:{pid}")])
        assert len(outcome.start) == 1
        agenda = Agenda.from_json(json.loads(json.dumps(outcome.agenda.to_json())))
        assert agenda == outcome.agenda
    outcome = settle(agenda, [crash("d:9"), crash("e:1")])
    assert [join.host for join in outcome.start] == ["e"]
    assert [(c.host, bool(c.obstacle)) for c in outcome.crashes] == [("d", True), ("e", False)]
    assert not outcome.refused


def test_what_stands_in_the_way_of_one_does_for_all() -> None:
    outcome = settle(Agenda(), [crash("d:1")], [crash("d:1", obstacle="mpirun is gone")])
    assert outcome.start == ()
    assert outcome.crashes == (Crash("d", "SIGSEGV", 0, 2, "mpirun is gone"),)
    assert outcome.agenda.settled == {"restart-d:1"}
    assert outcome.agenda.restarts == ()


def test_the_dead_takes_no_room() -> None:
    """It may have had its part in the negotiation before it died."""
    limits = Limits(max_ranks=3, restarts_an_hour=1)
    assert len(settle(Agenda(), [crash("c:1")], limits=limits).start) == 1
    outcome = settle(Agenda(), [crash("d:1")], limits=limits)
    assert outcome.start == ()
    assert "max_ranks is 3" in outcome.crashes[0].obstacle
