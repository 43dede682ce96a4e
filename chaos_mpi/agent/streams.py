"""Pipes as streams of an asyncio program."""

from __future__ import annotations

import asyncio
import os
from typing import Self


class PipeWriter(asyncio.BaseProtocol):
    """Writes to a pipe. What cannot be written yet is kept; after the other end has closed, it is dropped."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._over = asyncio.Event()

    @classmethod
    async def open(cls, descriptor: int) -> Self:
        """Write to this descriptor, which is taken over."""
        loop = asyncio.get_running_loop()
        _, writer = await loop.connect_write_pipe(cls, os.fdopen(descriptor, "wb", buffering=0))
        return writer

    def write(self, data: bytes) -> None:
        """Write soon; does not wait."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until not much is kept; returns also when the pipe is closed."""
        await self._room.wait()

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._transport is None or self._transport.is_closing()

    @property
    def kept_bytes(self) -> int:
        """How much is not written yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    async def close(self, limit_s: float) -> None:
        """Write what is kept and close; what cannot be written within ``limit_s`` seconds is dropped."""
        if self._transport is None:
            return
        self._transport.close()
        try:
            await asyncio.wait_for(self._over.wait(), limit_s)
        except TimeoutError:
            self.abandon()

    def abandon(self) -> None:
        """Close at once; what is kept is dropped."""
        if self._transport is not None and not self._over.is_set():
            self._transport.abort()

    # -- called by asyncio ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def connection_lost(self, _: Exception | None) -> None:
        self._room.set()
        self._over.set()


async def pipe_reader(descriptor: int) -> asyncio.StreamReader:
    """Read from this descriptor, which is taken over."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    return reader
