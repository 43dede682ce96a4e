"""What a plan is: byte ranges cut into shards, the shards given to neighbours, and when they will have arrived."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from chaos_mpi.sharding.cost import Neighbour, check_downlink, fluid_bound_s, shared_finish_s

#: First byte and the one after the last.
Range = tuple[int, int]

#: Sizes tried by default, each dividing the next: powers of two.
SMALLEST_SHARD_BYTES = 64 << 10
LARGEST_SHARD_BYTES = 64 << 20
#: All bytes as one shard are tried too, up to this size: what is larger would not fit into an MPI message of 2 GiB, and
#: would be lost as a whole with its source.
LARGEST_WHOLE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """Who sends what.

    Attributes:
        shard_bytes: size of a shard; the last one of a run may be shorter. Zero for an empty plan.
        total_bytes: size of all shards.
        assignment: for each neighbour that sends anything, by name, the runs of adjacent shards that it sends.
        finish_s: when each of them will have sent all, by name.
        predicted_s: when the last one will have.
        bound_s: the time that no plan can beat, see :func:`~chaos_mpi.sharding.fluid_bound_s`.
    """

    shard_bytes: int
    total_bytes: int
    assignment: Mapping[str, tuple[Range, ...]]
    finish_s: Mapping[str, float]
    predicted_s: float
    bound_s: float

    @classmethod
    def of(
        cls,
        assignment: Mapping[str, Sequence[Range]],
        shard_bytes: int,
        neighbours: Sequence[Neighbour],
        downlink_bytes_per_s: float | None = None,
    ) -> Self:
        """The plan that gives each neighbour its ranges, with its cost. Adjacent ranges are joined.

        A downlink that is slower than the senders together slows each of them as
        :func:`~chaos_mpi.sharding.cost.shared_finish_s` says, each taken to send steadily at the rate that includes
        the cost of its shards.
        """
        check_downlink(downlink_bytes_per_s)
        joined_ = {name: joined(ranges) for name, ranges in sorted(assignment.items())}
        runs = {name: ranges for name, ranges in joined_.items() if ranges}
        senders = [neighbour for neighbour in neighbours if neighbour.name in runs]
        nbytes = [size(runs[n.name]) for n in senders]
        shards = [sum(-(-(stop - start) // shard_bytes) for start, stop in runs[n.name]) for n in senders]
        finish = [n.finish_s(b, k) for n, b, k in zip(senders, nbytes, shards, strict=True)]
        if downlink_bytes_per_s is not None:
            starts = [n.start_s for n in senders]
            peaks = [
                b / (b / n.bandwidth_bytes_per_s + k * n.shard_cost_s)
                for n, b, k in zip(senders, nbytes, shards, strict=True)
            ]
            if math.fsum(peaks) > downlink_bytes_per_s:
                shared = shared_finish_s(starts, peaks, nbytes, downlink_bytes_per_s)
                finish = [max(alone, together) for alone, together in zip(finish, shared, strict=True)]
        total = sum(nbytes)
        return cls(
            shard_bytes=shard_bytes,
            total_bytes=total,
            assignment=runs,
            finish_s={n.name: t for n, t in zip(senders, finish, strict=True)},
            predicted_s=max(finish, default=0.0),
            bound_s=fluid_bound_s(total, neighbours, downlink_bytes_per_s=downlink_bytes_per_s),
        )

    def sources(self) -> dict[str, int]:
        """How many bytes each neighbour sends, by name, for those that send anything."""
        return {name: size(runs) for name, runs in self.assignment.items()}

    def shards(self) -> dict[str, list[Range]]:
        """The runs cut into single shards, for those that send anything."""
        step = self.shard_bytes
        return {
            name: [(at, min(at + step, stop)) for start, stop in runs for at in range(start, stop, step)]
            for name, runs in self.assignment.items()
        }


@dataclass(frozen=True, slots=True)
class Cut:
    """Disjoint ranges, none touching the next, cut into shards from each range's first byte on.

    Attributes:
        ranges: in ascending order.
        shard_bytes: size of a full shard.
    """

    ranges: tuple[Range, ...]
    shard_bytes: int

    @property
    def full(self) -> int:
        """Number of full shards."""
        return sum((stop - start) // self.shard_bytes for start, stop in self.ranges)

    @property
    def tails(self) -> dict[int, int]:
        """Sizes of the short shards, by the index of their range."""
        sizes = ((i, (stop - start) % self.shard_bytes) for i, (start, stop) in enumerate(self.ranges))
        return {i: nbytes for i, nbytes in sizes if nbytes}

    def deal(self, names: Sequence[str], counts: Sequence[int], holders: Mapping[int, int]) -> dict[str, list[Range]]:
        """Byte ranges for each name: ``counts`` full shards, as adjacent as can be, and the short ones it holds.

        Args:
            names: who takes part.
            counts: full shards of each; their sum is :attr:`full`.
            holders: for each of :attr:`tails`, the index of the name that gets it.
        """
        dealt: dict[str, list[Range]] = {name: [] for name in names}
        # The holder of the last short shard comes last, so that this shard is adjacent to its others.
        order = sorted(range(len(names)), key=lambda i: i == holders.get(len(self.ranges) - 1))
        stack = [(names[i], counts[i] * self.shard_bytes) for i in reversed(order) if counts[i]]
        for index, (start, stop) in enumerate(self.ranges):
            tail = (stop - start) % self.shard_bytes
            at = start
            while at < stop - tail:
                name, left = stack.pop()
                end = min(at + left, stop - tail)
                dealt[name].append((at, end))
                if left > end - at:
                    stack.append((name, left - (end - at)))
                at = end
            if tail:
                dealt[names[holders[index]]].append((stop - tail, stop))
        return dealt


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same bytes in ascending order as few ranges as can be; empty ranges are left out.

    Raises:
        ValueError: a range is no range, or two overlap.
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if not 0 <= start <= stop:
            raise ValueError(f"({start}, {stop}) is not a byte range")
        if start == stop:
            continue
        if found and start < found[-1][1]:
            raise ValueError(f"byte ranges overlap: ({start}, {stop}) begins before byte {found[-1][1]}")
        if found and start == found[-1][1]:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def size(ranges: Iterable[Range]) -> int:
    """How many bytes."""
    return sum(stop - start for start, stop in ranges)


def chain(longest_bytes: int, shard_sizes: Iterable[int] | None = None) -> list[int]:
    """The shard sizes to try, ascending, none larger than the longest range: those given, or the default ones.

    Raises:
        ValueError: none is given, or one that is not positive.
    """
    if shard_sizes is None:
        powers = range(SMALLEST_SHARD_BYTES.bit_length() - 1, LARGEST_SHARD_BYTES.bit_length())
        whole = [longest_bytes] if longest_bytes <= LARGEST_WHOLE_BYTES else []
        shard_sizes = [*(1 << power for power in powers), *whole]
    sizes = sorted({min(s, longest_bytes) for s in shard_sizes})
    if not sizes or sizes[0] < 1:
        raise ValueError(f"shard sizes must be positive, and at least one: {sizes}")
    return sizes
