"""What it costs to pull bytes from neighbours, and the time that no schedule can beat.

Neighbour ``u`` starts at ``ready + latency`` and needs ``shard bytes / bandwidth + shard cost`` for each shard, one
after the other; neighbours send at the same time. A downlink, where one is given, is shared max-min fairly by
those that are sending, as TCP does it approximately.

Floats are only compared, and combined in a fixed order or by exactly rounded sums, so all members get the same result.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Numbers outside are units mixed up, or a measurement gone wrong, and would make the arithmetic overflow.
_BANDWIDTHS = (1e-9, 1e30)
_SECONDS = (0.0, 1e15)


class ShardingError(ValueError):
    """The neighbours cannot send it: there are none, or their capacities are too small."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A member that can send parts of the training state, and the link from it to the newcomer.

    Attributes:
        name: unique among the neighbours; decides ties.
        bandwidth_bytes_per_s: what the link carries when nobody else sends.
        latency_s: from the request to the first byte.
        ready_s: from now until it can serve, for instance the rest of its current step.
        shard_cost_s: what each shard costs besides its bytes.
        capacity_bytes: the most it will send; None for any amount.
    """

    name: str
    bandwidth_bytes_per_s: float
    latency_s: float = 0.0
    ready_s: float = 0.0
    shard_cost_s: float = 0.0
    capacity_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a neighbour needs a name")
        _check(f"neighbour {self.name}: bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, _BANDWIDTHS)
        for field in ("latency_s", "ready_s", "shard_cost_s"):
            _check(f"neighbour {self.name}: {field}", getattr(self, field), _SECONDS)
        if self.capacity_bytes is not None and self.capacity_bytes < 0:
            raise ValueError(f"neighbour {self.name}: capacity_bytes is {self.capacity_bytes} and cannot be negative")

    @property
    def start_s(self) -> float:
        """When its first byte can arrive."""
        return self.ready_s + self.latency_s

    def finish_s(self, nbytes: int, shards: int) -> float:
        """When the last of ``nbytes`` in ``shards`` shards has arrived, if the downlink is no limit."""
        return self.start_s + nbytes / self.bandwidth_bytes_per_s + shards * self.shard_cost_s

    def fits(self, nbytes: int) -> bool:
        """Whether it will send that much."""
        return self.capacity_bytes is None or nbytes <= self.capacity_bytes


def by_name(neighbours: Iterable[Neighbour]) -> list[Neighbour]:
    """The neighbours in the order in which ties are decided.

    Raises:
        ValueError: two have the same name.
    """
    ordered = sorted(neighbours, key=lambda n: n.name)
    for one, other in itertools.pairwise(ordered):
        if one.name == other.name:
            raise ValueError(f"two neighbours are called {one.name}")
    return ordered


def check_downlink(downlink_bytes_per_s: float | None) -> None:
    """Raise ValueError for a downlink that cannot be."""
    if downlink_bytes_per_s is not None:
        _check("downlink_bytes_per_s", downlink_bytes_per_s, _BANDWIDTHS)


def fluid_time_s(
    amount: float, starts_s: Sequence[float], rates_per_s: Sequence[float], limits: Sequence[float]
) -> float:
    """The least T with ``sum_u min(limits[u], rates[u] * max(0, T - starts[u])) >= amount``; infinite for none."""

    curves = [
        (start, start + limit / rate, rate, limit)
        for start, rate, limit in zip(starts_s, rates_per_s, limits, strict=True)
    ]

    def done(t: float) -> float:
        # Exactly the limit at the end of a curve: one bit less, and the rest would be waited for after it.
        return math.fsum([limit if t >= end else rate * (t - start) for start, end, rate, limit in curves if t > start])

    bends = sorted({t for start, end, _, _ in curves for t in (start, end) if t < math.inf})
    index = bisect.bisect_left(bends, amount, key=done)
    if index == 0:
        return bends[0] if bends else math.inf
    low = bends[index - 1]
    slope = math.fsum([rate for start, end, rate, _ in curves if start <= low < end])
    following = bends[index] if index < len(bends) else math.inf
    return min(low + (amount - done(low)) / slope, following) if slope > 0.0 else following


def fluid_bound_s(
    total_bytes: int, neighbours: Iterable[Neighbour], *, downlink_bytes_per_s: float | None = None
) -> float:
    """The time that no schedule can beat: the state is a fluid, and shards cost nothing.

    The least T with ``sum_u min(capacity_u, bandwidth_u * max(0, T - start_u)) >= total``. With a downlink, also the
    least T by which it and the links of those that have started can have carried ``total``:
    ``integral over t < T of min(downlink, sum of bandwidth_u with start_u <= t) >= total``; the later of the two
    counts. Zero for no bytes, infinite when the capacities are too small or there is no neighbour.
    """
    check_downlink(downlink_bytes_per_s)
    if total_bytes == 0:
        return 0.0
    ordered = sorted(by_name(neighbours), key=lambda n: n.start_s)
    starts = [n.start_s for n in ordered]
    rates = [float(n.bandwidth_bytes_per_s) for n in ordered]
    limits = [math.inf if n.capacity_bytes is None else float(n.capacity_bytes) for n in ordered]
    bound = fluid_time_s(total_bytes, starts, rates, limits)
    if downlink_bytes_per_s is None:
        return bound
    # Given to those that start first, the downlink is never idle while one of them could fill it.
    left, reserved = float(downlink_bytes_per_s), []
    for rate in rates:
        reserved.append(min(rate, left))
        left -= reserved[-1]
    used = [(start, rate) for start, rate in zip(starts, reserved, strict=True) if rate > 0.0]
    through = fluid_time_s(total_bytes, [s for s, _ in used], [r for _, r in used], [math.inf] * len(used))
    return max(bound, through)


def shared_finish_s(
    starts_s: Sequence[float], peaks_bytes_per_s: Sequence[float], nbytes: Sequence[int], downlink_bytes_per_s: float
) -> list[float]:
    """When each transfer ends if those under way share a downlink max-min fairly, none faster than its peak."""
    left = [float(n) for n in nbytes]
    finish = list(starts_s)
    waiting = sorted(range(len(left)), key=lambda i: (starts_s[i], i), reverse=True)
    sending: list[int] = []
    now = 0.0
    while waiting or sending:
        if not sending:
            now = starts_s[waiting[-1]]
        while waiting and starts_s[waiting[-1]] <= now:
            bisect.insort(sending, waiting.pop(), key=lambda i: (peaks_bytes_per_s[i], i))
        # From the slowest on: each takes its peak, or an equal part of what is left for it and the faster ones.
        free, ends, rates = downlink_bytes_per_s, [], []
        for place, i in enumerate(sending):
            rates.append(min(peaks_bytes_per_s[i], free / (len(sending) - place)))
            ends.append(now + left[i] / rates[-1])
            free -= rates[-1]
        until = min(ends)
        if waiting:
            until = min(until, starts_s[waiting[-1]])
        for i, rate, end in zip(sending, rates, ends, strict=True):
            left[i] = max(left[i] - rate * (until - now), 0.0)
            finish[i] = end
        sending = [i for i, end in zip(sending, ends, strict=True) if end > until]
        now = until
    return finish


def _check(what: str, value: float, limits: tuple[float, float]) -> None:
    low, high = limits
    if not low <= value <= high:  # NaN is not
        raise ValueError(f"{what} is {value}, and must be from {low:g} to {high:g}")
