"""The side of a newcomer: it pulls byte ranges from several members at once, and checks what it got.

Which member sends what is planned by :mod:`chaos_mpi.sharding` from what is known of the links. How fast they really
are shows with the first small shards, and what has not been asked for is planned again from that: a few times a second,
when a source has nothing left to send, and when one dies. A source is only asked for a part of its share at a time,
so that all have their last bytes sent at about the same moment.
"""

from __future__ import annotations

import bisect
import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from chaos_mpi.errors import JoinError, PeerFailedError, WaitTimeoutError
from chaos_mpi.replication.asking import FLIGHT_S, LEAST_IN_FLIGHT, Source
from chaos_mpi.replication.layout import Layout, Range, Transport, checksum
from chaos_mpi.sharding import Neighbour, ShardingError, replan
from chaos_mpi.sharding.held import share_held
from chaos_mpi.sharding.plan import joined, size

log = logging.getLogger("chaos_mpi.replication")

#: Shards that may be chosen. The smallest is also what a source is first asked for: it tells how fast the link is.
SHARD_SIZES = tuple(1 << power for power in range(15, 23))
#: No more shards than this are planned at once, about: planning is to take no time that counts.
MOST_SHARDS = 2000
#: What has not been asked for is planned again after this time, and this soon when a source runs dry, seconds.
REPLAN_S, REPLAN_DRY_S = 0.1, 0.005
#: The same where a source does not have everything, and it may be that nothing can be done about it.
REPLAN_HELD_S = 0.02
#: Checksums asked for from one member at a time.
WINDOW = 3
#: Bytes compared by one checksum.
CHECK_BYTES = 16 << 20
_SPIN_S = 0.02
_IDLE_S = 0.0005


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
        self._begun = self._active = self._told = self._planned = 0.0
        self._moved = 0
        self._fixed = self._learned = False
        self._held: dict[str, Range] = {}  # by name; empty: everybody has everything
        self._first_plan: list[tuple[int, int, int]] = []
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
        self._plan(ranges)
        self._remember_plan()
        self._drain(received, size(ranges))
        return Fetched(received, time.monotonic() - self._begun, self._moved)

    def fetch_planned(self, shards: Mapping[int, Sequence[Range]], held: Mapping[int, Range] | None = None) -> Fetched:
        """Fetch from sources that do not have everything.

        Args:
            shards: what each source is planned to send, by rank.
            held: what each of them has, where that is more; shares are corrected within it. None: no more than that.

        Raises:
            PeerFailedError: a source died that alone had some of it; nothing is under way from the others any more.
            WaitTimeoutError: nothing came for ``limit_s`` seconds.
        """
        self._begun = self._active = self._told = self._planned = time.monotonic()
        self._moved = 0
        received: dict[int, int] = {}
        wanted = sum(size(ranges) for ranges in shards.values())
        for rank, ranges in shards.items():
            source = self._sources[rank]
            source.queue.extend(joined(ranges))
            source.shard_bytes = max((stop - start for start, stop in ranges), default=0)
        self._remember_plan()
        own = {rank: (min(r)[0], max(r)[1]) for rank, r in shards.items() if r}
        self._held = {self._sources[rank].neighbour.name: span for rank, span in (held or own).items()}
        self._fixed = held is None
        try:
            if held:
                self._plan([])
            self._drain(received, wanted)
        finally:
            self._held, self._fixed = {}, False
        if sum(received.values()) < wanted:
            raise PeerFailedError("a member died that had a part of the cut")
        return Fetched(received, time.monotonic() - self._begun, self._moved)

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

    def _plan(self, ranges: Sequence[Range]) -> None:
        """Share out ranges, and whatever has not been asked for, among the sources that are alive."""
        if not self._sources:
            raise JoinError("all members that had the training state died before this rank had it")
        self._planned = time.monotonic()
        rates = self._rates()
        left = [*ranges]
        for source in self._sources.values():
            left += source.queue
            source.queue.clear()
        neighbours = [
            replace(source.neighbour, bandwidth_bytes_per_s=rates[rank], ready_s=source.due_bytes / rates[rank])
            for rank, source in self._sources.items()
        ]
        for name, (runs, shard_bytes) in self._shares(left, neighbours).items():
            source = next(s for s in self._sources.values() if s.neighbour.name == name)
            source.queue.extend(runs)
            source.shard_bytes = shard_bytes

    def _shares(self, left: Sequence[Range], neighbours: Sequence[Neighbour]) -> dict[str, tuple[Sequence[Range], int]]:
        """The runs that each neighbour is to send, and the size of their shards."""
        if self._held:
            holders = [n for n in neighbours if n.name in self._held]
            size_of = {n.name: int(n.bandwidth_bytes_per_s * FLIGHT_S / LEAST_IN_FLIGHT) for n in holders}
            return {
                name: (runs, min(max(size_of[name], SHARD_SIZES[0]), SHARD_SIZES[-1]))
                for name, runs in share_held(left, holders, self._held).items()
            }
        sizes = [s for s in SHARD_SIZES if s * MOST_SHARDS >= size(left)] or SHARD_SIZES[-1:]
        return {
            name: (joined(shards), max(stop - start for start, stop in shards))
            for name, shards in replan(left, neighbours, shard_sizes=sizes).items()
        }

    def _rates(self) -> dict[int, float]:
        """Bytes per second of each source; as long as one has sent nothing, as much faster or slower than the others
        as was assumed."""
        now = time.monotonic()

        def rate(source: Source, prior: float) -> float:
            return max(source.rate.bytes_per_s(now, source.next_bytes, prior), 1.0)

        known = [s for s in self._sources.values() if s.rate.known]
        scale = statistics.median([rate(s, 1.0) / s.neighbour.bandwidth_bytes_per_s for s in known] or [1.0])
        return {rank: rate(s, scale * s.neighbour.bandwidth_bytes_per_s) for rank, s in self._sources.items()}

    def _drain(self, received: dict[int, int], wanted: int) -> None:
        while any(source.queue or source.under_way for source in self._sources.values()):
            self._plan_again()
            self._ask()
            if not self._collect(received):
                self._pause("bytes of the training state")
            self._tell(sum(received.values()), wanted)

    def _remember_plan(self) -> None:
        self._first_plan = sorted((*span, rank) for rank, source in self._sources.items() for span in source.queue)

    def _plan_again(self) -> None:
        if self._fixed or not any(source.queue for source in self._sources.values()):
            return
        dry = any(not source.queue for source in self._sources.values())
        period = REPLAN_S if not (dry or self._learned) else REPLAN_HELD_S if self._held else REPLAN_DRY_S
        if time.monotonic() - self._planned > period:
            self._learned = False
            self._plan([])

    def _ask(self) -> None:
        rates = self._rates()
        for rank, source in list(self._sources.items()):
            try:
                while source.queue and (room := source.room_bytes(rates[rank], SHARD_SIZES)) > 0:
                    self._number += 1
                    span = source.next_span(max(room, SHARD_SIZES[0]))
                    pieces = self._layout.pieces(self._tensors, *span)
                    transfer = self._transport.receive_data(rank, self._number, pieces)
                    source.asked(span, transfer, time.monotonic())
                    self._transport.send(rank, {"get": list(span), "number": self._number})
            except PeerFailedError:
                self._lose(rank)

    def _collect(self, received: dict[int, int]) -> bool:
        """Take note of what has arrived; whether anything has."""
        busy = self._hear_of_deaths()
        for rank, source in list(self._sources.items()):
            try:
                for span, transfer in list(source.under_way):
                    if transfer.done():
                        busy = True
                        source.under_way.remove((span, transfer))
                        self._note(rank, source, span)
                        received[rank] = received.get(rank, 0) + span[1] - span[0]
            except PeerFailedError:
                busy = True
                self._lose(rank)
        if busy:
            self._active = time.monotonic()
        return busy

    def _note(self, rank: int, source: Source, span: Range) -> None:
        """A shard has arrived."""
        self._learned |= not source.rate.known
        source.received_bytes += span[1] - span[0]
        source.rate.arrived(time.monotonic(), span[1] - span[0], more=bool(source.under_way))
        self._senders.append((span, rank))
        place = bisect.bisect_right(self._first_plan, span[0], key=lambda planned: planned[0]) - 1
        self._moved += self._first_plan[place][2] != rank

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
        missing = [*(span for span, _ in source.under_way), *source.queue]
        if self._fixed:
            self._stop_asking()
            return
        log.warning("%s died; %d bytes are fetched from others", source.neighbour.name, size(missing))
        if not missing:
            return
        try:
            self._plan(missing)
        except ShardingError:
            self._stop_asking()

    def _stop_asking(self) -> None:
        """What is under way is awaited: it must not arrive over something newer."""
        for source in self._sources.values():
            source.queue.clear()

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
