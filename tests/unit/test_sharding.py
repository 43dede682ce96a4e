"""Plans and replans: what is covered, by whom, and what it is said to cost."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chaos_mpi.sharding import Neighbour, Plan, Range, ShardingError, plan, replan

KIB, MIB = 1 << 10, 1 << 20
SIZES = [64 * KIB, 128 * KIB, 512 * KIB, 4 * MIB]

unhurried = settings(deadline=None, max_examples=150)
totals = st.one_of(st.integers(0, 300), st.integers(0, 40 * MIB), st.just(10_000 * MIB))
downlinks = st.none() | st.floats(1e3, 1e10)


def neighbour_lists(min_size: int = 1, max_size: int = 6) -> st.SearchStrategy[list[Neighbour]]:
    """Neighbours with all the ways to differ, and often with ties."""
    seconds = st.sampled_from([0.0, 0.01, 0.5]) | st.floats(0, 2)
    neighbour = st.builds(
        Neighbour,
        name=st.text("abcdefgh", min_size=1, max_size=3),
        bandwidth_bytes_per_s=st.sampled_from([1e6, 1e7]) | st.floats(1e4, 1e9),
        latency_s=seconds,
        ready_s=seconds,
        shard_cost_s=st.sampled_from([0.0, 0.001]) | st.floats(0, 0.1),
    )
    return st.lists(neighbour, min_size=min_size, max_size=max_size, unique_by=lambda n: n.name)


def assert_covers(assignment: Mapping[str, Sequence[Range]], wanted: Sequence[Range]) -> None:
    """Every byte wanted is given out once, and no other."""
    given_out = sorted(span for spans in assignment.values() for span in spans)
    assert all(start < stop for start, stop in given_out)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(given_out))
    assert joined(given_out) == joined(wanted)


def joined(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes as maximal runs, worked out from their ends alone."""
    starts, stops = ({span[end] for span in ranges if span[0] < span[1]} for end in (0, 1))
    return list(zip(sorted(starts - stops), sorted(stops - starts), strict=True))


def recomputed_finish_s(made: Plan, neighbours: Sequence[Neighbour]) -> dict[str, float]:
    """When each sender is done without a downlink, shard by shard."""
    finish = {}
    for n in neighbours:
        if n.name in made.assignment:
            shards = made.shards()[n.name]
            seconds = math.fsum((stop - start) / n.bandwidth_bytes_per_s + n.shard_cost_s for start, stop in shards)
            finish[n.name] = n.ready_s + n.latency_s + seconds
    return finish


@unhurried
@given(totals, neighbour_lists(), st.none() | st.lists(st.sampled_from(SIZES), min_size=1, max_size=5), downlinks)
def test_a_plan_covers_everything_once_and_costs_what_it_says(
    total: int, neighbours: list[Neighbour], sizes: list[int] | None, downlink: float | None
) -> None:
    assume(sizes is None or total <= 20_000 * min(sizes))
    made = plan(total, neighbours, shard_sizes=sizes, downlink_bytes_per_s=downlink)
    assert_covers(made.assignment, [(0, total)])
    assert made.total_bytes == total == sum(made.sources().values())
    assert all(len(runs) == 1 for runs in made.assignment.values())
    assert made.predicted_s == max(made.finish_s.values(), default=0.0)
    assert made.predicted_s >= made.bound_s * (1 - 1e-9)
    alone = recomputed_finish_s(made, neighbours)
    if downlink is None:
        assert made.finish_s == pytest.approx(alone, rel=1e-12)
    else:
        assert made.finish_s.keys() == alone.keys()
        assert all(made.finish_s[name] >= alone[name] * (1 - 1e-9) for name in alone)


@unhurried
@given(st.integers(1, 40 * MIB), neighbour_lists(), st.data())
def test_capacities_are_kept(total: int, neighbours: list[Neighbour], data: st.DataObject) -> None:
    parts = [data.draw(st.none() | st.integers(0, total)) for _ in neighbours]
    limited = [replace(n, capacity_bytes=part) for n, part in zip(neighbours, parts, strict=True)]
    try:
        made = plan(total, limited)
    except ShardingError:
        # Each capacity loses less than the smallest shard to granularity.
        assert sum(total if part is None else part for part in parts) < total + len(parts) * 64 * KIB
        return
    capacities = {n.name: n.capacity_bytes for n in limited}
    for name, nbytes in made.sources().items():
        assert capacities[name] is None or nbytes <= capacities[name]
    assert_covers(made.assignment, [(0, total)])
    assert made.predicted_s >= made.bound_s * (1 - 1e-9)


