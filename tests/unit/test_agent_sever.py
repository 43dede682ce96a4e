"""Severing: the connections of a process to given addresses are shut down, and no others. With real sockets."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback import connect

from chaos_mpi.mpi.sever import parse_table, sever

#: Addresses of this host that are not each other's: all of 127.0.0.0/8 is loopback.
DEAD, ALIVE = "127.9.9.1", "127.9.9.2"


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def test_connections_to_the_dead_end_and_others_live(stack: contextlib.ExitStack) -> None:
    dead = [connect(stack, DEAD) for _ in range(3)]
    alive, other = connect(stack, ALIVE)
    assert sever([DEAD]) == 3
    for client, accepted in dead:
        assert client.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            client.send(b"x")
        assert accepted.recv(1) == b""
        assert client.fileno() >= 0
    alive.sendall(b"x")
    assert other.recv(1) == b"x"


def test_a_reader_that_waits_is_woken(stack: contextlib.ExitStack) -> None:
    client, _ = connect(stack, DEAD)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(client.recv(1)))
    reader.start()
    sever([DEAD])
    reader.join(5)
    assert got == [b""]


def test_several_addresses_and_a_socket_with_two_descriptors(stack: contextlib.ExitStack) -> None:
    one, _ = connect(stack, DEAD)
    two, _ = connect(stack, ALIVE)
    copy = stack.enter_context(one.dup())
    assert sever([DEAD, ALIVE]) == 2
    assert [s.recv(1) for s in (one, two, copy)] == [b""] * 3


def test_ipv4_over_an_ipv6_socket(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(socket.create_server((DEAD, 0)))
    client = stack.enter_context(socket.socket(socket.AF_INET6))
    try:
        client.connect((f"::ffff:{DEAD}", server.getsockname()[1]))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert sever([DEAD]) == 1
    assert client.recv(1) == b""


def test_ipv6(stack: contextlib.ExitStack) -> None:
    try:
        client, _ = connect(stack, "::1", socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    # Both ends are in this process and have ::1 as their peer.
    assert sever(["::1"]) == 2
    assert client.recv(1) == b""


def test_a_connection_that_is_being_made(stack: contextlib.ExitStack) -> None:
    """With its queue full, a server does not answer, as a host that has vanished."""
    server = stack.enter_context(socket.socket())
    server.bind((DEAD, 0))
    server.listen(0)
    clients = []
    for _ in range(4):
        client = stack.enter_context(socket.socket())
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(server.getsockname())
        clients.append(client)
    table = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    states = {int(fields[9]): fields[3] for fields in table}
    waiting = [c for c in clients if states[os.fstat(c.fileno()).st_ino] == "02"]
    assert waiting
    assert sever([DEAD]) == len(clients)
    for client in waiting:
        with pytest.raises(OSError):  # noqa: PT011
            client.send(b"x")


def test_descriptors_that_are_reused_meanwhile(stack: contextlib.ExitStack) -> None:
    """While connections are severed, their owner closes them and opens others, which get the same descriptors."""
    server = stack.enter_context(socket.create_server((ALIVE, 0)))
    for _ in range(10):
        with contextlib.ExitStack() as inner:
            connect(inner, DEAD)  # stays
            doomed = [connect(inner, DEAD)[0] for _ in range(8)]
            numbers = {client.fileno() for client in doomed}
            fresh: list[socket.socket] = []

            def replace(doomed: list[socket.socket] = doomed, fresh: list[socket.socket] = fresh) -> None:
                for client in doomed:
                    client.close()
                    fresh.append(socket.create_connection(server.getsockname(), timeout=5))

            owner = threading.Thread(target=replace)
            owner.start()
            assert sever([DEAD]) >= 1
            owner.join(10)
            assert numbers & {client.fileno() for client in fresh}
            for client in fresh:
                accepted, _ = server.accept()
                with client, accepted:
                    client.sendall(b"x")
                    assert accepted.recv(1) == b"x"


def test_not_an_address() -> None:
    with pytest.raises(ValueError, match="edge1"):
        sever(["edge1"])


@given(st.lists(st.tuples(st.integers(1, 2**31), st.ip_addresses(v=4), st.sampled_from(["01", "0A"]))))
def test_tables_are_read_as_the_kernel_writes_them(sockets: list[tuple[int, object, str]]) -> None:
    lines = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"]
    for number, (inode, peer, state) in enumerate(sockets):
        digits = f"{int.from_bytes(peer.packed, 'little'):08X}"  # type: ignore[attr-defined]
        lines.append(
            f"{number:4}: 0100007F:1F90 {digits}:0050 {state} 00000000:00000000 00:00000000 00000000     0        0 "
            f"{inode} 1 0000000000000000 100 0 0 10 0"
        )
    assert list(parse_table("\n".join(lines))) == sockets
