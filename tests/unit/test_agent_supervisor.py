"""What a supervisor does with the frames of its proxy, without a rank."""

from __future__ import annotations

import asyncio
import signal
from typing import NoReturn, cast

import pytest

from chaos_mpi.agent.frames import MAGIC, Decoder, Frame, Kind, encode_json
from chaos_mpi.agent.guard import Guard
from chaos_mpi.agent.streams import PipeWriter
from chaos_mpi.agent.supervisor import Supervisor


class Broken:
    """In the place of the guard."""

    def heed(self, _: Frame) -> NoReturn:
        raise ValueError("too many connections")


def test_what_comes_after_a_frame_that_cannot_be_heeded_is_heeded(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> list[int]:
        reader = asyncio.StreamReader()
        supervisor = Supervisor(reader, PipeWriter())
        supervisor._guard, supervisor._lost = cast("Guard", Broken()), True
        told: list[int] = []
        supervisor.forward = told.append  # type: ignore[method-assign]
        supervisor._early = [Frame(Kind.CONTACTS, b"{}")]
        reader.feed_data(MAGIC + encode_json(Kind.CONTACTS, {}) + encode_json(Kind.SIGNAL, int(signal.SIGTERM)))
        reader.feed_eof()
        await supervisor._listen()
        return told

    assert asyncio.run(test()) == [signal.SIGTERM]
    assert (
        caplog.text.count("a CONTACTS frame of the proxy could not be heeded: ValueError('too many connections')") == 2
    )


def test_the_proxy_hears_that_a_signal_has_come() -> None:
    async def test() -> list[Frame]:
        supervisor = Supervisor(asyncio.StreamReader(), PipeWriter())
        written: list[bytes] = []
        supervisor._write = written.append  # type: ignore[method-assign]
        supervisor._take(Frame(Kind.SIGNAL, b"15"))
        return Decoder().feed(MAGIC + b"".join(written))[1]

    (frame,) = asyncio.run(test())
    assert (frame.kind, frame.json()) == (Kind.TOLD, signal.SIGTERM)
