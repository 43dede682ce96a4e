"""The ring avoids what is cut and what is slow."""

from __future__ import annotations

import itertools
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.monitor.cluster import Node
from chaos_mpi.monitor.ring import link_costs, ring_order, score


def costs_of(count: int, values: list[float]) -> list[list[float]]:
    table = [[0.0] * count for _ in range(count)]
    for (a, b), value in zip(itertools.combinations(range(count), 2), itertools.cycle(values), strict=False):
        table[a][b] = table[b][a] = value
    return table


def random_costs(count: int, rng: random.Random, cut: float) -> list[list[float]]:
    links = count * (count - 1) // 2
    return costs_of(count, [math.inf if rng.random() < cut else float(rng.randint(1, 9)) for _ in range(links)])


costs = st.integers(1, 7).flatmap(
    lambda n: st.lists(
        st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0, math.inf]), min_size=max(1, n * (n - 1) // 2), max_size=21
    ).map(lambda values: costs_of(n, values))
)


@given(costs)
@settings(max_examples=60, deadline=None)
def test_no_other_order_of_a_small_ring_is_better(table: list[list[float]]) -> None:
    order = ring_order(table)
    assert order[0] == 0
    assert sorted(order) == list(range(len(table)))
    assert score(table, order) == min(score(table, (0, *rest)) for rest in itertools.permutations(range(1, len(table))))


@given(st.integers(10, 30), st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_a_long_ring_avoids_cut_links_where_few_are_cut(count: int, seed: int) -> None:
    table = random_costs(count, random.Random(seed), cut=0.1)
    order = ring_order(table)
    assert order[0] == 0
    assert sorted(order) == list(range(count))
    assert ring_order(table) == order
    assert score(table, order)[0] == 0
    assert score(table, order) <= score(table, range(count))


def test_a_long_ring_of_two_islands_crosses_between_them_twice() -> None:
    # Even and odd members are on two switches with a thin link between them.
    table = [[0.0 if a == b else 1.0 if a % 2 == b % 2 else 50.0 for b in range(40)] for a in range(40)]
    order = ring_order(table)
    assert sum(a % 2 != b % 2 for a, b in itertools.pairwise([*order, 0])) == 2


def test_a_slow_link_is_no_neighbour() -> None:
    a, b, c, d = nodes = [Node(name) for name in "abcd"]
    table = link_costs(nodes, 1_000_000, {(a, b): 1e6, (a, c): 1e9}, {(c, d): 0.001}, {(b, d)})
    assert table[0][1] == 1.0005  # half the usual round trip, and a second for the bytes
    assert table[1][3] == table[3][1] == math.inf
    assert score(table, ring_order(table))[0] == 0
    order = ring_order(link_costs(nodes, 1_000_000, {(a, b): 1e6, (a, c): 1e9}, {}, set()))
    assert order in ([0, 2, 1, 3], [0, 3, 1, 2])
