"""How fast a source is taken to be, by what has arrived."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.replication.rate import MEMORY_S, MeasuredRate


def steady(rate: MeasuredRate, start: float, bytes_per_s: float, shard: int, shards: int) -> float:
    """Shards arrive one after the other; the time of the last."""
    now = start
    rate.asked(now)
    for _ in range(shards):
        now += shard / bytes_per_s
        rate.arrived(now, shard, more=True)
    return now


@given(
    bytes_per_s=st.floats(1e3, 1e10),
    shard=st.integers(1 << 15, 1 << 22),
    shards=st.integers(1, 50),
    start=st.floats(0, 1e3),
)
def test_a_steady_source_has_its_rate(bytes_per_s: float, shard: int, shards: int, start: float) -> None:
    rate = MeasuredRate()
    now = steady(rate, start, bytes_per_s, shard, shards)
    assert rate.bytes_per_s(now, shard, 1.0) == pytest.approx(bytes_per_s, rel=1e-3)


def test_a_change_is_known_after_a_while() -> None:
    rate = MeasuredRate()
    now = steady(rate, 0.0, 1e6, 10_000, 500)
    now = steady(rate, now, 1e5, 10_000, int(30 * MEMORY_S))
    assert rate.bytes_per_s(now, 10_000, 1.0) == pytest.approx(1e5, rel=0.6)
    assert rate.bytes_per_s(now, 10_000, 1.0) > 1e5


def test_a_source_that_says_nothing_is_slower_every_moment() -> None:
    rate = MeasuredRate()
    assert rate.bytes_per_s(0.0, 1000, 1e6) == 1e6
    rate.asked(0.0)
    assert rate.bytes_per_s(0.0005, 1000, 1e6) == 1e6
    assert rate.bytes_per_s(1.0, 1000, 1e6) == pytest.approx(1000)
    now = steady(rate, 1.0, 1e6, 1000, 1000)
    seen = [rate.bytes_per_s(now + wait, 1000, 1e6) for wait in (0.0, 0.0015, 0.5, 5.0)]
    assert seen[0] == seen[1] > seen[2] > seen[3]


def test_time_in_which_nothing_was_due_does_not_count() -> None:
    rate = MeasuredRate()
    rate.asked(0.0)
    rate.arrived(0.1, 1000, more=False)
    rate.asked(50.0)
    rate.arrived(50.1, 1000, more=False)
    assert rate.bytes_per_s(90.0, 0, 1.0) == pytest.approx(1e4)