@unhurried
@given(totals, neighbour_lists(), st.randoms(use_true_random=False), downlinks)
def test_the_order_of_the_neighbours_does_not_matter(
    total: int, neighbours: list[Neighbour], rng: random.Random, downlink: float | None
) -> None:
    shuffled = rng.sample(neighbours, len(neighbours))
    made = plan(total, neighbours, downlink_bytes_per_s=downlink)
    assert made == plan(total, iter(shuffled), downlink_bytes_per_s=downlink)


def test_ties_go_to_the_earlier_name() -> None:
    alike = [Neighbour(name, 1e6) for name in ("c", "a", "b")]
    assert plan(64 * KIB, alike).sources() == {"a": 64 * KIB}
    five = plan(5 * 64 * KIB, alike, shard_sizes=[64 * KIB])
    assert five.assignment == {"a": ((0, 131072),), "b": ((131072, 262144),), "c": ((262144, 327680),)}


def test_of_equally_fast_plans_the_one_with_larger_shards_is_taken() -> None:
    assert plan(8 * MIB, [Neighbour("a", 1e6), Neighbour("b", 1e6)]).shard_bytes == 4 * MIB


def test_bytes_follow_the_bandwidth_and_late_neighbours_are_left_out() -> None:
    fast, slow, late = Neighbour("fast", 3e8), Neighbour("slow", 1e8), Neighbour("late", 1e9, ready_s=100.0)
    made = plan(400 * MIB, [fast, slow, late], shard_sizes=[MIB])
    assert made.sources() == {"fast": 300 * MIB, "slow": 100 * MIB}
    assert made.predicted_s == pytest.approx(made.bound_s) == pytest.approx(MIB / 1e6)


def test_a_cost_for_each_shard_makes_shards_large() -> None:
    def best(cost: float) -> int:
        links = [Neighbour(name, 1e8, shard_cost_s=cost) for name in "abc"]
        return plan(100 * MIB, links).shard_bytes

    assert best(0.0) < best(0.001) < best(10.0) == 64 * MIB


@unhurried
@given(st.lists(st.integers(1, 4 * MIB), max_size=12), neighbour_lists(), st.randoms(use_true_random=False))
def test_a_replan_covers_exactly_what_remains(
    lengths: list[int], neighbours: list[Neighbour], rng: random.Random
) -> None:
    bounds = list(itertools.accumulate(lengths, initial=0))
    remaining = [span for span in itertools.pairwise(bounds) if rng.random() < 0.7]
    rng.shuffle(remaining)
    shards = replan(remaining, neighbours, shard_sizes=SIZES)
    assert_covers(shards, remaining)
    assert set(shards) <= {n.name for n in neighbours}
    assert all(spans and spans == sorted(spans) for spans in shards.values())
    every = [stop - start for spans in shards.values() for start, stop in spans]
    largest = max(every, default=0)
    assert largest <= max(SIZES)
    # All of one size, but for one short shard in each range.
    assert sum(n < largest for n in every) <= len(joined(remaining))


@unhurried
@given(st.integers(1, 20 * MIB), neighbour_lists())
def test_a_replan_of_everything_is_the_plan(total: int, neighbours: list[Neighbour]) -> None:
    assert replan([(0, total)], neighbours) == plan(total, neighbours).shards()


@unhurried
@given(st.integers(1, 20 * MIB), neighbour_lists(min_size=2), st.data())
def test_the_shards_of_a_dead_source_go_to_the_others(
    total: int, neighbours: list[Neighbour], data: st.DataObject
) -> None:
    first = plan(total, neighbours).shards()
    dead = data.draw(st.sampled_from(sorted(first)))
    lost = first[dead][data.draw(st.integers(0, len(first[dead]))) :]
    again = replan(lost, [n for n in neighbours if n.name != dead])
    assert dead not in again
    assert_covers(again, lost)


def test_a_replan_keeps_capacities() -> None:
    neighbours = [Neighbour("fast", 1e9, capacity_bytes=MIB), Neighbour("slow", 1e6)]
    shards = replan([(0, MIB), (3 * MIB, 6 * MIB)], neighbours)
    assert sum(stop - start for start, stop in shards["fast"]) <= MIB
    assert_covers(shards, [(0, MIB), (3 * MIB, 6 * MIB)])


