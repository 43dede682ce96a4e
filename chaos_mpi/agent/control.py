"""The control socket of a rank, reachable on the launch host as well.

``chaosctl`` finds the members of a job by their sockets in the job's private directory. For a rank on another host the
proxy has one there, at which a :class:`ControlListener` takes connections. What comes goes as frames to the
:class:`ControlConnector` in the supervisor, which connects to the rank's own socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from chaos_mpi.agent import sockets
from chaos_mpi.agent.frames import Frame, Kind

#: A rank that does not take a connection within this time does not get it, seconds.
CONNECT_LIMIT_S = 2.0
_CHUNK_BYTES = 1 << 16

Send = Callable[[Frame], None]


class _Connections:
    """Connections of one end, by number."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._writers: dict[int, asyncio.StreamWriter] = {}

    async def close(self) -> None:
        """End all connections; what is on its way is still written."""
        for writer in list(self._writers.values()):
            writer.close()

    def _pass_on(self, frame: Frame) -> None:
        writer = self._writers.get(frame.connection)
        if writer is None:
            return
        if frame.kind is Kind.CONTROL_DATA:
            writer.write(frame.content)
        else:
            writer.close()

    async def _read(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers[number] = writer
        try:
            while data := await reader.read(_CHUNK_BYTES):
                self._send(Frame(Kind.CONTROL_DATA, data, number))
        except OSError:
            pass
        finally:
            del self._writers[number]
            self._send(Frame(Kind.CONTROL_CLOSE, connection=number))
            writer.close()


class ControlListener(_Connections):
    """The end at which clients connect.

    Args:
        path: of the socket.
        send: takes frames for the other end.
    """

    def __init__(self, path: Path, send: Send) -> None:
        super().__init__(send)
        self._path = path
        self._server: asyncio.Server | None = None
        self._next = 1

    async def open(self) -> None:
        """Begin to take connections.

        Raises:
            OSError: the socket cannot be made.
        """
        self._server = await asyncio.start_unix_server(self._accept, sock=sockets.listen(self._path))

    def deliver(self, frame: Frame) -> None:
        """Pass on a ``CONTROL_DATA`` or ``CONTROL_CLOSE`` frame."""
        self._pass_on(frame)

    async def close(self) -> None:
        """Take no more connections, and end those that there are."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        await super().close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self._next = self._next, self._next + 1
        self._send(Frame(Kind.CONTROL_OPEN, connection=number))
        await self._read(number, reader, writer)


class ControlConnector(_Connections):
    """The end that connects to the rank.

    Args:
        path: of the rank's socket.
        send: takes frames for the other end.
    """

    def __init__(self, path: Path, send: Send) -> None:
        super().__init__(send)
        self._path = path
        self._early: dict[int, list[Frame]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def deliver(self, frame: Frame) -> None:
        """Heed a ``CONTROL_OPEN``, or pass on a ``CONTROL_DATA`` or ``CONTROL_CLOSE`` frame."""
        if frame.kind is Kind.CONTROL_OPEN:
            self._early[frame.connection] = []
            task = asyncio.get_running_loop().create_task(self._serve(frame.connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif frame.connection in self._early:
            self._early[frame.connection].append(frame)
        else:
            self._pass_on(frame)

    async def _serve(self, number: int) -> None:
        try:
            connection = await asyncio.to_thread(sockets.connect, self._path, CONNECT_LIMIT_S)
        except OSError:
            del self._early[number]
            self._send(Frame(Kind.CONTROL_CLOSE, connection=number))
            return
        connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        self._writers[number] = writer
        for frame in self._early.pop(number):
            self._pass_on(frame)
        await self._read(number, reader, writer)
