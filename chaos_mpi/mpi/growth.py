"""How a communicator gets larger: a process is spawned, and taken in by all.

Spawning is slow and is done by one member alone, its *sponsor*, in a thread, while training goes on (MPI 4.1, section
11.8, ``MPI_Comm_spawn`` on ``MPI_COMM_SELF``). Sponsor and newcomer are then joined by a :class:`Bridge`, over which
the newcomer says when it is ready. Taking it in needs every member, and a few milliseconds: the members' communicator
and the newcomer become an intercommunicator across the bridge, which is merged (MPI 4.1, section 7.6).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from chaos_mpi.errors import EngineError, PeerFailedError, WaitTimeoutError
from chaos_mpi.mpi.channel import receive_message
from chaos_mpi.mpi.runtime import Watchdog
from chaos_mpi.mpi.world import MPI, World

_GROW_TAG = 711
_MESSAGE_TAG = 712
_POLL_S = 0.002


class Bridge:
    """The connection of a newcomer and its sponsor, seen from either side. JSON messages, in order."""

    def __init__(self, inter: MPI.Intercomm, *, newcomer: bool) -> None:
        inter.Set_errhandler(MPI.ERRORS_RETURN)
        self._inter = inter
        try:
            self.comm = inter.Merge(newcomer)
        except MPI.Exception as error:
            unblock()
            raise PeerFailedError(f"{error}") from error
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._other = 1 - self.comm.Get_rank()
        self._sent: list[tuple[MPI.Request, bytes]] = []

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; does not wait.

        Raises:
            PeerFailedError: the other side is dead.
        """
        data = json.dumps(message).encode()
        try:
            self._sent.append((self.comm.Issend([data, MPI.BYTE], self._other, _MESSAGE_TAG), data))
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error

    def poll(self) -> dict[str, Any] | None:
        """The next message, if one is here.

        Raises:
            PeerFailedError: the other side is dead, or gave the bridge up.
        """
        try:
            if self.comm.Get_failed().Get_size():
                raise PeerFailedError("the other side of the bridge has failed")
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error
        return receive_message(self.comm, self._other, _MESSAGE_TAG)

    def receive(self, limit_s: float, what: str) -> dict[str, Any]:
        """Wait for the next message.

        Raises:
            PeerFailedError: the other side is dead, or gave the bridge up.
            WaitTimeoutError: nothing came within ``limit_s`` seconds.
        """
        limit = time.monotonic() + limit_s
        while (message := self.poll()) is None:
            if time.monotonic() > limit:
                raise WaitTimeoutError(f"waited {limit_s:.0f} s for {what}")
            time.sleep(_POLL_S)
        return message

    def give_up(self) -> None:
        """Tell the other side that nothing will come of it."""
        try:
            self.comm.Revoke()
        except MPI.Exception:
            return


def unblock() -> None:
    """Let communicators be made again, after a newcomer died while one was made with it alone. Local; for a thread.

    Open MPI chooses the context id of one new communicator of a process at a time, in the order of their parents'
    indices, and does not let the next one go on if a peer dies in the middle (5.0, ``ompi/communicator/comm_cid.c``:
    error paths leave ``ompi_comm_cid_lowest_id`` as it is). All later ones would wait for ever. A duplicate of
    ``MPI_COMM_SELF``, which comes before any but those of ``MPI_COMM_WORLD``, takes its turn, and passes it on. After a
    failure among the members, the shrink of their communicator does the same, also if that is ``MPI_COMM_WORLD``, for
    which this would wait: so it is not to be called in between.
    """
    with contextlib.suppress(MPI.Exception):
        MPI.COMM_SELF.Dup().Free()


def spawn(command: Sequence[str], *, host: str, directory: str) -> Bridge:
    """Start one process and return the bridge to it, once it has initialised MPI. Blocks; call it in a thread.

    Args:
        command: program and arguments.
        host: machine it is to run on; empty for any that the launcher knows.
        directory: its working directory; empty for the launcher's.

    Raises:
        EngineError: MPI could not start it.
        PeerFailedError: it died at once.
    """
    info = MPI.Info.Create()
    if directory:
        info.Set("wdir", directory)
    if host:
        info.Set("host", host)
    try:
        inter = MPI.COMM_SELF.Spawn(command[0], list(command[1:]), 1, info)
    except MPI.Exception as error:
        unblock()
        raise EngineError(f"MPI could not start {command[0]}: {error}") from error
    finally:
        info.Free()
    return Bridge(inter, newcomer=False)


