"""What a process has sent, by the kernel's count: real connections, on addresses of the loopback network."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from loopback import connect

from chaos_mpi.mpi.traffic import Sent, sent_by_address

ONE, OTHER = "127.8.8.1", "127.8.8.2"
LIMIT_S = 20.0


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def sent_to(address: str, nbytes: int) -> Sent:
    """Once so much is acknowledged, which the kernel may do a moment after it was received."""
    limit = time.monotonic() + LIMIT_S
    while (sent := sent_by_address().get(address, Sent(0, 0.0))).nbytes < nbytes:
        assert time.monotonic() < limit, sent
    return sent


def pass_on(client: socket.socket, accepted: socket.socket, nbytes: int) -> None:
    thread = threading.Thread(target=client.sendall, args=(bytes(nbytes),))
    thread.start()
    left = nbytes
    while left:
        left -= len(accepted.recv(left))
    thread.join(LIMIT_S)


def test_bytes_are_counted_for_each_address(stack: contextlib.ExitStack) -> None:
    first, second, other = connect(stack, ONE), connect(stack, ONE), connect(stack, OTHER)
    for (client, accepted), nbytes in ((first, 3_000_000), (second, 1_000_000), (other, 50_000)):
        pass_on(client, accepted, nbytes)
    # One more: the kernel counts the opening of a connection as a byte.
    sent = sent_to(ONE, 4_000_000)
    assert sent.nbytes <= 4_000_002
    assert sent_to(OTHER, 50_000).nbytes <= 50_001


def test_a_peer_that_takes_nothing_keeps_a_connection_busy(stack: contextlib.ExitStack) -> None:
    client, _ = connect(stack, ONE)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(bytes(1 << 16))
    limit = time.monotonic() + LIMIT_S
    while sent_by_address()[ONE].busy_s < 0.02:
        assert time.monotonic() < limit


def test_an_ipv4_peer_of_an_ipv6_socket_has_its_ipv4_address(stack: contextlib.ExitStack) -> None:
    try:
        server = stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True))
    except (OSError, ValueError):
        pytest.skip("this machine has no IPv6")
    client = stack.enter_context(socket.create_connection((ONE, server.getsockname()[1]), source_address=(OTHER, 0)))
    accepted, _ = server.accept()
    stack.enter_context(accepted)
    client.settimeout(LIMIT_S)
    pass_on(accepted, client, 10_000)
    assert sent_to(OTHER, 10_000).nbytes <= 10_001


def test_other_descriptors_and_ended_connections_are_passed_over(stack: contextlib.ExitStack) -> None:
    pair = socket.socketpair()
    for end in pair:
        stack.enter_context(end)
    stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).connect((ONE, 9))
    stack.enter_context(socket.socket())
    before = len(os.listdir("/proc/self/fd"))
    assert ONE not in sent_by_address()
    assert len(os.listdir("/proc/self/fd")) == before
