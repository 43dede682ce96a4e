"""One source as the newcomer sees it: what it is to send, what it was asked for, and how fast it sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from chaos_mpi.replication.layout import DataTransfer, Range
from chaos_mpi.replication.rate import MeasuredRate
from chaos_mpi.sharding import Neighbour
from chaos_mpi.sharding.plan import size

#: Asked for from one source at a time: this part of what it is still to send, ...
FLIGHT_SHARE = 0.25
#: ... or what it sends in this time, if that is more, so that requests are never waited for, seconds; ...
FLIGHT_S = 0.05
#: ... at least this many of the smallest shards and at most this many of the largest.
LEAST_IN_FLIGHT, MOST_IN_FLIGHT = 2, 4


@dataclass(slots=True)
class Source:
    """A member that serves, and how fast it has been.

    Attributes:
        neighbour: what is known of it and of the link to it.
        queue: ranges that it is to be asked for.
        shard_bytes: in pieces of this size.
        under_way: ranges it was asked for and has not sent yet.
        received_bytes: what it has sent.
        rate: how fast it sends.
    """

    neighbour: Neighbour
    queue: deque[Range] = field(default_factory=deque)
    shard_bytes: int = 0
    under_way: list[tuple[Range, DataTransfer]] = field(default_factory=list)
    received_bytes: int = 0
    rate: MeasuredRate = field(default_factory=MeasuredRate)

    @property
    def due_bytes(self) -> int:
        """What it was asked for and has not sent yet."""
        return size(span for span, _ in self.under_way)

    @property
    def next_bytes(self) -> int:
        """The part of it that is to come first."""
        return self.under_way[0][0][1] - self.under_way[0][0][0] if self.under_way else 0

    def room_bytes(self, bytes_per_s: float, shard_sizes: Sequence[int]) -> int:
        """How much more it may be asked for now, given its rate and the sizes that shards may have, ascending."""
        due, limit = self.due_bytes, 0.0
        if self.rate.known:
            limit = max(FLIGHT_SHARE * (due + size(self.queue)), FLIGHT_S * bytes_per_s)
        return int(max(LEAST_IN_FLIGHT * shard_sizes[0], min(limit, MOST_IN_FLIGHT * shard_sizes[-1]))) - due

    def next_span(self, most_bytes: int) -> Range:
        """What to ask for next; it stays in the queue until it is under way, so that it cannot get lost."""
        start, stop = self.queue[0]
        return start, min(stop, start + min(self.shard_bytes, most_bytes))

    def asked(self, span: Range, transfer: DataTransfer, now: float) -> None:
        """The next range is under way."""
        _, stop = self.queue.popleft()
        if stop > span[1]:
            self.queue.appendleft((span[1], stop))
        self.under_way.append((span, transfer))
        self.rate.asked(now)
