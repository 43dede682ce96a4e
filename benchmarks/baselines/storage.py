#!/usr/bin/env python3
"""Shared storage: one object, kept in memory, written and read over TCP. A rank's side, and the server.

``storage.py ADDRESS`` prints its port and serves until its standard input is closed. A client sends one line, ``put
BYTES`` or ``get``; the answer to ``get`` is a line with the size, then the object; that to ``put``, once everything has
arrived, the line ``0``. Memory instead of a disk: the link is the limit, as with any storage that is faster.
"""

from __future__ import annotations

import io
import socket
import socketserver
import sys
import threading

_CHUNK = 1 << 20
#: Longest silence of a server or a client, seconds.
SILENCE_S = 60.0


def put(address: str, port: int, data: memoryview) -> None:
    """Store bytes; returns when the storage has them all.

    Raises:
        OSError: the storage is gone, or silent for :data:`SILENCE_S` seconds.
    """
    with socket.create_connection((address, port), timeout=SILENCE_S) as connection:
        connection.sendall(f"put {data.nbytes}\n".encode())
        for at in range(0, data.nbytes, _CHUNK):
            connection.sendall(data[at : at + _CHUNK])
        if connection.recv(2) != b"0\n":
            raise OSError(f"the storage at {address} did not take the checkpoint")


def get(address: str, port: int, into: memoryview) -> None:
    """Read what is stored.

    Raises:
        OSError: the storage is gone, or holds something of another size.
    """
    with socket.create_connection((address, port), timeout=SILENCE_S) as connection:
        connection.sendall(b"get\n")
        with connection.makefile("rb") as stream:
            size = int(stream.readline())
            if size != into.nbytes:
                raise OSError(f"the storage at {address} holds {size} bytes, not {into.nbytes}")
            _fill(stream, into)


def _fill(stream: io.BufferedIOBase, into: memoryview) -> None:
    at = 0
    while at < into.nbytes:
        n = stream.readinto(into[at : at + _CHUNK])
        if not n:
            raise OSError(f"the connection ended after {at} of {into.nbytes} bytes")
        at += n


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    stored = bytearray()


class _Handler(socketserver.StreamRequestHandler):
    timeout = SILENCE_S
    server: _Server

    def handle(self) -> None:
        words = self.rfile.readline().split()
        if words[0] == b"put":
            data = bytearray(int(words[1]))
            _fill(self.rfile, memoryview(data))
            self.server.stored = data
            self.wfile.write(b"0\n")
        else:
            data = self.server.stored
            self.wfile.write(b"%d\n" % len(data))
            for at in range(0, len(data), _CHUNK):
                self.wfile.write(memoryview(data)[at : at + _CHUNK])


def main() -> None:
    """Serve until standard input ends: whoever started this is gone then."""
    with _Server((sys.argv[1], 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()
        server.shutdown()


if __name__ == "__main__":
    main()
