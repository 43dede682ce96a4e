"""What proxy and supervisor say to each other: frames in a stream of bytes. Pure.

A frame is a kind (one byte), a connection number (four) and a length (four, all big endian), then its content. Before
the first frame each way comes :data:`MAGIC`: a login shell may print anything first.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from chaos_mpi.errors import EngineError

#: Ends whatever a login shell prints before the supervisor speaks; the digit is the version of what follows.
MAGIC = b"\0chaos_mpi frames 1\n"
#: No more is put into one frame, so that none holds up the others for long.
MAX_CONTENT_BYTES = 1 << 20
_HEADER = struct.Struct("!BII")


class Kind(IntEnum):
    """What a frame is. The comment says who sends it, and what is in it."""

    START = 1  #: proxy: what to run, JSON
    SIGNAL = 2  #: proxy: number of a signal for the rank, JSON
    LAUNCHER_LOST = 3  #: proxy: mpirun has gone, the rank is to go on without it
    OPEN = 4  #: supervisor: the rank has made a PMIx connection
    DATA = 5  #: both: bytes of a PMIx connection
    CLOSE = 6  #: both: the end of a PMIx connection
    STDOUT = 7  #: supervisor: bytes that the rank has printed
    STDERR = 8  #: the same
    STARTED = 9  #: supervisor: the rank's process id, JSON
    EXIT = 10  #: supervisor: how the rank ended, JSON; nothing follows
    REFUSED = 11  #: supervisor: why the rank could not be started, JSON; nothing follows
    RECORD = 12  #: supervisor: what the rank has written down, kind and fields, JSON
    CONTROL_OPEN = 13  #: proxy: a client has connected to the rank's control socket
    CONTROL_DATA = 14  #: both: bytes of such a connection
    CONTROL_CLOSE = 15  #: both: its end
    CONTACT = 16  #: supervisor: how other agents reach it, JSON
    CONTACTS = 17  #: proxy: how it reaches the others, JSON
    FENCE = 18  #: supervisor: a host that is given up, to be cut off from mpirun, JSON
    FENCED = 19  #: proxy: that is done, JSON
    TOLD = 20  #: supervisor: the number of a signal that has come, JSON


class Frame(NamedTuple):
    """One frame; ``connection`` is the number of a PMIx connection, or of one to the control socket, else 0."""

    kind: Kind
    content: bytes = b""
    connection: int = 0

    def json(self) -> Any:
        """The content, where it is JSON.

        Raises:
            EngineError: it is not.
        """
        try:
            return json.loads(self.content)
        except ValueError as error:
            raise EngineError(f"a {self.kind.name} frame does not hold JSON: {self.content[:80]!r}") from error


def encode(frame: Frame) -> bytes:
    """The frame as bytes.

    Raises:
        ValueError: it is too long.
    """
    if len(frame.content) > MAX_CONTENT_BYTES:
        raise ValueError(f"a frame holds up to {MAX_CONTENT_BYTES} bytes, not {len(frame.content)}")
    return _HEADER.pack(frame.kind, frame.connection, len(frame.content)) + frame.content


def encode_json(kind: Kind, value: Any) -> bytes:
    """A frame whose content is JSON."""
    return encode(Frame(kind, json.dumps(value).encode()))


class Decoder:
    """Takes bytes as they come, gives frames.

    Attributes:
        begun: whether the other side has said that it speaks frames.
    """

    def __init__(self) -> None:
        self.begun = False
        self._buffer = bytearray()

    def feed(self, data: bytes) -> tuple[bytes, list[Frame]]:
        """What came before the first frames, as far as that is certain; and the frames that are complete.

        Raises:
            EngineError: these are no frames.
        """
        self._buffer += data
        noise = b""
        if not self.begun:
            noise = self._skip()
        return noise, self._frames() if self.begun else []

    def rest(self) -> bytes:
        """What is left when nothing more comes: of a login shell's output, or of a frame cut short."""
        return bytes(self._buffer)

    def _skip(self) -> bytes:
        at = self._buffer.find(MAGIC)
        if at >= 0:
            noise = bytes(self._buffer[:at])
            del self._buffer[: at + len(MAGIC)]
            self.begun = True
            return noise
        # The magic may have come in part.
        kept = min(len(MAGIC) - 1, len(self._buffer))
        noise = bytes(self._buffer[: len(self._buffer) - kept])
        del self._buffer[: len(noise)]
        return noise

    def _frames(self) -> list[Frame]:
        frames = []
        at = 0
        while len(self._buffer) - at >= _HEADER.size:
            kind, connection, length = _HEADER.unpack_from(self._buffer, at)
            if kind not in _KINDS or length > MAX_CONTENT_BYTES:
                raise EngineError(
                    f"proxy and supervisor do not understand each other (kind {kind}, length {length}): "
                    "is the same version of chaos_mpi installed on both hosts?"
                )
            end = at + _HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(Frame(Kind(kind), bytes(self._buffer[at + _HEADER.size : end]), connection))
            at = end
        del self._buffer[:at]
        return frames


_KINDS = frozenset(int(kind) for kind in Kind)
