"""No schedule is better: against enumeration, against an integer program, and against the baselines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharding import KIB, MIB, assert_covers, neighbour_lists

from chaos_mpi.sharding import (
    Neighbour,
    Plan,
    ShardingError,
    bisected,
    equal_slices,
    plan,
    replan,
    round_robin,
    single_nearest,
    single_random,
)
from chaos_mpi.sharding.plan import chain

ROUNDING = 1 + 1e-9


@st.composite
def small_cases(draw: st.DrawFn, most_shards: int) -> tuple[int, int, list[Neighbour]]:
    """Total bytes, shard bytes and up to four neighbours, some with a capacity; times of a few shards, many ties."""
    shard = draw(st.integers(1, 8))
    total = draw(st.integers(1, most_shards * shard))
    grid = st.integers(0, 12).map(lambda i: i / 4)
    neighbours = [
        Neighbour(
            name,
            draw(st.sampled_from([0.5, 1.0, 2.0, 3.0]) | st.floats(0.3, 5)),
            draw(grid),
            draw(grid | st.floats(0, 20)),
            draw(grid | st.floats(0, 3)),
            draw(st.none() | st.integers(0, total)),
        )
        for name in "abcd"[: draw(st.integers(1, 4))]
    ]
    return total, shard, neighbours


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as a sum of ``parts`` numbers."""
    for bars in itertools.combinations(range(total + parts - 1), parts - 1):
        yield tuple(b - a - 1 for a, b in itertools.pairwise((-1, *bars, total + parts - 1)))


def enumerated_s(total: int, shard: int, neighbours: Sequence[Neighbour]) -> float:
    """The least makespan of all share-outs at one size; infinite when none keeps the capacities."""
    full, tail = divmod(total, shard)
    best = math.inf
    for counts in compositions(full, len(neighbours)):
        for holder in range(len(neighbours)) if tail else [None]:
            finish = 0.0
            for i, (n, count) in enumerate(zip(neighbours, counts, strict=True)):
                nbytes, shards = count * shard + tail * (i == holder), count + (i == holder)
                if n.capacity_bytes is not None and nbytes > n.capacity_bytes:
                    finish = math.inf
                elif shards:
                    busy = nbytes / n.bandwidth_bytes_per_s + shards * n.shard_cost_s
                    finish = max(finish, n.ready_s + n.latency_s + busy)
            best = min(best, finish)
    return best


@settings(deadline=None, max_examples=300)
@given(small_cases(most_shards=7))
def test_optimal_among_all_share_outs(case: tuple[int, int, list[Neighbour]]) -> None:
    total, shard, neighbours = case
    best = enumerated_s(total, shard, neighbours)
    try:
        made = plan(total, neighbours, shard_sizes=[shard])
    except ShardingError:
        assert best == math.inf
        return
    assert made.predicted_s == pytest.approx(best, rel=1e-9)


def integer_program_s(total: int, sizes: Sequence[int], neighbours: Sequence[Neighbour]) -> float:
    """The least makespan over all sizes and share-outs, by HiGHS; infinite when there is none.

    Variables: T; for each size whether it is used; for each size and neighbour the number of full shards, whether it
    holds the short one, and whether it sends.
    """
    optimize = pytest.importorskip("scipy.optimize")
    pairs = [(s, n) for s in range(len(sizes)) for n in range(len(neighbours))]
    columns = 1 + len(sizes) + 3 * len(pairs)
    rows: list[np.ndarray] = []
    low: list[float] = []
    high: list[float] = []

    def row(entries: dict[int, float], least: float, most: float) -> None:
        rows.append(np.zeros(columns))
        for column, value in entries.items():
            rows[-1][column] += value
        low.append(least)
        high.append(most)

    count, holds, sends = (
        {pair: 1 + len(sizes) + kind * len(pairs) + i for i, pair in enumerate(pairs)} for kind in range(3)
    )
    row({1 + s: 1.0 for s in range(len(sizes))}, 1, 1)
    for s, size in enumerate(sizes):
        full, tail = divmod(total, size)
        row({1 + s: -full, **{count[s, n]: 1.0 for n in range(len(neighbours))}}, 0, 0)
        row({1 + s: -float(tail > 0), **{holds[s, n]: 1.0 for n in range(len(neighbours))}}, 0, 0)
        for n, of in enumerate(neighbours):
            each = size / of.bandwidth_bytes_per_s + of.shard_cost_s
            short = tail / of.bandwidth_bytes_per_s + of.shard_cost_s
            pair = s, n
            row({0: -1.0, sends[pair]: of.start_s, count[pair]: each, holds[pair]: short}, -math.inf, 0)
            row({count[pair]: 1.0, holds[pair]: 1.0, sends[pair]: -(full + 1)}, -math.inf, 0)
            if of.capacity_bytes is not None:
                row({count[pair]: size, holds[pair]: tail}, -math.inf, of.capacity_bytes)
    objective = np.zeros(columns)
    objective[0] = 1.0
    upper = [math.inf, *[1.0] * len(sizes), *[math.inf] * len(pairs), *[1.0] * (2 * len(pairs))]
    found = optimize.milp(
        objective,
        constraints=optimize.LinearConstraint(np.array(rows), low, high),
        integrality=[0.0] + [1.0] * (columns - 1),
        bounds=optimize.Bounds(0, upper),
        options={"mip_rel_gap": 0.0},
    )
    return float(found.fun) if found.success else math.inf


@settings(deadline=None, max_examples=40)
@given(small_cases(most_shards=30))
def test_optimal_by_an_integer_program_over_sizes_and_share_outs(case: tuple[int, int, list[Neighbour]]) -> None:
    total, shard, neighbours = case
    sizes = sorted({min(shard * factor, total) for factor in (1, 2, 4)})
    best = integer_program_s(total, sizes, neighbours)
    try:
        made = plan(total, neighbours, shard_sizes=sizes)
    except ShardingError:
        assert best == math.inf
        return
    assert made.predicted_s == pytest.approx(best, rel=1e-5)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40 * MIB), neighbour_lists())
