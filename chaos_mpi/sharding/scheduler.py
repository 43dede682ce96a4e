"""The best schedule: how many shards each neighbour sends, and of which size.

At one shard size, giving the next shard to the neighbour that would *finish* it first is optimal, since the shards are
all alike: the times at which a neighbour could finish its first, second, ... shard are fixed, and the greedy
takes the K earliest of all. The short shard at the end comes last and goes the same way. That is optimal too: by a time
T that suffices for the K full shards and not for one more, exactly the counts of the greedy are possible, so the
short one has to go on top of them; and if T suffices for one more, then also for the short one in its place.

The K earliest need no loop over K. If the full shards were a fluid, they would be done at T0, no later than the real
ones. So every shard that a neighbour can finish by T0 is among the K earliest, and all but about two for each
neighbour are known at once.

With a cost for each shard, the makespan over the sizes has several valleys, so all sizes are looked at, those with
the earliest T0 first, until T0 is later than the best makespan so far.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chaos_mpi.sharding.cost import Neighbour, ShardingError, by_name, check_downlink, fluid_time_s
from chaos_mpi.sharding.plan import Cut, Plan, Range, chain, joined, size

#: T0 is rounded; a size is given up only when it is clearly later.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class _Share:
    """Full shards of each neighbour, who holds the short shard of which range, and when all have arrived."""

    counts: list[int]
    holders: dict[int, int]
    makespan_s: float


def plan(
    total_bytes: int,
    neighbours: Iterable[Neighbour],
    *,
    shard_sizes: Iterable[int] | None = None,
    downlink_bytes_per_s: float | None = None,
) -> Plan:
    """The plan with the least makespan for pulling bytes 0 to ``total_bytes``.

    Each neighbour gets one contiguous range at most. Of equally fast plans the one with the larger shards is taken,
    and neighbours with the earlier name come first.

    A downlink changes neither the size nor the split, only the prediction and the bound: links that are balanced
    without it keep it busy until nearly the end. So with a downlink that is the limit the plan is not always the
    best one.

    Args:
        total_bytes: size of the training state; zero gives an empty plan.
        neighbours: who can send.
        shard_sizes: sizes to try; by default powers of two from 64 KiB to 64 MiB, and everything as one shard
            where that is at most 1 GiB.
        downlink_bytes_per_s: the most that the newcomer can receive; None where it is not the limit.

    Raises:
        ShardingError: there is no neighbour, or their capacities are too small.
        ValueError: an argument makes no sense.
    """
    if total_bytes < 0:
        raise ValueError(f"total_bytes is {total_bytes} and cannot be negative")
    check_downlink(downlink_bytes_per_s)
    return _best(joined([(0, total_bytes)]), by_name(neighbours), shard_sizes, downlink_bytes_per_s)


def replan(
    remaining: Sequence[Range], neighbours: Iterable[Neighbour], *, shard_sizes: Iterable[int] | None = None
) -> dict[str, list[Range]]:
    """Schedule again what has not been received: single shards for each neighbour that is to send any, by name.

    Adjacent ranges are joined first, then cut into shards from the first byte of each. With several ranges there
    may be several short shards; the longest is placed first, which is near the optimum but need not be it.

    Args:
        remaining: disjoint byte ranges in any order.
        neighbours: those left, with what is now known of their bandwidth; ``ready_s`` covers what they still send.
        shard_sizes: as for :func:`plan`, with the longest range in place of everything.

    Raises:
        ShardingError: there is no neighbour, or their capacities are too small.
        ValueError: ranges overlap, or an argument makes no sense.
    """
    return _best(joined(remaining), by_name(neighbours), shard_sizes, None).shards()


def _best(
    ranges: tuple[Range, ...],
    neighbours: list[Neighbour],
    shard_sizes: Iterable[int] | None,
    downlink_bytes_per_s: float | None,
) -> Plan:
    if not ranges:
        return Plan.of({}, 0, neighbours, downlink_bytes_per_s)
    if not neighbours:
        raise ShardingError(f"{size(ranges)} bytes are to be sent, and there is no neighbour to send them")
    cuts = [Cut(ranges, s) for s in chain(max(stop - start for start, stop in ranges), shard_sizes)]
    candidates = sorted(((_fluid_s(cut, neighbours), -cut.shard_bytes, cut) for cut in cuts), key=lambda c: c[:2])
    best: tuple[float, int, Cut, _Share] | None = None
    for fluid_s, _, cut in candidates:
        if fluid_s == math.inf or (best is not None and fluid_s > best[0] * (1.0 + _ROUNDING)):
            break
        share = _share(cut, neighbours, fluid_s)
        if share is not None and (best is None or (share.makespan_s, -cut.shard_bytes) < best[:2]):
            best = (share.makespan_s, -cut.shard_bytes, cut, share)
    if best is None:
        capacity = sum(n.capacity_bytes or 0 for n in neighbours)
        raise ShardingError(
            f"{size(ranges)} bytes do not fit into the capacities of {len(neighbours)} neighbours, {capacity} bytes, "
            f"in whole shards of {cuts[0].shard_bytes} bytes or more"
        )
    _, _, cut, share = best
    dealt = cut.deal([n.name for n in neighbours], share.counts, share.holders)
    return Plan.of(dealt, cut.shard_bytes, neighbours, downlink_bytes_per_s)


def _fluid_s(cut: Cut, neighbours: Sequence[Neighbour]) -> float:
    """When all full shards could have arrived if they were a fluid; infinite when they do not fit."""
    limits = [math.inf if n.capacity_bytes is None else n.capacity_bytes // cut.shard_bytes for n in neighbours]
    rates = [1.0 / _shard_s(n, cut.shard_bytes) for n in neighbours]
    return fluid_time_s(cut.full, [n.start_s for n in neighbours], rates, limits)


def _share(cut: Cut, neighbours: Sequence[Neighbour], fluid_s: float) -> _Share | None:
    """The share-out with the least makespan, from when a fluid would be done; None when it does not fit."""
    s = cut.shard_bytes
    # One less than finished by then, so that rounding gives nobody a shard too many.
    counts = [
        max(0, math.floor((fluid_s - n.start_s) / _shard_s(n, s)) - 1) if fluid_s > n.start_s else 0 for n in neighbours
    ]
    counts = [c if n.fits(c * s) else (n.capacity_bytes or 0) // s for c, n in zip(counts, neighbours, strict=True)]
    if sum(counts) > cut.full:  # times so far apart that floats cannot tell shards apart
        counts = [0] * len(neighbours)
    finishing = [(n.finish_s((c + 1) * s, c + 1), i) for i, (c, n) in enumerate(zip(counts, neighbours, strict=True))
                 if n.fits((c + 1) * s)]  # fmt: skip
    heapq.heapify(finishing)
    for _ in range(cut.full - sum(counts)):
        _, i = finishing[0]
        counts[i] += 1
        n, k = neighbours[i], counts[i] + 1
        if n.fits(k * s):
            heapq.heapreplace(finishing, (n.finish_s(k * s, k), i))
        else:
            heapq.heappop(finishing)
    nbytes, shards = [c * s for c in counts], list(counts)
    holders: dict[int, int] = {}
    for index, tail in sorted(cut.tails.items(), key=lambda item: (-item[1], item[0])):
        able = [i for i, n in enumerate(neighbours) if n.fits(nbytes[i] + tail)]
        if not able:
            return None
        holder = min(able, key=lambda i: neighbours[i].finish_s(nbytes[i] + tail, shards[i] + 1))
        nbytes[holder] += tail
        shards[holder] += 1
        holders[index] = holder
    makespan = max(n.finish_s(b, k) for n, b, k in zip(neighbours, nbytes, shards, strict=True) if k)
    return _Share(counts, holders, makespan)


def _shard_s(neighbour: Neighbour, shard_bytes: int) -> float:
    return shard_bytes / neighbour.bandwidth_bytes_per_s + neighbour.shard_cost_s