def test_shards_are_the_runs_cut_at_the_shard_size() -> None:
    made = Plan.of({"a": [(0, 10), (10, 25)], "b": [(25, 30)], "c": []}, 10, [Neighbour(n, 1.0) for n in "abc"])
    assert made.assignment == {"a": ((0, 25),), "b": ((25, 30),)}
    assert made.shards() == {"a": [(0, 10), (10, 20), (20, 25)], "b": [(25, 30)]}


def test_nothing_to_send_is_an_empty_plan() -> None:
    for neighbours in ([], [Neighbour("a", 1.0)]):
        empty = plan(0, neighbours)
        assert (empty.assignment, empty.predicted_s, empty.bound_s, empty.sources()) == ({}, 0.0, 0.0, {})
        assert empty.shards() == replan([(5, 5)], neighbours) == replan([], neighbours) == {}


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ShardingError, match="no neighbour"):
        plan(1, [])
    with pytest.raises(ShardingError, match="no neighbour"):
        replan([(0, 1)], [])
    small = [Neighbour("a", 1.0, capacity_bytes=10), Neighbour("b", 1.0, capacity_bytes=10)]
    with pytest.raises(ShardingError, match="capacities of 2 neighbours, 20 bytes"):
        plan(21, small)
    with pytest.raises(ShardingError, match="whole shards of 20 bytes"):
        plan(20, small)
    assert plan(20, small, shard_sizes=[5, 20]).sources() == {"a": 10, "b": 10}


def test_arguments_that_make_no_sense_are_refused() -> None:
    one = [Neighbour("a", 1.0)]
    with pytest.raises(ValueError, match="negative"):
        plan(-1, one)
    with pytest.raises(ValueError, match="two neighbours are called a"):
        plan(1, one * 2)
    for sizes in ([], [0], [-4]):
        with pytest.raises(ValueError, match="shard sizes must be positive"):
            plan(100, one, shard_sizes=sizes)
    with pytest.raises(ValueError, match="downlink"):
        plan(100, one, downlink_bytes_per_s=0.0)
    with pytest.raises(ValueError, match="overlap"):
        replan([(0, 10), (9, 12)], one)
    for wrong in ((5, 4), (-1, 3)):
        with pytest.raises(ValueError, match="not a byte range"):
            replan([wrong], one)


@pytest.mark.parametrize("downlink", [None, 3e9])
def test_a_large_plan_has_as_many_shards_as_it_should(downlink: float | None) -> None:
    rng = random.Random(1)
    neighbours = [Neighbour(f"n{i}", rng.uniform(1e7, 1e9), 0.01 * rng.random(), shard_cost_s=1e-4) for i in range(100)]
    made = plan(10_000 * MIB, neighbours, shard_sizes=[MIB], downlink_bytes_per_s=downlink)
    assert sum(len(spans) for spans in made.shards().values()) == 10_000
    assert made.predicted_s <= 1.15 * made.bound_s


def test_the_work_grows_with_the_neighbours_and_not_with_the_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    finish_s = Neighbour.finish_s

    def counted(self: Neighbour, nbytes: int, shards: int) -> float:
        nonlocal calls
        calls += 1
        return finish_s(self, nbytes, shards)

    monkeypatch.setattr(Neighbour, "finish_s", counted)
    neighbours = [Neighbour(f"n{i}", 1e7 * (1 + i), shard_cost_s=1e-4) for i in range(20)]
    plan(100_000 * MIB + 1, neighbours, shard_sizes=[MIB])
    assert calls <= 7 * len(neighbours)


def test_times_far_apart_do_not_confuse_it() -> None:
    neighbours = [Neighbour("soon", 1e12), Neighbour("far", 1e12, ready_s=1e14), Neighbour("slow", 1e-9)]
    assert plan(1000 * MIB, neighbours).sources() == {"soon": 1000 * MIB}
    both_far = [Neighbour("a", 1e12, ready_s=1e14), Neighbour("b", 1e12, ready_s=1e14)]
    assert_covers(plan(10 * MIB, both_far, shard_sizes=[64 * KIB]).assignment, [(0, 10 * MIB)])


def test_it_needs_neither_torch_nor_mpi() -> None:
    code = "import chaos_mpi.sharding, sys; print(sorted({'torch', 'mpi4py', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
