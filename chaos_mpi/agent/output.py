"""What a rank prints: to the launcher while that takes it, else to a file."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from chaos_mpi.agent.frames import Frame, Kind, encode
from chaos_mpi.agent.streams import PipeWriter

#: A launcher that takes nothing for so long is not waited for: the rank would wait in its next ``print``.
STALL_S = 5.0
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
        self._log_file, self._stall_s = log_file, stall_s
        self._descriptor: int | None = None
        self._stalled = False
        self.lost = False

    async def pump(self, source: asyncio.StreamReader, kind: Kind) -> None:
        """Pass on all that comes from ``source``, to its end."""
        while data := await _read(source):
            if not self._takes():
                self._write_log(data)
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
        self._write_log(data)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _takes(self) -> bool:
        """Whether the launcher is there and takes output."""
        if self.lost or self._launcher.is_closed:
            return False
        if self._stalled and self._launcher.kept_bytes == 0:
            self._stalled = False
        return not self._stalled

    def _write_log(self, data: bytes) -> None:
        """Append to the file. That it cannot be written to must not end the rank: the output is lost then."""
        try:
            if self._descriptor is None:
                self._log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._descriptor = os.open(self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.write(self._descriptor, data)
        except OSError:
            return


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
