"""How fast a job goes and what it takes, from looks now and then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.agent.machine import LEAST_S, CpuShare
from chaos_mpi.elastic.usage import LOOKS, StepRate, Usage
from chaos_mpi.membership import Changes


@given(st.floats(1e-3, 0.4), st.floats(1.0, 3.0), st.integers(3, 40))
def test_the_speed_of_even_steps_is_right_to_a_step_per_period(step_s: float, period_s: float, looks: int) -> None:
    rate = StepRate()
    for number in range(looks):
        rate.look(number * period_s, int(number * period_s / step_s))
    over_s = period_s * (min(looks, LOOKS) - 1)
    assert rate.per_s((looks - 1) * period_s) == pytest.approx(1 / step_s, abs=1.01 / over_s)


def test_the_speed_of_steps_that_take_longer_than_the_time_between_looks() -> None:
    rate = StepRate()
    for second in range(100):
        rate.look(float(second), second // 20)
    assert rate.per_s(99.0) == pytest.approx(1 / 20)


def test_the_speed_is_not_known_before_a_step_and_falls_when_none_follows() -> None:
    rate = StepRate()
    assert rate.per_s(0.0) is None
    for second in range(5):
        rate.look(float(second), 10 * second)
    speeds = [rate.per_s(float(now)) for now in (4, 8, 16, 1000)]
    assert speeds[0] == 10.0
    assert speeds == sorted(speeds, key=lambda speed: -(speed or 0.0))
    assert len(set(speeds)) == 4
    assert (speeds[-1] or 0.0) < 0.1


def test_looks_close_to_each_other_say_nothing() -> None:
    rate = StepRate()
    rate.look(0.0, 0)
    rate.look(LEAST_S / 10, 1)
    assert rate.per_s(LEAST_S / 10) is None
    rate.look(2.0, 4)
    assert rate.per_s(2.0) == 2.0


def test_a_step_that_goes_back_begins_anew() -> None:
    rate = StepRate()
    for at, step in enumerate((100, 110, 5, 8)):
        rate.look(float(at), step)
    assert rate.per_s(3.0) == 3.0


def test_the_share_of_a_core_is_that_since_the_last_look() -> None:
    share = CpuShare(since=0.0)
    assert share.look(10.0, 5.0) == pytest.approx(50.0)
    assert share.look(12.0, 7.0) == pytest.approx(100.0)
    assert share.look(12.0 + LEAST_S / 2, 7.0) == pytest.approx(100.0), "too soon to tell anything else"
    assert share.look(14.0, 7.0) == pytest.approx(0.0)


def test_the_share_since_the_machine_was_started_is_not_told() -> None:
    share = CpuShare(since=None)
    assert share.look(1000.0, 500.0) is None
    assert share.look(1001.0, 500.25) == pytest.approx(25.0)


def test_what_this_process_takes() -> None:
    process = Usage().process()
    assert process["rss_bytes"] > 1e6
    assert process["cpu_s"] > 0.0


# -- changes of the view ------------------------------------------------------------------------------


def test_changes_are_counted_by_their_cause() -> None:
    changes = Changes().after("failure", "abcd", "ab").after("join", "ab", "abef").after("leave", "abef", "bef")
    assert changes == Changes(recoveries=1, deaths=2, joins=2, leaves=1)
    assert Changes(**changes.to_json()) == changes
    assert changes.after("failure", "bef", "bef").recoveries == 2, "a newcomer died, no member did"


sets = st.frozensets(st.integers(0, 9), min_size=1)


@given(sets, st.lists(st.tuples(st.sampled_from(["failure", "leave"]), sets) | st.tuples(st.just("join"), sets)))
def test_the_size_is_what_came_less_what_went(first: frozenset[int], moves: list[tuple[str, frozenset[int]]]) -> None:
    members, changes = {str(m) for m in first}, Changes()
    for cause, who in moves:
        named = {str(m) for m in who}
        new = members | named if cause == "join" else members - named
        changes, members = changes.after(cause, members, new), new
    assert len(members) == len(first) + changes.joins - changes.leaves - changes.deaths