def test_the_scan_is_as_good_as_the_best_size(total: int, neighbours: list[Neighbour]) -> None:
    made = plan(total, neighbours)
    single = {s: plan(total, neighbours, shard_sizes=[s]).predicted_s for s in chain(total)}
    assert made.shard_bytes in single
    assert made.predicted_s <= min(single.values()) * ROUNDING


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40 * MIB), neighbour_lists(), st.integers(0, 99), st.sampled_from([64 * KIB, MIB]))
def test_no_baseline_is_better(total: int, neighbours: list[Neighbour], seed: int, shard: int) -> None:
    baselines = [
        single_random(total, neighbours, seed),
        single_nearest(total, neighbours),
        round_robin(total, neighbours, shard),
        bisected(total, neighbours),
        equal_slices(total, neighbours),
    ]
    best = plan(total, neighbours).predicted_s
    for baseline in baselines:
        assert_covers(baseline.assignment, [(0, total)])
        assert baseline.predicted_s >= baseline.bound_s / ROUNDING
    assert all(best <= baseline.predicted_s * ROUNDING for baseline in baselines[:-1])
    # A slice has a size that is not in the chain.
    with_slices = plan(total, neighbours, shard_sizes=[*chain(total), baselines[-1].shard_bytes])
    assert with_slices.predicted_s <= baselines[-1].predicted_s * ROUNDING


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 40 * MIB), neighbour_lists(), neighbour_lists(max_size=1), st.data())
def test_more_neighbours_and_better_links_never_make_it_slower(
    total: int, neighbours: list[Neighbour], more: list[Neighbour], data: st.DataObject
) -> None:
    before = plan(total, neighbours).predicted_s
    another = replace(more[0], name="another")
    assert plan(total, [*neighbours, another]).predicted_s <= before * ROUNDING
    index = data.draw(st.integers(0, len(neighbours) - 1))
    old = neighbours[index]
    for better in (
        replace(old, bandwidth_bytes_per_s=old.bandwidth_bytes_per_s * data.draw(st.floats(1, 10))),
        replace(old, latency_s=old.latency_s * data.draw(st.floats(0, 1))),
        replace(old, shard_cost_s=old.shard_cost_s * data.draw(st.floats(0, 1))),
    ):
        improved = [*neighbours[:index], better, *neighbours[index + 1 :]]
        assert plan(total, improved).predicted_s <= before * ROUNDING


def test_a_replan_of_many_short_ranges_balances_them() -> None:
    remaining = [(i * 10, i * 10 + 1 + i % 3) for i in range(300)]
    neighbours = [Neighbour("fast", 3.0), Neighbour("slow", 1.0)]
    shards = replan(remaining, neighbours, shard_sizes=[100])
    nbytes = {name: sum(b - a for a, b in spans) for name, spans in shards.items()}
    assert nbytes == {"fast": 450, "slow": 150}


def test_what_each_baseline_does() -> None:
    near, wide, far = Neighbour("near", 1e6, 0.001), Neighbour("wide", 2e6, 0.001), Neighbour("far", 9e6, 0.01)
    everyone = [near, wide, far]
    assert single_nearest(900, everyone).sources() == {"wide": 900}
    assert {next(iter(single_random(9, everyone, seed).sources())) for seed in range(40)} == {"near", "wide", "far"}
    assert single_random(9, everyone, 3) == single_random(9, reversed(everyone), 3)
    assert equal_slices(901, everyone).sources() == {"far": 301, "near": 301, "wide": 299}
    assert round_robin(25, everyone, 10).assignment == {"far": ((0, 10),), "near": ((10, 20),), "wide": ((20, 25),)}
    # Both are idle, so the first shard goes to the one that needs 100 s for it.
    slow_first = [Neighbour("a", 1.0), Neighbour("b", 100.0)]
    assert bisected(100, slow_first, shard_sizes=[100]).predicted_s == 100.0
    assert plan(100, slow_first, shard_sizes=[100]).predicted_s == 1.0
    # After the first shard a is done at 1 s, before b could begin.
    assert bisected(20, [Neighbour("a", 10.0), Neighbour("b", 5.0, 1.5)], shard_sizes=[10]).sources() == {"a": 20}


def test_baselines_pass_over_or_refuse_what_capacities_forbid() -> None:
    tight = [Neighbour("a", 1.0, capacity_bytes=10), Neighbour("b", 1.0, 1.0)]
    assert single_nearest(30, tight).sources() == single_random(30, tight, 0).sources() == {"b": 30}
    assert round_robin(30, tight, 5).sources() == bisected(30, tight, shard_sizes=[5]).sources() == {"a": 10, "b": 20}
    with pytest.raises(ShardingError, match="slice"):
        equal_slices(30, tight)
    for made in (
        lambda: single_nearest(30, tight[:1]),
        lambda: single_random(30, tight[:1], 0),
        lambda: round_robin(30, tight[:1], 5),
        lambda: bisected(30, tight[:1], shard_sizes=[5]),
        lambda: equal_slices(30, []),
        lambda: round_robin(30, [], 5),
    ):
        with pytest.raises(ShardingError):
            made()


def test_baselines_have_nothing_to_do_for_no_bytes() -> None:
    one = [Neighbour("a", 1.0)]
    made: list[Plan] = [single_nearest(0, one), single_random(0, one, 0), equal_slices(0, one), bisected(0, one)]
    assert all((p.assignment, p.predicted_s) == ({}, 0.0) for p in [*made, round_robin(0, one, 5)])
