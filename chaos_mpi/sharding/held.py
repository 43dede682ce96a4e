"""Sharing out bytes that not every neighbour has.

A member that trains on has a copy only of the part of the state that it is planned to send, and of a *margin* of what
the members before and after it are. So shares can be corrected while they are sent: the border between two moves
within their margins.

Each neighbour holds one interval. Whether all can be sent by a time T is then decided by going through the bytes in
order and always giving them to the neighbour, among those that hold them and have time left, whose interval ends first:
what it does not send now it may never be able to (Glover, *Maximum matching in a convex bipartite graph*, 1967).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from chaos_mpi.sharding.cost import Neighbour, ShardingError, by_name
from chaos_mpi.sharding.plan import Range, joined, size

#: The part of its neighbour's share that a member has a copy of, on either side: links may be half as fast as they
#: seemed.
MARGIN = 0.25
#: Halvings of the time that is searched for; what is left of it is less than a millionth.
_HALVINGS = 24


def widened(assignment: Mapping[str, Sequence[Range]], margin: float = MARGIN) -> dict[str, Range]:
    """What each sender of a plan is to hold: its range, and a margin of those before and after it.

    Args:
        assignment: one range for each, as :func:`~chaos_mpi.sharding.plan` gives them; together without a gap.
        margin: part of the adjacent range that is held, too, 0 to 1.

    Raises:
        ValueError: a sender has several ranges.
    """
    if any(len(ranges) != 1 for ranges in assignment.values()):
        raise ValueError(f"each sender is to have one range: {dict(assignment)}")
    ordered = sorted((ranges[0], name) for name, ranges in assignment.items())
    spans = [span for span, _ in ordered]
    held = {}
    for i, ((start, stop), name) in enumerate(ordered):
        before, after = spans[i - 1] if i else (start, start), spans[i + 1] if i + 1 < len(spans) else (stop, stop)
        held[name] = (start - int(margin * (before[1] - before[0])), stop + int(margin * (after[1] - after[0])))
    return held


def share_held(
    remaining: Iterable[Range], neighbours: Iterable[Neighbour], held: Mapping[str, Range]
) -> dict[str, list[Range]]:
    """Share out ranges so that the last byte comes as early as it can, if shards cost nothing.

    Each gets its ranges in the order in which they are to be asked for: those that nobody else holds come first, so
    that the others can still be given to somebody else for as long as possible.

    Args:
        remaining: disjoint byte ranges in any order.
        neighbours: those left; ``ready_s`` covers what they still send.
        held: the bytes that each has, by name.

    Raises:
        ShardingError: some bytes are held by nobody.
    """
    runs = joined(remaining)
    ordered = sorted(by_name(neighbours), key=lambda n: (held[n.name][1], n.name))
    pieces = _pieces(runs, [held[n.name] for n in ordered])
    holders = [[n for n in ordered if held[n.name][0] <= start and stop <= held[n.name][1]] for start, stop in pieces]
    if orphans := [piece for piece, able in zip(pieces, holders, strict=True) if not able]:
        raise ShardingError(f"nobody holds the bytes {orphans[0][0]} to {orphans[0][1]}")
    if not pieces:
        return {}
    low = 0.0
    high = max(n.start_s for n in ordered) + size(pieces) / min(n.bandwidth_bytes_per_s for n in ordered)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _deal(pieces, holders, middle, whole=False) is None:
            low = middle
        else:
            high = middle
    dealt = _deal(pieces, holders, high, whole=True)
    assert dealt is not None
    alone = {span for span, able in zip(pieces, holders, strict=True) if len(able) == 1}
    return {
        name: [*joined(s for s in spans if s in alone), *joined(s for s in spans if s not in alone)]
        for name, spans in dealt.items()
    }


def _pieces(runs: Sequence[Range], held: Sequence[Range]) -> list[Range]:
    """The runs, cut where somebody's interval begins or ends."""
    cuts = sorted({edge for span in held for edge in span})
    found = []
    for start, stop in runs:
        edges = [start, *(cut for cut in cuts if start < cut < stop), stop]
        found += list(itertools.pairwise(edges))
    return found


def _deal(
    pieces: Sequence[Range], holders: Sequence[Sequence[Neighbour]], limit_s: float, *, whole: bool
) -> dict[str, list[Range]] | None:
    """Who sends what if all have until ``limit_s``; None if that is too early. With ``whole``, the last one that holds
    a piece takes what is left of it whatever the time: a few bytes, by rounding."""
    left: dict[str, float] = {}
    dealt: dict[str, list[Range]] = {}
    for (start, stop), able in zip(pieces, holders, strict=True):
        at = start
        for n in able:
            room = left.setdefault(n.name, max(0.0, limit_s - n.start_s) * n.bandwidth_bytes_per_s)
            last = whole and n is able[-1]
            take = stop - at if last else min(stop - at, int(room))
            left[n.name] = room - take
            if take:
                dealt.setdefault(n.name, []).append((at, at + take))
                at += take
        if at < stop:
            return None
    return dealt
