"""The PMIx connection of a rank whose PMIx server is elsewhere.

A PMIx client ends its process when it loses the connection to its server, which is ``mpirun``. So the rank connects
to a :class:`Relay` in its supervisor instead, on the loopback interface. From there the bytes go as frames to the
:class:`Upstream` in the proxy, which connects to the real server. When that end closes, or all the way to it is lost,
the relay keeps the rank's end open, and the rank goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from chaos_mpi.agent.environment import Endpoint
from chaos_mpi.agent.frames import Frame, Kind

log = logging.getLogger("chaos_mpi.agent")

LOOPBACK = "127.0.0.1"
_CHUNK_BYTES = 1 << 16
#: How the kernel writes a socket in /proc/net/tcp: local and remote address, the state, and the user.
_TCP_TABLE = Path("/proc/net/tcp")

Send = Callable[[Frame], None]


class Relay:
    """Takes the PMIx connections of one rank, and never ends one that has served it.

    Args:
        send: takes frames for the other side.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._server: asyncio.Server | None = None
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._served: set[int] = set()
        self._next = 1

    async def listen(self) -> Endpoint:
        """Begin to take connections; the address is on loopback, the port is one that is free."""
        self._server = await asyncio.start_server(self._accept, LOOPBACK, 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return Endpoint(host, port)

    def deliver(self, frame: Frame) -> None:
        """Pass on a ``DATA`` or ``CLOSE`` frame of the other side."""
        writer = self._writers.get(frame.connection)
        if writer is None:
            return
        if frame.kind is Kind.DATA:
            self._served.add(frame.connection)
            writer.write(frame.content)
        elif frame.connection not in self._served:
            # The server would not have this client. Kept open, the client would wait for an answer for ever.
            writer.close()

    async def close(self) -> None:
        """Take no more connections and end those that there are; for when the rank has ended."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers.values()):
            writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if (user := user_of_connection(peer, writer.get_extra_info("sockname"))) not in (None, os.geteuid()):
            log.warning("refused a connection from %s to the relay: it is of user %s, not of this one", peer, user)
            writer.close()
            return
        number, self._next = self._next, self._next + 1
        self._writers[number] = writer
        self._send(Frame(Kind.OPEN, connection=number))
        try:
            while data := await reader.read(_CHUNK_BYTES):
                self._send(Frame(Kind.DATA, data, number))
        except OSError:
            pass
        finally:
            del self._writers[number]
            self._served.discard(number)
            self._send(Frame(Kind.CLOSE, connection=number))
            writer.close()


class Upstream:
    """The other end of the connections of a :class:`Relay`, beside the PMIx server.

    Args:
        server: where that listens.
        send: takes frames for the relay.
    """

    def __init__(self, server: Endpoint, send: Send) -> None:
        self._server, self._send = server, send
        self._waiting: dict[int, asyncio.Queue[bytes | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def deliver(self, frame: Frame) -> None:
        """Pass on an ``OPEN``, ``DATA`` or ``CLOSE`` frame of the relay."""
        if frame.kind is Kind.OPEN:
            self._waiting[frame.connection] = asyncio.Queue()
            task = asyncio.get_running_loop().create_task(self._serve(frame.connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif frame.connection in self._waiting:
            self._waiting[frame.connection].put_nowait(frame.content if frame.kind is Kind.DATA else None)

    async def _serve(self, number: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(*self._server)
        except OSError as error:
            log.error("the PMIx server at %s:%d cannot be reached: %s", *self._server, error)
            del self._waiting[number]
            self._send(Frame(Kind.CLOSE, connection=number))
            return
        back = asyncio.get_running_loop().create_task(self._read(number, reader))
        queue = self._waiting[number]
        try:
            while (data := await queue.get()) is not None:
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            del self._waiting[number]
            writer.close()
            await back

    async def _read(self, number: int, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                self._send(Frame(Kind.DATA, data, number))
        except OSError:
            pass
        self._send(Frame(Kind.CLOSE, connection=number))


def user_of_connection(client: tuple[str, int], server: tuple[str, int], table: str | None = None) -> int | None:
    """The user whose process made a TCP connection within this host (proc(5), /proc/net/tcp).

    Args:
        client: address of the end that connected.
        server: the other address.
        table: text of /proc/net/tcp; default: as it is now.

    Returns:
        None when the kernel does not tell.
    """
    if table is None:
        try:
            table = _TCP_TABLE.read_text()
        except OSError:
            return None
    wanted = [_kernel_form(client), _kernel_form(server)]
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == wanted:
            return int(fields[7])
    return None


def _kernel_form(address: tuple[str, int]) -> str:
    host = int.from_bytes(bytes(int(part) for part in address[0].split(".")), "little")
    return f"{host:08X}:{address[1]:04X}"
