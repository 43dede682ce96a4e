"""Messages and bulk data between two members of one communicator, while others do something else.

Control messages are JSON. Bulk data goes straight from and into memory: a transfer names pieces of memory, and MPI
gathers and scatters them itself (a datatype of absolute addresses, MPI 4.1, section 5.1), so nothing is staged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from chaos_mpi.errors import PeerFailedError
from chaos_mpi.mpi.memory import MPI, is_under_way
from chaos_mpi.mpi.world import World

#: Address and length in bytes.
Piece = tuple[int, int]

_MESSAGE_TAG = 721
_FIRST_DATA_TAG = 1024
#: The standard promises tags up to 32767.
_DATA_TAGS = 30000


class Transfer:
    """Bulk data on its way; the memory must stay as it is until it is done."""

    def __init__(self, request: MPI.Request, datatype: MPI.Datatype | None) -> None:
        self._request, self._datatype = request, datatype

    def done(self) -> bool:
        """Whether all has been sent or received.

        Raises:
            PeerFailedError: the other side is dead.
        """
        try:
            done = bool(self._request.Test())
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error
        if done and self._datatype is not None:
            self._datatype.Free()
            self._datatype = None
        return done


class Channel:
    """Point-to-point communication over ``world``. One thread at a time.

    All sends are synchronous ones: a small plain send counts as done when it is buffered, and when the receiver dies
    after that, Open MPI ends the sender ("Send error after request freed").
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent: list[tuple[MPI.Request, bytes]] = []
        self._gone: set[int] = set()

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._world.rank

    def failed(self) -> list[int]:
        """Ranks that are known here to be dead."""
        return self._world.failed_ranks()

    def send(self, to: int, message: dict[str, Any]) -> None:
        """Send a message to a rank; does not wait.

        Raises:
            PeerFailedError: it is dead.
        """
        data = json.dumps(message).encode()
        self._sent = [(request, kept) for request, kept in self._sent if is_under_way(request)]
        try:
            self._sent.append((self._world.comm.Issend([data, MPI.BYTE], to, _MESSAGE_TAG), data))
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error

    def poll(self, source: int) -> dict[str, Any] | None:
        """The next message from a rank, if one is here.

        Raises:
            PeerFailedError: it is dead, or another rank has said (``{"dead": [...]}``) that it is gone.
        """
        message = receive_message(self._world.comm, source, _MESSAGE_TAG)
        if message is not None:
            self._gone.update(message.get("dead", ()))
        elif source in self._gone:
            raise PeerFailedError(f"rank {source} is gone, as others say")
        return message

    def send_data(self, to: int, number: int, pieces: Sequence[Piece]) -> Transfer:
        """Start sending memory as transfer ``number``, which is to be unique among those under way between the two.

        Raises:
            PeerFailedError: the receiver is dead.
        """
        buffer, datatype = _described(pieces)
        try:
            return Transfer(self._world.comm.Issend(buffer, to, _data_tag(number)), datatype)
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error

    def receive_data(self, source: int, number: int, pieces: Sequence[Piece]) -> Transfer:
        """Start receiving transfer ``number`` into memory.

        Raises:
            PeerFailedError: the sender is dead.
        """
        buffer, datatype = _described(pieces)
        try:
            return Transfer(self._world.comm.Irecv(buffer, source, _data_tag(number)), datatype)
        except MPI.Exception as error:
            raise PeerFailedError(f"{error}") from error


def receive_message(comm: MPI.Intracomm, source: int, tag: int) -> dict[str, Any] | None:
    """The next JSON message from a rank, if one is here.

    Raises:
        PeerFailedError: it is dead, or the communicator is revoked.
    """
    status = MPI.Status()
    try:
        if not comm.Iprobe(source, tag, status):
            return None
        data = np.empty(status.Get_count(MPI.BYTE), dtype=np.uint8)
        comm.Recv([data, MPI.BYTE], source, tag)
    except MPI.Exception as error:
        raise PeerFailedError(f"{error}") from error
    return cast("dict[str, Any]", json.loads(data.tobytes()))


def _data_tag(number: int) -> int:
    return _FIRST_DATA_TAG + number % _DATA_TAGS


def _described(pieces: Sequence[Piece]) -> tuple[Any, MPI.Datatype | None]:
    if len(pieces) == 1:
        address, nbytes = pieces[0]
        return [MPI.buffer.fromaddress(address, nbytes), MPI.BYTE], None
    lengths, addresses = [nbytes for _, nbytes in pieces], [address for address, _ in pieces]
    datatype = MPI.BYTE.Create_hindexed(lengths, addresses).Commit()
    return [MPI.BOTTOM, 1, datatype], datatype
