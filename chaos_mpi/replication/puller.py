"""The side of a newcomer: it pulls byte ranges from several members at once, and checks what it got.

Which member sends what is planned by :mod:`chaos_mpi.sharding` from what is known of the links, and corrected by what
is seen: a source that has nothing left to send takes over shards that another one would finish later, and the shards
of a source that died are planned anew over the rest.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from chaos_mpi.errors import JoinError, PeerFailedError, WaitTimeoutError
from chaos_mpi.replication.layout import DataTransfer, Layout, Range, Transport, checksum
from chaos_mpi.sharding import Neighbour, replan
from chaos_mpi.sharding.plan import size

log = logging.getLogger("chaos_mpi.replication")

#: Transfers under way from one source: one arrives while the next is being asked for.
WINDOW = 3
#: Small enough that a shard is soon sent again by another source, large enough that asking for it costs nothing.
SHARD_SIZES = tuple(1 << power for power in range(18, 23))
#: Bytes compared by one checksum.
CHECK_BYTES = 16 << 20
_SPIN_S = 0.02
_IDLE_S = 0.0005


@dataclass(slots=True)
class Source:
    """A member that serves, and how fast it has been.

    Attributes:
        neighbour: what is known of it and of the link to it.
        queue: ranges that it is to be asked for.
        under_way: ranges it was asked for and has not sent yet.
        received_bytes: what it has sent.
    """

    neighbour: Neighbour
    queue: deque[Range] = field(default_factory=deque)
    under_way: list[tuple[Range, DataTransfer]] = field(default_factory=list)
    received_bytes: int = 0

    def rate(self, seconds: float) -> float:
        """Bytes per second: measured once something came, else as planned."""
        if self.received_bytes and seconds > 0:
            return self.received_bytes / seconds
        return self.neighbour.bandwidth_bytes_per_s

    def backlog_bytes(self) -> int:
        """What it still has to send."""
        return size(self.queue) + size(span for span, _ in self.under_way)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What it took to fetch a state.

    Attributes:
        sources: bytes that came from each rank.
        seconds: from the first request to the last byte.
        moved_shards: shards that another source sent than planned.
        fetched_again_bytes: bytes whose checksum was wrong at first.
    """

    sources: dict[int, int]
    seconds: float
    moved_shards: int = 0
    fetched_again_bytes: int = 0


