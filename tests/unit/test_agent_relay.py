"""The relay of PMIx connections and its other end, with real sockets: what goes through, and what stays open."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

from chaos_mpi.agent.environment import Endpoint
from chaos_mpi.agent.frames import Frame, Kind
from chaos_mpi.agent.relay import Relay, Upstream, user_of_connection

LIMIT_S = 10.0
#: As the kernel writes it: 127.0.0.1:40000 to 127.0.0.1:8080, of user 1001.
TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1
   2: 0100007F:9C40 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1001        0 3 1 0 20 4 30 10 -1
"""

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def with_server(server: Server, client: Callable[[Relay, Endpoint], Awaitable[None]]) -> None:
    """Run a client of a relay whose other end has this server."""
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    relay = Relay(lambda frame: upstream.deliver(frame))
    upstream = Upstream(Endpoint(*listening.sockets[0].getsockname()), relay.deliver)
    endpoint = await relay.listen()
    assert endpoint.host == "127.0.0.1"
    try:
        await asyncio.wait_for(client(relay, endpoint), LIMIT_S)
    finally:
        await relay.close()
        listening.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()


def test_bytes_go_through_both_ways_and_connections_do_not_mix() -> None:
    async def client(_: Relay, endpoint: Endpoint) -> None:
        pairs = [await asyncio.open_connection(*endpoint) for _ in range(3)]
        sent = [bytes([number]) * 300_000 for number in range(3)]
        for (_, writer), data in zip(pairs, sent, strict=True):
            writer.write(data)
        assert [await reader.readexactly(300_000) for reader, _ in pairs] == sent
        for _, writer in pairs:
            writer.close()

    asyncio.run(with_server(echo, client))


def test_the_end_of_the_client_reaches_the_server() -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(100):
                pass
            writer.close()
            ended.set()

        async def client(_: Relay, endpoint: Endpoint) -> None:
            _, writer = await asyncio.open_connection(*endpoint)
            writer.write(b"hello")
            await writer.drain()
            writer.close()
            await ended.wait()

        await with_server(server, client)

    asyncio.run(run())


def test_a_client_that_was_served_stays_connected_when_the_server_ends() -> None:
    async def run() -> None:
        closed = asyncio.Event()

        async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(5))
            writer.transport.abort()  # a reset, as of a process that is killed with data unread
            closed.set()

        async def client(relay: Relay, endpoint: Endpoint) -> None:
            reader, writer = await asyncio.open_connection(*endpoint)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            await closed.wait()
            # Another client shows that the end of the first one's connection has been dealt with: frames are in order.
            for _ in range(3):
                writer.write(b"x")
                await writer.drain()
                other, other_writer = await asyncio.open_connection(*endpoint)
                other_writer.write(b"12345")
                assert await other.readexactly(5) == b"12345"
            assert not reader.at_eof()

        await with_server(server, client)

    asyncio.run(run())


def test_a_client_that_the_server_refuses_is_told() -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def client(_: Relay, endpoint: Endpoint) -> None:
        reader, _ = await asyncio.open_connection(*endpoint)
        assert await reader.read() == b""

    asyncio.run(with_server(refuse, client))


def test_a_server_that_is_not_there_ends_the_client() -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        relay = Relay(lambda frame: upstream.deliver(frame))
        upstream = Upstream(Endpoint("127.0.0.1", port), relay.deliver)
        reader, _ = await asyncio.open_connection(*await relay.listen())
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        await relay.close()

    asyncio.run(run())


def test_frames_of_connections_that_are_over_are_nothing() -> None:
    frames: list[Frame] = []
    relay = Relay(frames.append)
    relay.deliver(Frame(Kind.DATA, b"x", 7))
    relay.deliver(Frame(Kind.CLOSE, connection=7))
    assert frames == []


def test_whose_a_connection_is() -> None:
    client, server = ("127.0.0.1", 40000), ("127.0.0.1", 8080)
    assert user_of_connection(client, server, TABLE) == 1001
    assert user_of_connection(client, ("127.0.0.1", 8081), TABLE) is None
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as connection,
    ):
        assert user_of_connection(connection.getsockname(), connection.getpeername()) == os.geteuid()
