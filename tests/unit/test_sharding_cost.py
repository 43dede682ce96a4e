"""The cost model, the fluid bound and the shared downlink."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharding import MIB, neighbour_lists

from chaos_mpi.sharding import Neighbour, fluid_bound_s, plan
from chaos_mpi.sharding.cost import shared_finish_s

starts_s = st.sampled_from([0.0, 1.0]) | st.floats(0, 3)
transfers = st.lists(st.tuples(starts_s, st.floats(1, 100), st.integers(1, 300)), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("bandwidth_bytes_per_s", bad) for bad in (0.0, -1.0, math.inf, math.nan)],
        *[(field, bad) for field in ("latency_s", "ready_s", "shard_cost_s") for bad in (-1e-9, math.inf, math.nan)],
        ("capacity_bytes", -1),
    ],
)
def test_a_neighbour_with_impossible_numbers_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"neighbour host:7: {field} is {value}"):
        Neighbour(**{"name": "host:7", "bandwidth_bytes_per_s": 1.0, field: value})


def test_a_neighbour_needs_a_name() -> None:
    with pytest.raises(ValueError, match="name"):
        Neighbour("", 1.0)


def test_the_finish_of_a_neighbour() -> None:
    neighbour = Neighbour("a", 100.0, latency_s=1.0, ready_s=2.0, shard_cost_s=0.5)
    assert (neighbour.start_s, neighbour.finish_s(200, 4)) == (3.0, 7.0)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40 * MIB), neighbour_lists(), st.none() | st.floats(1e3, 1e10), st.data())
def test_the_bound_is_the_least_time_of_a_fluid(
    total: int, neighbours: list[Neighbour], downlink: float | None, data: st.DataObject
) -> None:
    capacity = st.none() | st.integers(0, total)
    limited = [replace(n, capacity_bytes=data.draw(capacity)) for n in neighbours]
    bound = fluid_bound_s(total, limited, downlink_bytes_per_s=downlink)
    if sum(total if n.capacity_bytes is None else n.capacity_bytes for n in limited) < total:
        assert bound == math.inf
        return

    def suffices(t: float) -> bool:
        spans = [(n, max(0.0, t - n.start_s)) for n in limited]
        capacities = [math.inf if n.capacity_bytes is None else n.capacity_bytes for n in limited]
        sent = [n.bandwidth_bytes_per_s * span for n, span in spans]
        if sum(map(min, capacities, sent)) < total:
            return False
        if downlink is None:
            return True
        starts = sorted({n.start_s for n in limited if n.start_s < t})
        through = 0.0
        for start, end in zip(starts, [*starts[1:], t], strict=True):
            links = sum(n.bandwidth_bytes_per_s for n in limited if n.start_s <= start)
            through += min(downlink, links) * (end - start)
        return through >= total

    assert suffices(bound * (1 + 1e-9))
    assert not suffices(bound * (1 - 1e-9))


def test_bounds_by_hand() -> None:
    early, late = Neighbour("early", 10.0, latency_s=1.0), Neighbour("late", 30.0, ready_s=3.0)
    assert fluid_bound_s(0, []) == 0.0
    assert fluid_bound_s(1, []) == math.inf
    assert fluid_bound_s(20, [early, late]) == 3.0
    assert fluid_bound_s(100, [late, early]) == 5.0
    assert fluid_bound_s(100, [early, late], downlink_bytes_per_s=20.0) == 7.0
    assert fluid_bound_s(100, [early, late], downlink_bytes_per_s=5.0) == 21.0
    capped = Neighbour("late", 30.0, ready_s=3.0, capacity_bytes=30)
    assert fluid_bound_s(100, [early, capped]) == 8.0


def test_a_downlink_is_shared_fairly() -> None:
    # 4 for each; when the first is done, the second may have 6, its peak.
    assert shared_finish_s([0.0, 0.0], [9.0, 6.0], [8, 20], 8.0) == [2.0, 4.0]
    # The slow one keeps its peak, the others take an equal part of the rest.
    assert shared_finish_s([0.0] * 3, [2.0, 50.0, 60.0], [4, 8, 8], 10.0) == [2.0, 2.0, 2.0]
    # Alone at first; then half of the downlink each.
    assert shared_finish_s([1.0, 0.0], [10.0, 10.0], [20, 20], 10.0) == [4.0, 3.0]
    # A pause between the two.
    assert shared_finish_s([9.0, 1.0], [10.0, 10.0], [20, 20], 10.0) == [11.0, 3.0]


@settings(deadline=None, max_examples=200)
@given(transfers, st.floats(0.5, 400))
def test_a_shared_downlink_carries_no_more_than_it_can_and_is_not_idle(
    given_: list[tuple[float, float, int]], downlink: float
) -> None:
    starts, peaks, nbytes = (list(column) for column in zip(*given_, strict=True))
    finish = shared_finish_s(starts, peaks, nbytes, downlink)
    alone = [start + n / peak for start, peak, n in given_]
    assert all(shared >= a * (1 - 1e-9) for shared, a in zip(finish, alone, strict=True))
    if sum(peaks) <= downlink:
        assert finish == pytest.approx(alone)
    for since in starts:
        later = sum(n for start, n in zip(starts, nbytes, strict=True) if start >= since)
        assert max(finish) >= (since + later / downlink) * (1 - 1e-9)
    # From the last start on, the downlink is full, or all that still send do so at their peak.
    longest = max(n / peak for _, peak, n in given_)
    assert max(finish) <= (max(starts) + sum(nbytes) / downlink + longest) * (1 + 1e-9)


def test_a_downlink_that_is_no_limit_changes_nothing() -> None:
    links = [Neighbour("a", 1e6, 0.1), Neighbour("b", 3e6, shard_cost_s=0.01)]
    assert plan(50 * MIB, links, downlink_bytes_per_s=4e6) == plan(50 * MIB, links)


def test_shard_costs_leave_room_on_the_downlink() -> None:
    links = [Neighbour(name, 1e6, shard_cost_s=1.0) for name in "ab"]
    alone = plan(2_000_000, links, shard_sizes=[500_000])
    roomy = plan(2_000_000, links, shard_sizes=[500_000], downlink_bytes_per_s=0.7e6)
    assert (roomy.finish_s, roomy.predicted_s) == (alone.finish_s, alone.predicted_s) == ({"a": 3.0, "b": 3.0}, 3.0)
    made = plan(2_000_000, links, shard_sizes=[500_000], downlink_bytes_per_s=0.5e6)
    assert made.predicted_s == pytest.approx(4.0) == made.bound_s > alone.predicted_s


def test_a_downlink_that_is_the_limit_is_in_prediction_and_bound() -> None:
    links = [Neighbour(name, 1e6, latency_s=0.5) for name in "abcd"]
    made = plan(8 * MIB, links, downlink_bytes_per_s=1e6)
    assert made.sources() == dict.fromkeys("abcd", 2 * MIB)
    assert made.predicted_s == pytest.approx(made.bound_s) == pytest.approx(0.5 + 8 * MIB / 1e6)
