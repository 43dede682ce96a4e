"""What to do about a pair of nodes that cannot reach each other: a detour, else one of them has to go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from chaos_mpi.monitor.cluster import Node
from chaos_mpi.monitor.reachability import Pair, pair

#: Up to so many nodes with cut links the best set to keep is searched for, beyond it is approximated.
_EXACT_NODES = 24


def detour(
    one: Node, other: Node, nodes: Iterable[Node], cut: Collection[Pair], bytes_per_s: Mapping[Pair, float]
) -> Node | None:
    """A third node that hears both, the one with the fastest slower half; None if there is none.

    Args:
        one: one end of the link that is down.
        other: the other end.
        nodes: all that are alive.
        cut: pairs that cannot reach each other.
        bytes_per_s: bandwidths of links; one that is not known counts as slowest.
    """

    def slower_half(via: Node) -> float:
        return min(bytes_per_s.get(pair(one, via), 0.0), bytes_per_s.get(pair(via, other), 0.0))

    able = [
        via
        for via in sorted(nodes)
        if via not in (one, other) and pair(one, via) not in cut and pair(via, other) not in cut
    ]
    return max(able, key=slower_half, default=None)


def mutually_reachable(nodes: Iterable[Node], cut: Iterable[Pair], witness: Node | None = None) -> frozenset[Node]:
    """The largest part of the nodes in which all reach each other; of equal ones, that which loses later ids.

    With more than 24 nodes on cut links it need not be the largest: those with the most cut links go first.

    Args:
        nodes: to choose from.
        cut: pairs that cannot reach each other.
        witness: a node that counts only between parts that are equal otherwise; it goes rather than any other.
    """
    everybody = frozenset(nodes)
    edges = sorted({pair(*ends) for ends in cut if everybody.issuperset(ends)})
    at_witness = {node for edge in edges if witness in edge for node in edge if node != witness}
    if witness is None or not at_witness:
        return everybody - _cover(edges)
    without = _cover([edge for edge in edges if witness not in edge])
    with_it = _cover([edge for edge in edges if not at_witness.intersection(edge)]) | at_witness
    return everybody - (with_it if len(with_it) <= len(without) else without | {witness})


def _cover(edges: list[Pair]) -> frozenset[Node]:
    """Few nodes that touch every edge."""
    few = len({node for edge in edges for node in edge}) <= _EXACT_NODES
    return _least_cover(edges) if few else _greedy_cover(edges)


def _least_cover(edges: list[Pair]) -> frozenset[Node]:
    """The fewest nodes that touch every edge; of equally few, the highest ids, compared from the highest down."""
    if not edges:
        return frozenset()
    degree = Counter(node for edge in edges for node in edge)
    if max(degree.values()) == 1:
        return frozenset(later for _, later in edges)
    # A node on several edges is in the cover, or else all its neighbours are.
    hub = max(degree, key=lambda node: (degree[node], node))
    neighbours = frozenset(node for edge in edges if hub in edge for node in edge if node != hub)
    with_hub = _least_cover([edge for edge in edges if hub not in edge]) | {hub}
    if len(with_hub) < len(neighbours):
        return with_hub
    without = _least_cover([edge for edge in edges if not neighbours.intersection(edge)]) | neighbours
    return min(with_hub, without, key=_order)


def _order(cover: frozenset[Node]) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
    highest_first = sorted(cover, reverse=True)
    return len(cover), [((*(-ord(c) for c in node.name), 1), -node.incarnation) for node in highest_first]


def _greedy_cover(edges: list[Pair]) -> frozenset[Node]:
    cover: set[Node] = set()
    while left := [edge for edge in edges if not cover.intersection(edge)]:
        degree = Counter(node for edge in left for node in edge)
        cover.add(max(degree, key=lambda node: (degree[node], node)))
    return frozenset(cover)
