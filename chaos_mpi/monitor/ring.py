"""The order of the members in a ring allreduce: no neighbours that cannot reach each other, and no slow links.

All steps of a ring allreduce wait for its slowest link, so the time is set by the worst link in it: the order found has
the fewest cut links, then the least cost of its worst link, then the least sum of costs. (Finding it is the
bottleneck travelling salesman problem, which is NP-hard.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from chaos_mpi.monitor.cluster import Node
from chaos_mpi.monitor.reachability import Pair, pair

#: Up to so many members the best order is found, beyond it a good one.
EXACT_NODES = 9
#: Rounds of improvement of a long ring, at most.
_ROUNDS = 12

#: Cost of each link by the places of its ends; infinite for one that is cut.
Costs = Sequence[Sequence[float]]
#: Cut links, worst cost, sum of costs: smaller is better.
Score = tuple[int, float, float]
#: A path from the first member, with its score.
Way = tuple[Score, tuple[int, ...]]


def link_costs(
    members: Sequence[Node],
    nbytes: int,
    bytes_per_s: Mapping[Pair, float],
    rtt_s: Mapping[Pair, float],
    cut: Collection[Pair],
) -> list[list[float]]:
    """Seconds that each link takes for a message of ``nbytes``; infinite for one that is cut.

    A link of which nothing is known counts as one of the middle among those that are known.
    """
    usual_rate = _middle(bytes_per_s.values(), 1e9)
    usual_rtt_s = _middle(rtt_s.values(), 0.0)

    def cost(one: Node, other: Node) -> float:
        ends = pair(one, other)
        if ends in cut:
            return math.inf
        return rtt_s.get(ends, usual_rtt_s) / 2 + nbytes / bytes_per_s.get(ends, usual_rate)

    return [[0.0 if one == other else cost(one, other) for other in members] for one in members]


def ring_order(costs: Costs) -> list[int]:
    """The places of the members in the order of the ring; the first stays first. The same for the same costs.

    Args:
        costs: of every link, symmetric.
    """
    count = len(costs)
    if count <= 3:
        return list(range(count))
    return _best(costs) if count <= EXACT_NODES else _good(costs)


def score(costs: Costs, order: Sequence[int]) -> Score:
    """How good an order is."""
    links = [costs[a][b] for a, b in zip(order, (*order[1:], order[0]), strict=True)]
    whole = [cost for cost in links if cost != math.inf]
    return len(links) - len(whole), max(whole, default=0.0), math.fsum(whole)


def _best(costs: Costs) -> list[int]:
    """Dynamic programming over sets (Held and Karp, 1962): the best ways from 0 through a set to its last member.

    A way can be dropped if another has fewer cut links, or as few, and neither a worse link nor a greater sum.
    """
    count = len(costs)
    ways: dict[tuple[int, int], list[Way]] = {}
    for end in range(1, count):
        ways[1 << end, end] = [(_longer((0, 0.0, 0.0), costs[0][end]), (0, end))]
    for size in range(2, count):
        for chosen in itertools.combinations(range(1, count), size):
            mask = sum(1 << node for node in chosen)
            for end in chosen:
                ways[mask, end] = _undominated(
                    (_longer(so_far, costs[before][end]), (*path, end))
                    for before in chosen
                    if before != end
                    for so_far, path in ways[mask ^ (1 << end), before]
                )
    everybody = (1 << count) - 2
    rings = [(_longer(so_far, costs[end][0]), path) for end in range(1, count) for so_far, path in ways[everybody, end]]
    return list(min(rings)[1])


def _longer(so_far: Score, cost: float) -> Score:
    cuts, worst, total = so_far
    return (cuts + 1, worst, total) if cost == math.inf else (cuts, max(worst, cost), total + cost)


def _undominated(ways: Iterable[Way]) -> list[Way]:
    """Those with the fewest cut links, and of them all that are not beaten in both worst and sum."""
    kept: list[Way] = []
    for way in sorted(ways):
        if not kept or (way[0][0] == kept[0][0][0] and way[0][2] < kept[-1][0][2]):
            kept.append(way)
    return kept


def _good(costs: Costs) -> list[int]:
    """The nearest neighbour from 0 on, then 2-opt and moves of single members."""
    count = len(costs)
    order, left = [0], set(range(1, count))
    while left:
        here = costs[order[-1]]
        order.append(min(left, key=lambda node: (here[node], node)))
        left.remove(order[-1])
    finite = [cost for row in costs for cost in row if cost != math.inf]
    # The worst link counts most: high powers make the sum follow the greatest, and a cut one outweighs all others.
    highest = max(finite, default=0.0) or 1.0
    weights = [
        [1e9 if cost == math.inf else (cost / highest) ** 4 + 1e-6 * cost / highest for cost in row] for row in costs
    ]
    for _ in range(_ROUNDS):
        if not (_reversals(weights, order) | _moves(weights, order)):
            break
    return order


def _reversals(weights: Costs, order: list[int]) -> bool:
    """2-opt (Croes, 1958): turn a stretch round wherever that helps."""
    count, better = len(order), False
    for i in range(count - 2):
        a = order[i]
        for j in range(i + 2, count - (i == 0)):
            b, c, d = order[i + 1], order[j], order[(j + 1) % count]
            if weights[a][c] + weights[b][d] < (weights[a][b] + weights[c][d]) * (1 - 1e-12):
                order[i + 1 : j + 1] = order[j:i:-1]
                better = True
    return better


def _moves(weights: Costs, order: list[int]) -> bool:
    """Put a member elsewhere wherever that helps."""
    count, better = len(order), False
    for node in order[1:]:
        at = order.index(node)
        before, after = order[at - 1], order[(at + 1) % count]
        gain = weights[before][node] + weights[node][after] - weights[before][after]
        row = weights[node]
        rest = order[:at] + order[at + 1 :]
        extra, place = min(
            (row[a] + row[b] - weights[a][b], i + 1)
            for i, (a, b) in enumerate(zip(rest, (*rest[1:], rest[0]), strict=True))
        )
        if extra < gain - 1e-12 * abs(gain):
            rest.insert(place, node)
            order[:] = rest
            better = True
    return better


def _middle(values: Collection[float], default: float) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else default
