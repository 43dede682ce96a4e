"""How other systems share out the state, as plans under the same cost model. For comparison only.

======================= ====================================================================================
:func:`single_random`   EDL: one worker, chosen at random, sends everything
:func:`single_nearest`  Elan: the nearest replica sends everything
:func:`equal_slices`    Autoscaling (Or et al.): an all-gather, each worker sends the same share
:func:`round_robin`     shards in turn, whatever the links
:func:`bisected`        Chaos v1: bisection on the shard size, the next shard to who is least loaded
======================= ====================================================================================

All raise :class:`~chaos_mpi.sharding.ShardingError` when there is no neighbour or the capacities are too small for
their way to do it, and take neighbours and ``downlink_bytes_per_s`` as :func:`~chaos_mpi.sharding.plan` does.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterable, Sequence

from chaos_mpi.sharding.cost import Neighbour, ShardingError, by_name
from chaos_mpi.sharding.plan import Cut, Plan, Range, chain, joined, size


def single_random(
    total_bytes: int, neighbours: Iterable[Neighbour], seed: int, *, downlink_bytes_per_s: float | None = None
) -> Plan:
    """One neighbour, chosen at random among those that can, sends everything as one shard."""
    ordered = by_name(neighbours)
    chosen = random.Random(seed).choice(_able(total_bytes, ordered))  # noqa: S311  # the same one at every member
    return Plan.of({chosen.name: [(0, total_bytes)]}, total_bytes, ordered, downlink_bytes_per_s)


def single_nearest(
    total_bytes: int, neighbours: Iterable[Neighbour], *, downlink_bytes_per_s: float | None = None
) -> Plan:
    """The neighbour with the least latency (then the highest bandwidth) sends everything as one shard."""
    ordered = by_name(neighbours)
    chosen = min(_able(total_bytes, ordered), key=lambda n: (n.latency_s, -n.bandwidth_bytes_per_s))
    return Plan.of({chosen.name: [(0, total_bytes)]}, total_bytes, ordered, downlink_bytes_per_s)


def equal_slices(
    total_bytes: int, neighbours: Iterable[Neighbour], *, downlink_bytes_per_s: float | None = None
) -> Plan:
    """Each of N neighbours sends one shard of a N-th of the bytes, rounded up, the last one what is left."""
    ordered = by_name(neighbours)
    if total_bytes and not ordered:
        raise ShardingError(f"{total_bytes} bytes are to be sent, and there is no neighbour to send them")
    slice_bytes = -(-total_bytes // max(len(ordered), 1))
    starts = [min(i * slice_bytes, total_bytes) for i in range(len(ordered) + 1)]
    slices = {n.name: [span] for n, span in zip(ordered, itertools.pairwise(starts), strict=True)}
    for n in ordered:
        if not n.fits(size(slices[n.name])):
            raise ShardingError(f"neighbour {n.name} cannot send its slice: its capacity is {n.capacity_bytes} bytes")
    return Plan.of(slices, slice_bytes, ordered, downlink_bytes_per_s)


def round_robin(
    total_bytes: int, neighbours: Iterable[Neighbour], shard_bytes: int, *, downlink_bytes_per_s: float | None = None
) -> Plan:
    """Shards in turn, the first to the first by name; those that can send no more are passed over."""
    ordered = by_name(neighbours)
    dealt: dict[str, list[Range]] = {n.name: [] for n in ordered}
    nbytes = {n.name: 0 for n in ordered}
    turns = itertools.cycle(ordered)
    for at in range(0, total_bytes, shard_bytes):
        shard = (at, min(at + shard_bytes, total_bytes))
        length = shard[1] - shard[0]
        taker = next((n for n in itertools.islice(turns, len(ordered)) if n.fits(nbytes[n.name] + length)), None)
        if taker is None:
            raise ShardingError(f"no neighbour can send the shard at byte {at} of {total_bytes}")
        dealt[taker.name].append(shard)
        nbytes[taker.name] += length
    return Plan.of(dealt, shard_bytes, ordered, downlink_bytes_per_s)


def bisected(
    total_bytes: int,
    neighbours: Iterable[Neighbour],
    *,
    shard_sizes: Iterable[int] | None = None,
    downlink_bytes_per_s: float | None = None,
) -> Plan:
    """Bisection on the shard size, as if the makespan had one valley; shards go to the neighbour with the least load.

    The load of a neighbour is the time when it will be done with what it has, and does not count the shard that
    is to be given. O(K log N log S) for K shards, N neighbours and S sizes.
    """
    ordered = by_name(neighbours)
    if total_bytes == 0:
        return Plan.of({}, 0, ordered, downlink_bytes_per_s)
    sizes = chain(total_bytes, shard_sizes)
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        here, above = (_least_loaded(total_bytes, s, ordered, None) for s in sizes[middle : middle + 2])
        if here.predicted_s < above.predicted_s:
            high = middle
        else:
            low = middle + 1
    return _least_loaded(total_bytes, sizes[low], ordered, downlink_bytes_per_s)


def _least_loaded(
    total_bytes: int, shard_bytes: int, neighbours: Sequence[Neighbour], downlink_bytes_per_s: float | None
) -> Plan:
    cut = Cut(joined([(0, total_bytes)]), shard_bytes)
    counts, holders = [0] * len(neighbours), {}
    loads = [(n.start_s, i) for i, n in enumerate(neighbours)]
    heapq.heapify(loads)
    for length in [shard_bytes] * cut.full + list(cut.tails.values()):
        while loads and not neighbours[loads[0][1]].fits(counts[loads[0][1]] * shard_bytes + length):
            heapq.heappop(loads)
        if not loads:
            raise ShardingError(f"{total_bytes} bytes do not fit into the capacities in shards of {shard_bytes} bytes")
        i = loads[0][1]
        if length < shard_bytes:
            holders[0] = i
            break
        counts[i] += 1
        heapq.heapreplace(loads, (neighbours[i].finish_s(counts[i] * shard_bytes, counts[i]), i))
    dealt = cut.deal([n.name for n in neighbours], counts, holders)
    return Plan.of(dealt, shard_bytes, neighbours, downlink_bytes_per_s)


def _able(total_bytes: int, neighbours: Sequence[Neighbour]) -> list[Neighbour]:
    able = [n for n in neighbours if n.fits(total_bytes)]
    if not able:
        raise ShardingError(f"none of {len(neighbours)} neighbours can send all {total_bytes} bytes")
    return able