def bridge_to_sponsor() -> Bridge | None:
    """The bridge of a process that was spawned into a running job; None for one that was there from the start."""
    parent = MPI.Comm.Get_parent()
    return None if parent == MPI.COMM_NULL else Bridge(parent, newcomer=True)


def grow(world: World, bridge: Bridge | None, sponsor: int, limit_s: float) -> World:
    """Take one newcomer in; called by all members of ``world``. It gets the highest rank.

    Args:
        bridge: at the sponsor, else None.
        sponsor: its rank in ``world``.
        limit_s: the process ends when MPI has not done it by then.

    Raises:
        PeerFailedError: a member or the newcomer died meanwhile; it may have worked at other members.
    """
    peer = bridge.comm if bridge is not None else MPI.Intracomm(MPI.COMM_NULL)
    return _merged(lambda: world.comm.Create_intercomm(sponsor, peer, 1, _GROW_TAG), False, limit_s)


def enter(bridge: Bridge, limit_s: float) -> World:
    """The newcomer's part in :func:`grow`."""
    return _merged(lambda: MPI.COMM_SELF.Create_intercomm(0, bridge.comm, 0, _GROW_TAG), True, limit_s)


def part(world: World, going: Sequence[int], limit_s: float) -> World | None:
    """The communicator of the members that stay, in the same order; None at one that goes. Called by all.

    ``MPI_Comm_create_group``, which those that go need not call, would be faster; but neither a death nor a revoke ends
    it (Open MPI 5.0).

    Args:
        going: ranks of those that go.
        limit_s: the process ends when MPI has not done it by then.

    Raises:
        PeerFailedError: a member died meanwhile; it may have worked at other members.
    """
    staying = [rank for rank in range(world.size) if rank not in going]
    return _created(world, staying, "MPI_Comm_create for the members that stay", limit_s)


def arrange(world: World, order: Sequence[int], limit_s: float) -> World:
    """A communicator of the same members in another order. Called by all.

    Args:
        order: their ranks in ``world``, in the new order.
        limit_s: the process ends when MPI has not done it by then.

    Raises:
        PeerFailedError: a member died meanwhile; it may have worked at other members.
    """
    arranged = _created(world, order, "MPI_Comm_create for another order", limit_s)
    assert arranged is not None  # all of them are in it
    return arranged


def _created(world: World, ranks: Sequence[int], what: str, limit_s: float) -> World | None:
    """The communicator of these ranks, in this order; None at one that is not in it. Called by all."""
    try:
        everyone = world.comm.Get_group()
        chosen = everyone.Incl(ranks)
        with Watchdog(what, limit_s):
            comm = world.comm.Create(chosen)
        chosen.Free()
        everyone.Free()
    except MPI.Exception as error:
        raise PeerFailedError(f"{error}") from error
    return World(cast("MPI.Intracomm", comm)) if world.rank in ranks else None


def _merged(connect: Callable[[], MPI.Intercomm], newcomer: bool, limit_s: float) -> World:
    try:
        with Watchdog("MPI_Intercomm_create and merge for a newcomer", limit_s):
            inter = connect()
            inter.Set_errhandler(MPI.ERRORS_RETURN)
            world = World(inter.Merge(newcomer))
    except MPI.Exception as error:
        raise PeerFailedError(f"{error}") from error
    try:
        _connect(world, limit_s)
    except PeerFailedError:
        world.revoke()  # others may have got through, and wait for this process
        raise
    return world


def _connect(world: World, limit_s: float) -> None:
    """Let every pair exchange a word, so that all connections are up while all are known to live.

    Connections are made on first use. A process that dies before another one has ever spoken to it is not noticed by
    that one, or ends it: Open MPI aborts when a message that it has buffered turns out to have no receiver.
    """
    out, into = np.zeros(world.size, dtype=np.uint8), np.zeros(world.size, dtype=np.uint8)
    limit = time.monotonic() + limit_s
    try:
        request = world.comm.Ialltoall([out, MPI.BYTE], [into, MPI.BYTE])
        while not request.Test():
            if world.failed_ranks() or time.monotonic() > limit:
                raise PeerFailedError("a rank did not connect to the others")
            time.sleep(_POLL_S / 10)
    except MPI.Exception as error:
        raise PeerFailedError(f"{error}") from error
