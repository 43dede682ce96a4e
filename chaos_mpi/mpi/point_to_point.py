"""Messages between two members: tensors that one sends and the other receives, matched by rank and tag."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

import torch

from chaos_mpi.errors import GroupBrokenError, MismatchError, WaitTimeoutError
from chaos_mpi.mpi.memory import MPI, is_under_way, moved
from chaos_mpi.mpi.world import World

#: Ask who has failed, and let others have the core, this often while waiting.
_LIVENESS_PERIOD_S = 0.002
#: The standard promises tags up to 32767; what is below is the user's, and what lies above belongs to the package.
MAX_TAG = 32000


class Message:
    """A tensor on its way. It must stay as it is until :meth:`test` says that it is done.

    Args:
        lines: what it goes over.
        tensor: contiguous, on the CPU.
        peer: rank of the other side; None to receive from whoever sends first.
        send: the direction.

    Attributes:
        source: rank that it came from, once that is known; -1 before.
    """

    def __init__(self, lines: PointToPoint, tensor: torch.Tensor, peer: int | None, tag: int, send: bool) -> None:
        self._lines, self._tensor, self._peer, self._tag = lines, tensor, peer, tag
        self._send, self._done = send, False
        self._request: MPI.Request | None = None
        self.source = -1 if peer is None else peer
        if peer is not None:
            self._start(peer)

    @property
    def what(self) -> str:
        """The call in words."""
        if self._send:
            return f"send to rank {self._peer} with tag {self._tag}"
        return f"receive from {'any rank' if self._peer is None else f'rank {self._peer}'} with tag {self._tag}"

    def test(self) -> bool:
        """Whether the tensor has been received, here or at the other side.

        Raises:
            GroupBrokenError: the other side has died, or, if it may be any rank, all others have.
            MismatchError: what was sent does not fit into the tensor.
        """
        if self._done:
            return True
        if self._request is None and not self._find_sender():
            return False
        try:
            self._done = bool(self._request.Test()) if self._request is not None else False
        except MPI.Exception as error:
            self._fail(error)
        self._lines.under_way -= self._done
        if not self._done and self.source in self._lines.world.failed_ranks():
            self.give_up()
            self._fail(None)
        return self._done

    def wait(self, limit_s: float) -> None:
        """Wait until it is done, yielding the core to other ranks meanwhile.

        Raises:
            GroupBrokenError, MismatchError: as :meth:`test`.
            WaitTimeoutError: not done within ``limit_s`` seconds.
        """
        begun = looked = time.monotonic()
        while not self.test():
            os.sched_yield()
            now = time.monotonic()
            if now - looked > _LIVENESS_PERIOD_S:
                looked = now
                self._lines.meanwhile()
                if now - begun > limit_s:
                    self.give_up()
                    raise WaitTimeoutError(f"waited {limit_s:g} s to {self.what}: no rank has made the matching call")

    def _start(self, peer: int) -> None:
        self._lines.under_way += 1
        comm, buffer = self._lines.world.comm, moved(self._tensor, self._tensor.numel())
        try:
            # Synchronous: a small plain send counts as done when it is buffered, and when the receiver dies after
            # that, Open MPI ends the sender.
            self._request = comm.Issend(buffer, peer, self._tag) if self._send else comm.Irecv(buffer, peer, self._tag)
        except MPI.Exception as error:
            self._fail(error)

    def _find_sender(self) -> bool:
        # And not by MPI_ANY_SOURCE, which fails for all when any rank of the communicator has died.
        world = self._lines.world
        failed = world.failed_ranks()
        others = [rank for rank in range(world.size) if rank not in failed]
        if others == [world.rank] and world.size > 1:
            raise GroupBrokenError(f"cannot {self.what}: all other ranks have died")
        for rank in others:
            try:
                found = world.comm.Iprobe(rank, self._tag)
            except MPI.Exception as error:
                self.source = rank
                self._fail(error)
            if found:
                self.source = rank
                self._start(rank)
                return True
        return False

    def give_up(self) -> None:
        """Wait for it no more."""
        if self._request is None or self._done:
            return
        self._done = True
        if not self._send:
            with contextlib.suppress(MPI.Exception):
                self._request.Cancel()  # or it would take a message that is meant for a later one
        self._lines.keep(self._request, self._tensor)

    def let_go(self) -> None:
        """Nobody asks for it any more; it stays under way. Calls no MPI, so that it may be called anywhere."""
        if self._request is not None and not self._done:
            self._lines.keep(self._request, self._tensor)

    def _fail(self, error: MPI.Exception | None) -> None:
        self._done = True
        if error is not None and error.Get_error_class() == MPI.ERR_TRUNCATE:
            shape = tuple(self._tensor.shape)
            raise MismatchError(
                f"cannot {self.what}: rank {self.source} sent more than fits into a tensor of {self._tensor.dtype} "
                f"{shape}; both sides have to pass tensors of one shape and dtype"
            ) from error
        raise GroupBrokenError(
            f"cannot {self.what}: rank {self.source} has died{f' ({error})' if error is not None else ''}"
        ) from error


class PointToPoint:
    """Messages over one communicator, which is used for nothing else and never revoked.

    So a death is seen by those that talk with the dead one, and not by others.

    Args:
        world: the communicator.
        meanwhile: called again and again while a message is waited for.

    Attributes:
        under_way: messages that were begun and have not come to a good end.
    """

    def __init__(self, world: World, meanwhile: Callable[[], None]) -> None:
        self.world = world
        self.meanwhile = meanwhile
        self.under_way = 0
        self._kept: list[tuple[MPI.Request, torch.Tensor]] = []

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> Message:
        """Start to send; done when the other side receives it.

        Raises:
            GroupBrokenError: the receiver is dead.
        """
        self._forget_finished()
        return Message(self, tensor, to, tag, True)

    def receive(self, tensor: torch.Tensor, source: int | None, tag: int) -> Message:
        """Start to receive from a rank, or from whoever sends first.

        Raises:
            GroupBrokenError: the sender is dead.
        """
        return Message(self, tensor, source, tag, False)

    def keep(self, request: MPI.Request, tensor: torch.Tensor) -> None:
        """Keep the memory of a message that is not waited for any more, since MPI may still use it."""
        self._kept.append((request, tensor))

    def _forget_finished(self) -> None:
        kept, self._kept = self._kept, []
        self._kept += [(request, tensor) for request, tensor in kept if is_under_way(request)]
