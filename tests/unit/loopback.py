"""Connections on addresses of the loopback network, for tests."""

from __future__ import annotations

import contextlib
import socket


def connect(stack: contextlib.ExitStack, address: str, family: int = socket.AF_INET) -> tuple[socket.socket, ...]:
    """Both ends of a connection to a server at this address; the server is on the second one's side."""
    server = stack.enter_context(socket.create_server((address, 0), family=family))
    client = stack.enter_context(socket.create_connection(server.getsockname()[:2]))
    client.settimeout(5)
    accepted, _ = server.accept()
    accepted.settimeout(5)
    return client, stack.enter_context(accepted)
