"""One communicator, and what the rest of the package may ask of it.

A thin layer over MPI and its fault tolerance chapter (ULFM: revoke, shrink, agree; MPI Forum ticket 20,
Open MPI manual, "User-Level Fault Mitigation"). Every operation is non-blocking underneath and has a
limit; any MPI error becomes :class:`PeerFailedError`, because after a death Open MPI reports what happened under
several error classes (``ERR_PROC_FAILED``, ``ERR_REVOKED``, ``ERR_OTHER``), and only the shrink that follows can say
who is gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch

from chaos_mpi.errors import EngineError, PeerFailedError, WaitTimeoutError
from chaos_mpi.mpi.memory import MPI, buffer_of, bytes_of, moved, pieces
from chaos_mpi.mpi.runtime import Watchdog

__all__ = ["MPI", "PeerFailedError", "Pending", "World"]

_MPI_OPS: dict[str, MPI.Op] = {
    "sum": MPI.SUM,
    "product": MPI.PROD,
    "max": MPI.MAX,
    "min": MPI.MIN,
    "band": MPI.BAND,
    "bor": MPI.BOR,
    "bxor": MPI.BXOR,
}

#: How long a request of a revoked communicator may take to end before it is left to itself.
DRAIN_LIMIT_S = 5.0
#: Ask who has failed this often while waiting: a rank whose own partners live would not notice otherwise.
_LIVENESS_PERIOD_S = 0.002


#: Memory that a request which never ended may still write to; it is never given back.
_abandoned: list[object] = []


class Pending:
    """Collectives in flight on one communicator. Keeps their memory alive: the requests themselves do not."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._requests: list[MPI.Request] = []
        self._memory: list[object] = []

    @property
    def size(self) -> int:
        """Number of members of the communicator."""
        return self._world.size

    def reduce(self, tensor: torch.Tensor, op: str) -> None:
        """Start an in-place allreduce of a contiguous CPU tensor."""
        comm = self._world.comm
        for piece in pieces(tensor):
            buffer = buffer_of(piece)
            self._add(lambda: comm.Iallreduce(MPI.IN_PLACE, buffer, _MPI_OPS[op]), piece)  # noqa: B023 - called at once

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Start a broadcast of the bytes of a contiguous CPU tensor from rank ``root``."""
        comm = self._world.comm
        for piece in pieces(tensor):
            buffer = bytes_of(piece)
            self._add(lambda: comm.Ibcast(buffer, root), piece)  # noqa: B023 - called at once

    def gather(self, mine: np.ndarray, everyones: np.ndarray) -> None:
        """Start an allgather of equally long byte rows: ``everyones`` has one row for each rank."""
        comm = self._world.comm
        self._add(lambda: comm.Iallgather(mine, everyones), mine, everyones)

    def gather_parts(self, mine: torch.Tensor, everyones: torch.Tensor, counts: Sequence[int]) -> None:
        """Start an allgather of contiguous CPU tensors of one dtype: ``counts`` elements of each rank."""
        comm, sent, received = self._world.comm, moved(mine, mine.numel()), moved(everyones, counts)
        self._add(lambda: comm.Iallgatherv(sent, received), mine, everyones)

    def exchange_parts(
        self, mine: torch.Tensor, sent: Sequence[int], theirs: torch.Tensor, received: Sequence[int]
    ) -> None:
        """Start an all-to-all of contiguous CPU tensors of one dtype: so many elements to, and from, each rank."""
        comm, to_all, from_all = self._world.comm, moved(mine, sent), moved(theirs, received)
        self._add(lambda: comm.Ialltoallv(to_all, from_all), mine, theirs)

    def reduce_parts(self, everyones: torch.Tensor, mine: torch.Tensor, counts: Sequence[int], op: str) -> None:
        """Start a reduction of ``everyones`` of which each rank gets its ``counts`` elements into ``mine``."""
        comm, whole, part = self._world.comm, buffer_of(everyones), buffer_of(mine)
        self._add(lambda: comm.Ireduce_scatter(whole, part, list(counts), _MPI_OPS[op]), everyones, mine)

    def reduce_to(self, tensor: torch.Tensor, root: int, op: str) -> None:
        """Start a reduction into rank ``root``'s contiguous CPU tensor; the others' stay as they are."""
        comm = self._world.comm
        for piece in pieces(tensor):
            buffer = buffer_of(piece)
            sent, received = (MPI.IN_PLACE, buffer) if self._world.rank == root else (buffer, None)
            self._add(lambda: comm.Ireduce(sent, received, _MPI_OPS[op], root), piece)  # noqa: B023 - called at once

    def gather_to(self, mine: torch.Tensor, everyones: torch.Tensor, counts: Sequence[int], root: int) -> None:
        """Start to gather contiguous CPU tensors of one dtype into ``everyones`` of rank ``root``."""
        comm, sent = self._world.comm, moved(mine, mine.numel())
        received = moved(everyones, counts) if self._world.rank == root else None
        self._add(lambda: comm.Igatherv(sent, received, root), mine, everyones)

    def scatter_from(self, everyones: torch.Tensor, mine: torch.Tensor, counts: Sequence[int], root: int) -> None:
        """The reverse of :meth:`gather_to`: each rank gets its ``counts`` elements of rank ``root``'s."""
        comm, received = self._world.comm, moved(mine, mine.numel())
        sent = moved(everyones, counts) if self._world.rank == root else None
        self._add(lambda: comm.Iscatterv(sent, received, root), mine, everyones)

    def test(self) -> bool:
        """Progress the collectives; True when all are complete.

        Raises:
            PeerFailedError: the communicator is broken.
        """
        if not self._requests:
            return True
        try:
            done: bool = MPI.Request.Testall(self._requests)
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error
        if done:
            self._requests.clear()
            self._memory.clear()
        return done

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        """Wait until all collectives are complete, yielding the core to other ranks meanwhile.

        Raises:
            PeerFailedError: the communicator is broken.
            WaitTimeoutError: not complete within ``limit_s`` seconds; ``what()`` names what was waited for.
        """
        if self.test():
            return
        begun = time.monotonic()
        asked = begun
        while not self.test():
            os.sched_yield()
            now = time.monotonic()
            if now - asked > _LIVENESS_PERIOD_S:
                asked = now
                self._world.meanwhile()
                if self._world.failed_ranks():
                    raise PeerFailedError("a member of this communicator has failed")
                if now - begun > limit_s:
                    raise WaitTimeoutError(f"waited {limit_s:.0f} s for {what()}")

    def drain(self) -> bool:
        """End every request after the communicator was revoked.

        Returns:
            False when a request did not end within :data:`DRAIN_LIMIT_S`: its buffer must not be reused.
        """
        limit = time.monotonic() + DRAIN_LIMIT_S
        ended = True
        for request in self._requests:
            try:
                while not request.Test():
                    if time.monotonic() > limit:
                        ended = False
                        break
                    os.sched_yield()
            except MPI.Exception:
                continue
        if not ended:
            _abandoned.extend(self._memory)
        self._requests.clear()
        self._memory.clear()
        return ended

    def _add(self, start: Callable[[], MPI.Request], *memory: object) -> None:
        self._memory.extend(memory)
        try:
            self._requests.append(start())
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error