class StatePuller:
    """Fetches parts of one state.

    Args:
        transport: reaches the sources.
        neighbours: the sources by rank, with what is known of their links.
        layout: of the state.
        tensors: where it goes, by name.
        limit_s: longest time without a byte from anybody.
        progress: called about twice a second with bytes received, bytes wanted, and bytes per second of each rank.
    """

    def __init__(
        self,
        transport: Transport,
        neighbours: Mapping[int, Neighbour],
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        limit_s: float,
        progress: Callable[[int, int, dict[int, float]], None] | None = None,
    ) -> None:
        self._transport = transport
        self._sources = {rank: Source(neighbour) for rank, neighbour in neighbours.items()}
        self._layout, self._tensors, self._limit_s = layout, tensors, limit_s
        self._progress = progress
        self._number = 0
        self._begun = self._active = self._told = 0.0
        self._moved = 0
        self._planned_only = False
        self._senders: list[tuple[Range, int]] = []

    @property
    def alive(self) -> list[int]:
        """Ranks of the sources that are not known to be dead."""
        return sorted(self._sources)

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        """Fetch byte ranges from all sources, and return how it went.

        Raises:
            JoinError: all sources died.
            WaitTimeoutError: nothing came for ``limit_s`` seconds.
        """
        self._begun = self._active = self._told = time.monotonic()
        self._moved = 0
        received: dict[int, int] = {}
        for source in self._sources.values():
            source.received_bytes = 0
        wanted = sum(stop - start for start, stop in ranges)
        self._schedule(ranges)
        self._drain(received, wanted)
        return Fetched(received, time.monotonic() - self._begun, self._moved)

    def fetch_planned(self, shards: Mapping[int, Sequence[Range]]) -> Fetched:
        """Fetch from each source exactly what it is said to have.

        Raises:
            PeerFailedError: a source died; nothing is under way from the others any more.
            WaitTimeoutError: nothing came for ``limit_s`` seconds.
        """
        self._begun = self._active = self._told = time.monotonic()
        received: dict[int, int] = {}
        wanted = sum(size(ranges) for ranges in shards.values())
        for rank, ranges in shards.items():
            self._sources[rank].queue.extend(ranges)
        self._planned_only = True
        try:
            self._drain(received, wanted)
        finally:
            self._planned_only = False
        if sum(received.values()) < wanted:
            raise PeerFailedError("a member died that had a part of the cut")
        return Fetched(received, time.monotonic() - self._begun)

    def differing(self, ranges: Sequence[Range]) -> list[Range]:
        """The parts, of at most :data:`CHECK_BYTES`, whose checksum at a member is another than here.

        Raises:
            WaitTimeoutError, JoinError: as for :meth:`fetch`.
        """
        return self._differing(_chunks(ranges, CHECK_BYTES), shift=1)

    def verify(self, ranges: Sequence[Range]) -> int:
        """Compare checksums with members that did not send these bytes, where there are any; fetch again what differs.

        Returns:
            Bytes that had to be fetched again.

        Raises:
            JoinError: the bytes differ again, so the members themselves differ or memory is broken.
            WaitTimeoutError, JoinError: as for :meth:`fetch`.
        """
        wrong = self.differing(ranges)
        if wrong:
            log.warning("%d bytes of the training state arrived damaged and are fetched again", size(wrong))
            self.fetch(wrong)
            if left := self._differing(wrong, shift=2):
                raise JoinError(
                    f"{size(left)} bytes of the training state differ between members, or are damaged on the way "
                    "every time: the replicas may not be identical any more (see params_digest in the event log)"
                )
        return size(wrong)

    # -- fetching --------------------------------------------------------------------------------------

    def _schedule(self, ranges: Sequence[Range]) -> None:
        """Give ranges to the sources that are alive."""
        if not self._sources:
            raise JoinError("all members that had the training state died before this rank had it")
        by_name = {source.neighbour.name: source for source in self._sources.values()}
        neighbours = [source.neighbour for source in self._sources.values()]
        for name, shards in replan(ranges, neighbours, shard_sizes=SHARD_SIZES).items():
            by_name[name].queue.extend(shards)

    def _drain(self, received: dict[int, int], wanted: int) -> None:
        while any(source.queue or source.under_way for source in self._sources.values()):
            self._ask()
            if not self._collect(received):
                self._pause("bytes of the training state")
            self._tell(sum(received.values()), wanted)

    def _ask(self) -> None:
        for rank, source in list(self._sources.items()):
            if not source.queue and len(source.under_way) < WINDOW:
                self._take_over(source)
            try:
                while source.queue and len(source.under_way) < WINDOW:
                    span = source.queue[0]  # it stays there until it is under way, so that it cannot get lost
                    self._number += 1
                    pieces = self._layout.pieces(self._tensors, *span)
                    transfer = self._transport.receive_data(rank, self._number, pieces)
                    source.under_way.append((source.queue.popleft(), transfer))
                    self._transport.send(rank, {"get": list(span), "number": self._number})
            except PeerFailedError:
                self._lose(rank)

    def _take_over(self, idle: Source) -> None:
        """Give an idle source the last shard of the one that will be done last, if that helps."""
        if self._planned_only:
            return
        seconds = max(time.monotonic() - self._begun, 1e-6)
        slow = max(self._sources.values(), key=lambda s: s.backlog_bytes() / s.rate(seconds))
        if not slow.queue or slow is idle:
            return
        start, stop = slow.queue[-1]
        if (stop - start + idle.backlog_bytes()) / idle.rate(seconds) < slow.backlog_bytes() / slow.rate(seconds):
            idle.queue.append(slow.queue.pop())
            self._moved += 1

    def _collect(self, received: dict[int, int]) -> bool:
        """Take note of what has arrived; whether anything has."""
        busy = self._hear_of_deaths()
        for rank, source in list(self._sources.items()):
            try:
                for span, transfer in list(source.under_way):
                    if transfer.done():
                        busy = True
                        source.under_way.remove((span, transfer))
                        source.received_bytes += span[1] - span[0]
                        received[rank] = received.get(rank, 0) + span[1] - span[0]
                        self._senders.append((span, rank))
            except PeerFailedError:
                busy = True
                self._lose(rank)
        if busy:
            self._active = time.monotonic()
        return busy

    def _hear_of_deaths(self) -> bool:
        """Members tell of deaths that do not show here."""
        dead: set[int] = set()
        for rank in self.alive:
            try:
                while (message := self._transport.poll(rank)) is not None:
                    dead.update(message.get("dead", ()))
            except PeerFailedError:
                dead.add(rank)
        for rank in sorted(dead & set(self._sources)):
            self._lose(rank)
        return bool(dead)

    def _lose(self, rank: int) -> None:
        source = self._sources.pop(rank)
        if self._planned_only:
            for other in self._sources.values():
                other.queue.clear()  # what is under way is awaited: it must not arrive over something newer
            return
        missing = [*(span for span, _ in source.under_way), *source.queue]
        log.warning("%s died; %d bytes are fetched from others", source.neighbour.name, size(missing))
        if missing:
            self._moved += len(missing)
            self._schedule(missing)

    # -- checking --------------------------------------------------------------------------------------

    def _differing(self, ranges: Sequence[Range], shift: int) -> list[Range]:
        """The ranges whose checksum at a member is another than here; member ``shift`` places on in each turn."""
        wrong: list[Range] = []
        open_: dict[int, tuple[int, Range]] = {}
        todo = deque(enumerate(ranges))
        self._active = time.monotonic()
        while todo or open_:
            if not self._sources:
                raise JoinError("all members that had the training state died before this rank had checked it")
            while todo and len(open_) < WINDOW * len(self._sources):
                index, span = todo.popleft()
                rank = self._checker(span, index + shift)
                self._number += 1
                open_[self._number] = (rank, span)
                self._request_sum(rank, span)
            if not self._answers(open_, todo, wrong):
                self._pause("checksums of the training state")
        return wrong

    def _checker(self, span: Range, turn: int) -> int:
        """A member that sent nothing of this range, if there is one."""
        senders = {rank for (start, stop), rank in self._senders if start < span[1] and span[0] < stop}
        others = [rank for rank in self.alive if rank not in senders] or self.alive
        return others[turn % len(others)]

    def _request_sum(self, rank: int, span: Range) -> None:
        try:
            self._transport.send(rank, {"sum": list(span), "number": self._number})
        except PeerFailedError:
            return  # found out again where the answer is awaited

    def _answers(self, open_: dict[int, tuple[int, Range]], todo: deque[tuple[int, Range]], wrong: list[Range]) -> bool:
        busy = False
        gone: set[int] = set()
        for rank in self.alive:
            try:
                while (answer := self._transport.poll(rank)) is not None:
                    busy = True
                    if "number" not in answer:
                        gone.update(answer.get("dead", ()))
                        continue
                    _, span = open_.pop(answer["number"])
                    if checksum(self._layout.pieces(self._tensors, *span)) != answer["sum"]:
                        wrong.append(span)
            except PeerFailedError:
                gone.add(rank)
        for rank in gone & set(self._sources):
            busy = True
            self._sources.pop(rank)
            for number in [n for n, (of, _) in open_.items() if of == rank]:
                todo.append((number, open_.pop(number)[1]))
        if busy:
            self._active = time.monotonic()
        return busy

    # -- waiting ---------------------------------------------------------------------------------------

    def _pause(self, what: str) -> None:
        idle = time.monotonic() - self._active
        if idle > self._limit_s:
            raise WaitTimeoutError(f"waited {self._limit_s:.0f} s for {what}")
        if idle > _SPIN_S:
            time.sleep(_IDLE_S)
        else:
            os.sched_yield()

    def _tell(self, received: int, wanted: int) -> None:
        now = time.monotonic()
        if self._progress is not None and now - self._told > 0.5:
            self._told = now
            seconds = max(now - self._begun, 1e-6)
            self._progress(received, wanted, {rank: s.received_bytes / seconds for rank, s in self._sources.items()})


def _chunks(ranges: Sequence[Range], nbytes: int) -> list[Range]:
    return [(at, min(at + nbytes, stop)) for start, stop in ranges for at in range(start, stop, nbytes)]
