"""Sharing out bytes that not every neighbour has."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.sharding import Neighbour, ShardingError, fluid_bound_s, plan
from chaos_mpi.sharding.held import share_held, widened
from chaos_mpi.sharding.plan import joined, size

rates = st.lists(st.floats(1.0, 100.0), min_size=1, max_size=6)


def named(bandwidths: list[float], ready: list[float] | None = None) -> list[Neighbour]:
    return [Neighbour(f"n{i}", rate * 1e6, ready_s=ready[i] if ready else 0.0) for i, rate in enumerate(bandwidths)]


def seconds(dealt: dict[str, list[tuple[int, int]]], neighbours: list[Neighbour]) -> float:
    return max(n.finish_s(size(dealt[n.name]), 0) for n in neighbours if n.name in dealt)


@given(assumed=rates, margin=st.floats(0, 1), total=st.integers(1, 10**9))
def test_everybody_holds_its_share_and_a_margin_of_the_adjacent_ones(
    assumed: list[float], margin: float, total: int
) -> None:
    assignment = plan(total, named(assumed)).assignment
    held = widened(assignment, margin)
    assert set(held) == set(assignment)
    for name, ((start, stop),) in assignment.items():
        assert 0 <= held[name][0] <= start
        assert stop <= held[name][1] <= total
    assert sum(stop - start for start, stop in held.values()) <= total * (1 + 2 * margin)


def test_a_share_in_two_ranges_cannot_be_widened() -> None:
    with pytest.raises(ValueError, match="one range"):
        widened({"a": [(0, 1), (2, 3)]})


@given(data=st.data(), assumed=rates, total=st.integers(10**6, 10**9))
def test_everything_is_dealt_once_to_somebody_that_holds_it(
    data: st.DataObject, assumed: list[float], total: int
) -> None:
    held = widened(plan(total, named(assumed)).assignment)
    real = data.draw(st.lists(st.floats(1.0, 100.0), min_size=len(assumed), max_size=len(assumed)))
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=2, max_size=8, unique=True)))
    remaining = [span for i, span in enumerate(itertools.pairwise(cuts)) if i % 2 == 0]
    dealt = share_held(remaining, [n for n in named(real) if n.name in held], held)
    assert joined(span for spans in dealt.values() for span in spans) == joined(remaining)
    for name, spans in dealt.items():
        assert all(held[name][0] <= start and stop <= held[name][1] for start, stop in spans)


@given(data=st.data(), assumed=st.lists(st.floats(1.0, 100.0), min_size=2, max_size=4))
def test_no_other_borders_are_faster(data: st.DataObject, assumed: list[float]) -> None:
    """With margins that do not meet, a share-out is given by its borders: all are tried, on a grid."""
    total = 10**8
    assignment = plan(total, named(assumed)).assignment
    held = widened(assignment)
    n = len(assumed)
    neighbours = [
        neighbour
        for neighbour in named(
            data.draw(st.lists(st.floats(1.0, 100.0), min_size=n, max_size=n)),
            data.draw(st.lists(st.floats(0.0, 1.0), min_size=n, max_size=n)),
        )
        if neighbour.name in held
    ]
    got = seconds(share_held([(0, total)], neighbours, held), neighbours)
    order = sorted(assignment, key=lambda name: assignment[name])
    by_name = {neighbour.name: neighbour for neighbour in neighbours}
    grids = [
        [held[after][0] + (held[before][1] - held[after][0]) * k // 12 for k in range(13)]
        for before, after in itertools.pairwise(order)
    ]
    best = min(
        max(
            by_name[name].finish_s(stop - start, 0)
            for name, (start, stop) in zip(order, itertools.pairwise([0, *borders, total]), strict=True)
            if stop > start
        )
        for borders in itertools.product(*grids)
    )
    assert got <= best * (1 + 1e-4)


@given(assumed=rates, factors=st.lists(st.floats(0.6, 1.0), min_size=6, max_size=6))
def test_what_is_shared_out_anew_is_no_later_than_as_planned_and_no_earlier_than_the_bound(
    assumed: list[float], factors: list[float]
) -> None:
    total = 10**9
    held = widened(plan(total, named([10.0] * len(assumed))).assignment)
    neighbours = named([10.0 * factor for factor in factors[: len(assumed)]])
    got = seconds(share_held([(0, total)], neighbours, held), neighbours)
    one_side = 10.0 * 1e6 * len(assumed)
    assert fluid_bound_s(total, neighbours) <= got * (1 + 1e-6)
    assert got <= total / one_side / min(factors[: len(assumed)]) * (1 + 1e-3)


def test_bytes_that_nobody_holds_are_an_error() -> None:
    neighbours = named([1.0, 1.0])
    with pytest.raises(ShardingError, match="nobody holds the bytes 50 to 60"):
        share_held([(0, 100)], neighbours, {"n0": (0, 50), "n1": (60, 100)})
    assert share_held([], neighbours, {"n0": (0, 50), "n1": (60, 100)}) == {}