class World:
    """One communicator of this job, from its creation to the revoke that ends it."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._revoked = False
        #: Called again and again while calls on this communicator wait.
        self.meanwhile: Callable[[], None] = _nothing
        comm.Set_errhandler(MPI.ERRORS_RETURN)

    def pending(self) -> Pending:
        """A new, empty set of collectives on this communicator."""
        return Pending(self)

    def failed_ranks(self) -> list[int]:
        """Ranks of this communicator that are known here to have failed. Local and cheap."""
        if self.size == 1:
            return []
        try:
            failed = self.comm.Get_failed()
        except MPI.Exception:
            return []
        count = failed.Get_size()
        if not count:
            return []
        group = self.comm.Get_group()
        ranks = MPI.Group.Translate_ranks(failed, list(range(count)), group)
        group.Free()
        failed.Free()
        return sorted(ranks)

    def ranks_in(self, other: World) -> list[int]:
        """The ranks that the members of this communicator have in another one, which has all of them. Local."""
        own, others = self.comm.Get_group(), other.comm.Get_group()
        ranks = MPI.Group.Translate_ranks(own, list(range(self.size)), others)
        own.Free()
        others.Free()
        return list(ranks)

    def is_broken(self) -> bool:
        """Whether a member is known here to have failed, or another one has revoked it. Local and cheap."""
        return self._revoked or bool(self.comm.Is_revoked()) or bool(self.failed_ranks())

    def revoke(self) -> None:
        """Make every operation on this communicator fail at every member, now and from now on."""
        if self._revoked:
            return
        self._revoked = True
        try:
            self.comm.Revoke()
        except MPI.Exception as error:
            raise EngineError(f"MPI could not revoke the communicator: {error}") from error

    def shrink(self, limit_s: float, wanted: Callable[[], str]) -> World:
        """The communicator of the members that are alive. All of them must call it.

        The shrink is repeated until an agreement on the old communicator says that it succeeded at
        every member, so that no two members can end up in different communicators.

        Raises:
            WaitTimeoutError: the members did not all arrive within ``limit_s`` seconds. When it is the
                blocking shrink itself that hangs, the process ends with a message instead.
        """
        while True:
            smaller: MPI.Intracomm | None = None
            try:
                with Watchdog(f"MPI shrink ({wanted()})", limit_s):
                    smaller = cast("MPI.Intracomm", self.comm.Shrink())
            except MPI.Exception:
                smaller = None
            agreed = self.agree(smaller is not None, limit_s, wanted)
            if agreed and smaller is not None:
                return World(smaller)

    def agree(self, ok: bool, limit_s: float, what: Callable[[], str]) -> bool:
        """True at every living member when every living member said ``ok``, else False at every one.

        Works on a broken and on a revoked communicator. The value agreed on is the same everywhere also when MPI
        reports new failures along with it (ULFM, ``MPI_Comm_iagree``).

        Raises:
            WaitTimeoutError: not everyone arrived within ``limit_s`` seconds.
        """
        flag = np.array([1 if ok else 0], dtype=np.intc)
        limit = time.monotonic() + limit_s
        try:
            request = self.comm.Iagree(flag)
            while not request.Test():
                if time.monotonic() > limit:
                    raise WaitTimeoutError(f"waited {limit_s:.0f} s for {what()}")
                os.sched_yield()
        except MPI.Exception as error:
            if error.Get_error_class() not in _AGREE_CARRIES_FLAG:
                raise EngineError(f"MPI could not agree: {error}") from error
        return bool(flag[0])

    def all_gather(self, payload: bytes, what: Callable[[], str], limit_s: float) -> list[bytes]:
        """Every member's ``payload``, in rank order.

        Raises:
            PeerFailedError, WaitTimeoutError: as for :meth:`Pending.wait`.
        """
        longest = np.array([len(payload)], dtype=np.int64)
        self._complete(lambda p: p.reduce(torch.from_numpy(longest), "max"), what, limit_s)
        width = 8 + int(longest[0])
        mine = np.zeros(width, dtype=np.uint8)
        mine[:8] = np.frombuffer(len(payload).to_bytes(8, "little"), dtype=np.uint8)
        mine[8 : 8 + len(payload)] = np.frombuffer(payload, dtype=np.uint8)
        rows = np.empty((self.size, width), dtype=np.uint8)
        self._complete(lambda p: p.gather(mine, rows), what, limit_s)
        return [row[8 : 8 + int.from_bytes(row[:8].tobytes(), "little")].tobytes() for row in rows]

    def broadcast(self, tensors: Sequence[torch.Tensor], root: int, what: Callable[[], str], limit_s: float) -> None:
        """Overwrite ``tensors`` (contiguous, CPU, any dtype) with those of rank ``root``.

        Raises:
            PeerFailedError, WaitTimeoutError: as for :meth:`Pending.wait`.
        """

        def start(pending: Pending) -> None:
            for tensor in tensors:
                pending.broadcast(tensor, root)

        self._complete(start, what, limit_s)

    def subset(self, ranks: Sequence[int], tag: int, limit_s: float) -> World:
        """A communicator of these ranks, which alone call this, with the same tag; in the order given.

        The process ends when MPI has not done it within ``limit_s`` seconds.

        Raises:
            PeerFailedError: one of them has died.
        """
        group = self.comm.Get_group()
        chosen = group.Incl(list(ranks))
        try:
            with Watchdog(f"a communicator of ranks {list(ranks)}", limit_s):
                made = self.comm.Create_group(chosen, tag)
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error
        finally:
            chosen.Free()
            group.Free()
        return World(made)

    def abort(self, status: int) -> None:
        """End every process of the job, at once."""
        self.comm.Abort(status)

    def free(self) -> None:
        """Give the communicator back; MPI cannot be finalized cleanly otherwise."""
        if self.comm in (MPI.COMM_WORLD, MPI.COMM_NULL):
            return
        with contextlib.suppress(MPI.Exception):
            self.comm.Free()

    def _complete(self, start: Callable[[Pending], None], what: Callable[[], str], limit_s: float) -> None:
        pending = self.pending()
        try:
            start(pending)
            pending.wait(what, limit_s)
        except PeerFailedError:
            self.revoke()
            pending.drain()
            raise


_AGREE_CARRIES_FLAG = frozenset({MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED})


def _nothing() -> None:
    pass
