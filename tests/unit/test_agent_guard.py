"""What a supervisor does when members are removed, or its own node is: frames to the proxy, and words to the rank."""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import Collection, Coroutine
from typing import Any

import pytest

from chaos_mpi.agent import guard as module
from chaos_mpi.agent.frames import MAGIC, Decoder, Frame, Kind
from chaos_mpi.agent.guard import Guard, Settings
from chaos_mpi.agent.link import AgentLink
from chaos_mpi.agent.losses import Removal
from chaos_mpi.agent.talk import DISOWNED
from chaos_mpi.errors import ConfigError, EngineError
from chaos_mpi.monitor.cluster import Timing

LIMIT_S = 20.0
REMOVAL = Removal(("b:1",), ("b",), ("10.0.0.2",))


class Beside:
    """A guard, and all that it does to others."""

    def __init__(self, network: str = "lo") -> None:
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.said: list[str] = []
        self.killed = asyncio.Event()
        self.severed, self.stopped = queue.SimpleQueue[Collection[str]](), queue.SimpleQueue[str]()
        self._decoder = Decoder()
        self._decoder.feed(MAGIC)
        settings = Settings("a", False, Timing(limit_s=0.3), network)
        self.guard = Guard(settings, None, self._write, self.said.append, self.killed.set)

    def _write(self, data: bytes) -> None:
        for frame in self._decoder.feed(data)[1]:
            self.frames.put_nowait(frame)

    async def start(self) -> AgentLink:
        """Have the rank start, and connect."""
        variables = await self.guard.open()
        self.guard.started("a:1")
        contact = (await self.frames.get()).json()
        assert (contact["member"], contact["host"], contact["addresses"][0]) == ("a:1", "a", "127.0.0.1")
        self.guard.heed(Frame(Kind.CONTACTS, b'{"contacts": [], "first": ["a:1"], "ended": {}, "disowned": []}'))
        link = await asyncio.to_thread(AgentLink.open, variables, self.severed.put, self.stopped.put)
        assert link is not None
        assert await asyncio.to_thread(link.may_go_on_without, ["x:1"], LIMIT_S) == ""
        return link


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_S))


@pytest.mark.parametrize("answered", [True, False])
def test_a_host_is_fenced_before_it_is_severed(answered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And severed also when there is no launcher left that could fence it."""
    monkeypatch.setattr(module, "FENCE_LIMIT_S", 2 * LIMIT_S if answered else 0.05)

    async def test() -> None:
        beside = Beside()
        link = await beside.start()
        beside.guard._removed(REMOVAL)
        frame = await beside.frames.get()
        assert (frame.kind, frame.json()) == (Kind.FENCE, "b")
        if answered:
            assert await asyncio.to_thread(link.may_go_on_without, ["x:1"], LIMIT_S) == ""
            assert beside.severed.empty()
            beside.guard.heed(Frame(Kind.FENCED, b'"b"'))
        assert await asyncio.to_thread(beside.severed.get, timeout=LIMIT_S) == ["10.0.0.2"]
        await beside.guard.close()

    run(test())


def test_a_rank_that_must_not_go_on_is_told_and_then_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_LIMIT_S", 0.1)

    async def test() -> None:
        beside = Beside()
        link = await beside.start()
        beside.guard._stopped("a:1 was cut off")
        assert await asyncio.to_thread(beside.stopped.get, timeout=LIMIT_S) == "a:1 was cut off"
        assert link.may_go_on_without([], LIMIT_S) == "a:1 was cut off"
        assert beside.said[0].startswith("chaos_mpi: a: a:1 was cut off; this rank ends")
        await beside.killed.wait()
        await beside.guard.close()

    run(test())


@pytest.mark.parametrize("stopped_first", [True, False])
def test_a_rank_that_saves_its_state_is_not_killed_meanwhile(
    stopped_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_LIMIT_S", LIMIT_S)

    async def test() -> None:
        beside = Beside()
        link = await beside.start()
        guard, loop = beside.guard, asyncio.get_running_loop()

        def left_s() -> float:
            return guard._killing.when() - loop.time() if guard._killing is not None else 0.0

        try:
            if stopped_first:
                guard._stopped("a:1 was cut off")
                link.saving(100 * LIMIT_S)
            else:
                link.saving(100 * LIMIT_S)
                assert await asyncio.to_thread(link.may_go_on_without, ["x:1"], LIMIT_S) == "", "it has been heard"
                assert guard._killing is None, "nothing has told the rank to stop"
                guard._stopped("a:1 was cut off")
            while left_s() < 90 * LIMIT_S:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(module, "STOP_LIMIT_S", 0.1)
            link.saving(0.0)
            await beside.killed.wait()
        finally:
            await guard.close()

    run(test())


def test_a_rank_that_is_dead_to_mpi_is_killed() -> None:
    async def test() -> None:
        beside = Beside()
        await beside.start()
        for _ in range(2):
            beside.guard._receive("b:1", {"kind": DISOWNED})
        await beside.killed.wait()
        (line,) = beside.said
        assert line.startswith("chaos_mpi: a: the connection with the launch host was lost")
        await beside.guard.close()

    run(test())


def test_a_host_that_is_not_in_the_network() -> None:
    async def test() -> None:
        with pytest.raises(ConfigError, match=r"no address of .* is in the network '198.51.100.0/24'"):
            await Beside("198.51.100.0/24").guard.open()

    run(test())


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    monkeypatch.delitem(sys.modules, "chaos_mpi.agent.mesh", raising=False)

    async def test() -> None:
        with pytest.raises(ConfigError, match="pip install pyzmq"):
            await Beside().guard.open()

    asyncio.run(test())


def test_a_proxy_that_does_not_make_sense() -> None:
    async def test() -> None:
        beside = Beside()
        await beside.start()
        with pytest.raises(EngineError, match="does not hold JSON"):
            beside.guard.heed(Frame(Kind.CONTACTS, b"{"))
        with pytest.raises(ConfigError, match="a contact lacks"):
            beside.guard.heed(Frame(Kind.CONTACTS, b'{"contacts": [{"member": "b:1"}], "first": null}'))
        await beside.guard.close()

    run(test())
