"""What a rank prints: to the launcher while that takes it, else to a file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from pathlib import Path

from chaos_mpi.agent.frames import Frame, Kind, encode
from chaos_mpi.agent.streams import PipeWriter

#: A launcher that takes nothing for so long is not waited for: the rank would wait in its next ``print``.
STALL_S = 5.0
#: A file system that takes nothing keeps so much waiting, at most; and an agent that ends waits so long for it.
MOST_WAITING_BYTES = 8 << 20
CLOSE_LIMIT_S = 1.0
#: A file is put aside when it would get larger, and with it the one that was put aside before goes.
LOG_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 16


class Output:
    """Passes the output of one rank on.

    Args:
        launcher: stream to the proxy.
        log_file: takes what the proxy does not; made when first needed.
        stall_s: how long a proxy that takes nothing is waited for.

    Attributes:
        lost: to be set when the launcher has gone.
    """

    def __init__(self, launcher: PipeWriter, log_file: Path, stall_s: float = STALL_S) -> None:
        self._launcher = launcher
        self._file, self._stall_s = LogFile(log_file), stall_s
        self._stalled = False
        self.lost = False

    async def pump(self, source: asyncio.StreamReader, kind: Kind) -> None:
        """Pass on all that comes from ``source``, to its end."""
        while data := await _read(source):
            if not self._takes():
                self._file.write(data)
                continue
            self._launcher.write(encode(Frame(kind, data)))
            try:
                await asyncio.wait_for(self._launcher.drain(), self._stall_s)
            except TimeoutError:
                self._stalled = True

    def say(self, line: str) -> None:
        """Add a line to what the rank prints on standard error, and to the file.

        What has to be said is why this node does not go on. The launcher may be cut off from it at this very moment.
        """
        data = line.encode(errors="replace") + b"\n"
        if self._takes():
            self._launcher.write(encode(Frame(Kind.STDERR, data)))
        self._file.write(data)

    def close(self) -> None:
        """Close the file, once all is in it or after a limit."""
        self._file.close()

    def _takes(self) -> bool:
        """Whether the launcher is there and takes output."""
        if self.lost or self._launcher.is_closed:
            return False
        if self._stalled and self._launcher.kept_bytes == 0:
            self._stalled = False
        return not self._stalled


class LogFile:
    """A file that is written to by a thread: a file system that hangs must not keep the agent from its heartbeats.

    Args:
        path: of the file; made when first needed. The same name with ``.1`` has what came before, if that is much.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def write(self, data: bytes) -> None:
        """Append. What cannot be written is lost: that must not end the rank, nor take its host's memory."""
        with self._changed:
            if self._closed or self._waiting_bytes > MOST_WAITING_BYTES:
                return
            self._waiting.append(data)
            self._waiting_bytes += len(data)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="chaos_mpi-output", daemon=True)
                self._thread.start()

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> None:
        """Return when all is written, or after a limit."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(limit_s)

    def _run(self) -> None:
        descriptor, size = -1, 0
        while (data := self._next()) is not None:
            try:
                if descriptor >= 0 and size + len(data) > LOG_BYTES:
                    os.close(descriptor)
                    descriptor = -1
                    with contextlib.suppress(FileNotFoundError):  # somebody has removed it
                        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
                if descriptor < 0:
                    self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                    size = os.fstat(descriptor).st_size
                while data:
                    written = os.write(descriptor, data)
                    data, size = data[written:], size + written
            except OSError:  # it may be full for a while
                continue
        if descriptor >= 0:
            os.close(descriptor)

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            data = self._waiting.popleft()
            self._waiting_bytes -= len(data)
            return data


def default_log_directory(environ: dict[str, str] | None = None) -> Path:
    """Where output goes when nothing is said: the user's state directory (XDG Base Directory Specification)."""
    environ = dict(os.environ) if environ is None else environ
    state = environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "chaos_mpi" / "logs"


async def _read(source: asyncio.StreamReader) -> bytes:
    try:
        return await source.read(_CHUNK_BYTES)
    except OSError:  # how a terminal ends
        return b""
