"""The network between agents, over loopback: who may send, and what a peer that is dead or strange can do."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NoReturn

import pytest
import zmq

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.mesh import MAX_MESSAGE_BYTES, Mesh
from chaos_mpi.errors import EngineError

LIMIT_S = 20.0
LOOPBACK = (ipaddress.ip_interface("127.0.0.1/8"),)


class End:
    """An agent's end of the network, and what it was sent."""

    def __init__(self, name: str) -> None:
        self.got: list[tuple[str, dict[str, Any]]] = []
        self.mesh = Mesh(LOOPBACK, lambda sender, message: self.got.append((sender, message)))
        self.contact = Contact(f"{name}:1", name, self.mesh.addresses, self.mesh.port, self.mesh.key)


@contextlib.asynccontextmanager
async def ends(*names: str) -> AsyncIterator[list[End]]:
    made = [End(name) for name in names]
    try:
        yield made
    finally:
        for end in made:
            await end.mesh.close()


def introduce(*known: End) -> None:
    for one in known:
        for other in known:
            one.mesh.know(other.contact)


async def until(condition: Callable[[], object], do: Callable[[], object] = lambda: None) -> None:
    """Repeat until the condition holds."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            do()
            await asyncio.sleep(0.01)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * LIMIT_S))


def test_a_message_arrives_and_its_sender_is_known_by_the_key() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            introduce(a, b)
            await until(lambda: b.got, lambda: a.mesh.send("b:1", {"kind": "x", "member": "c:9", "sender": "c:9"}))
            assert b.got[0] == ("a:1", {"kind": "x", "member": "c:9", "sender": "c:9"})

    run(test())


def test_an_unknown_key_gets_nothing_through_until_it_is_known() -> None:
    async def test() -> None:
        async with ends("a", "b", "c") as (a, b, c):
            introduce(a, b)
            c.mesh.know(a.contact)  # a does not know c
            await until(lambda: len(a.got) > 2, lambda: (c.mesh.send("a:1", {}), b.mesh.send("a:1", {})))
            assert {sender for sender, _ in a.got} == {"b:1"}
            a.mesh.know(c.contact)
            await until(lambda: ("c:1", {}) in a.got, lambda: c.mesh.send("a:1", {}))

    run(test())


def test_a_peer_that_was_forgotten_is_not_heard() -> None:
    async def test() -> None:
        async with ends("a", "b", "c") as (a, b, c):
            introduce(a, b, c)
            await until(
                lambda: len({sender for sender, _ in a.got}) == 2, lambda: [x.mesh.send("a:1", {}) for x in (b, c)]
            )
            a.mesh.forget("b:1")
            a.got.clear()
            await until(lambda: len(a.got) > 5, lambda: [x.mesh.send("a:1", {}) for x in (b, c)])
            assert {sender for sender, _ in a.got} == {"c:1"}
            assert not a.mesh.send("b:1", {})

    run(test())


def test_a_peer_that_cannot_be_connected_with_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise zmq.ZMQError(errno.EMFILE)

    async def test() -> None:
        async with ends("a", "b", "c") as (a, b, c):
            introduce(a, b)

            def take(sender: str, message: dict[str, Any]) -> None:
                a.got.append((sender, message))
                a.mesh.know(c.contact)  # as when one agent tells another of a third

            monkeypatch.setattr(a.mesh, "_receive", take)
            with monkeypatch.context() as shortage:
                shortage.setattr(Mesh, "_connect", fail)
                await until(lambda: len(a.got) > 2, lambda: b.mesh.send("a:1", {}))
                assert not a.mesh.send("c:1", {})
            introduce(a, c)
            await until(lambda: c.got, lambda: a.mesh.send("c:1", {}))

    run(test())


def test_the_key_of_another_server_is_not_accepted() -> None:
    """Who listens at the port of an agent, but has not its key, gets nothing."""

    async def test() -> None:
        async with ends("a", "b", "impostor") as (a, b, impostor):
            moved = Contact("b:1", "b", b.contact.addresses, impostor.mesh.port, b.contact.key)
            a.mesh.know(moved)
            impostor.mesh.know(a.contact)
            b.mesh.know(a.contact)
            a.mesh.know(b.contact)  # found again where it is
            await until(lambda: b.got, lambda: a.mesh.send("b:1", {}))
            assert not impostor.got

    run(test())


def test_garbage_does_no_harm() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            introduce(a, b)
            streams = [socket.create_connection(("127.0.0.1", b.mesh.port)) for _ in range(3)]
            for stream, garbage in zip(streams, (b"", os.urandom(2000), b"GET / HTTP/1.1\r\n\r\n"), strict=True):
                stream.sendall(garbage)
            plain = zmq.Context().socket(zmq.PUSH)
            plain.linger = 0
            plain.connect(f"tcp://127.0.0.1:{b.mesh.port}")
            with contextlib.suppress(zmq.Again):
                plain.send(b"{}", zmq.DONTWAIT)
            await until(lambda: b.got, lambda: a.mesh.send("b:1", {"n": 1}))
            assert all(entry == ("a:1", {"n": 1}) for entry in b.got)
            for stream in streams:
                stream.close()
            plain.context.destroy(linger=0)

    run(test())


def test_a_known_peer_that_sends_nonsense_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            introduce(a, b)
            sender = a.mesh._senders["b:1"]

            def send() -> None:
                for data in (b"\xff", b"[1]", b"{}"):
                    with contextlib.suppress(zmq.Again):
                        sender.send(data, zmq.DONTWAIT)

            await until(lambda: b.got, send)
            assert all(entry == ("a:1", {}) for entry in b.got)
            assert [record.message.partition(":1 is ignored")[0] for record in caplog.records] == ["a message of a"]

    run(test())


def test_too_long_a_message_is_not_sent() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            introduce(a, b)
            await until(lambda: b.got, lambda: a.mesh.send("b:1", {}))
            assert not a.mesh.send("b:1", {"x": "x" * MAX_MESSAGE_BYTES})
            assert a.mesh.send("b:1", {"x": "x" * (MAX_MESSAGE_BYTES - 100)})
            await until(lambda: len(b.got[-1][1].get("x", "")) == MAX_MESSAGE_BYTES - 100)

    run(test())


def test_peers_that_are_dead_or_do_not_read_hold_up_nobody() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            introduce(a, b)
            nobodys = [zmq.curve_keypair()[0].decode() for _ in range(3)]
            with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections and says nothing
                port = deaf.getsockname()[1]
                a.mesh.know(Contact("deaf:1", "deaf", ("127.0.0.1",), port, nobodys[0]))
                a.mesh.know(Contact("dead:1", "dead", ("127.0.0.1",), 1, nobodys[1]))
                a.mesh.know(Contact("far:1", "far", ("192.0.2.1",), 9, nobodys[2]))  # RFC 5737: nobody's
                for _ in range(1000):
                    for name in ("deaf:1", "dead:1", "far:1"):
                        assert not a.mesh.send(name, {"x": "x" * 1000})
                await until(lambda: b.got, lambda: a.mesh.send("b:1", {}))

    run(test())


def test_a_peer_that_stops_reading_is_dropped_to_and_not_waited_for() -> None:
    async def test() -> None:
        async with ends("a", "b", "c") as (a, b, c):
            introduce(a, b, c)
            await until(lambda: b.got and c.got, lambda: [a.mesh.send(name, {}) for name in ("b:1", "c:1")])
            b.mesh._tasks[1].cancel()  # as if its process was stopped
            filler = {"x": "x" * 20_000}
            await until(lambda: not a.mesh.send("b:1", filler), lambda: a.mesh.send("b:1", filler))
            c.got.clear()
            await until(lambda: c.got, lambda: a.mesh.send("c:1", {}))

    run(test())


def test_a_peer_that_comes_back_with_another_key_and_port() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            introduce(a, b)
            await until(lambda: b.got, lambda: a.mesh.send("b:1", {}))
            await b.mesh.close()
            async with ends("b") as (again,):
                introduce(a, again)
                await until(lambda: again.got, lambda: a.mesh.send("b:1", {"n": 2}))
                assert again.got[0] == ("a:1", {"n": 2})
                await until(lambda: a.got, lambda: again.mesh.send("a:1", {}))

    run(test())


def test_a_connection_can_be_made_anew() -> None:
    async def test() -> None:
        async with ends("a", "b") as (a, b):
            introduce(a, b)
            a.mesh.reconnect("b:1")
            await until(lambda: b.got, lambda: a.mesh.send("b:1", {"n": 1}))
            assert set(map(repr, b.got)) == {repr(("a:1", {"n": 1}))}
            a.mesh.reconnect("nobody:1")
            a.mesh.forget("b:1")
            a.mesh.reconnect("b:1")
            assert not a.mesh.send("b:1", {"n": 2})

    run(test())


def test_an_address_that_is_not_of_this_machine() -> None:
    async def test() -> None:
        with pytest.raises(EngineError, match=r"cannot listen at 192\.0\.2\.1.*--network"):
            Mesh((ipaddress.ip_interface("192.0.2.1/24"),), lambda *_: None)

    run(test())
