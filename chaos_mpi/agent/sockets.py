"""Sockets in the file system, for their owner alone."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

#: Connections that wait to be taken. Further ones are refused at once.
_BACKLOG = 128
_RETRY_PERIOD_S = 0.01


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """Another name of ``path`` in this process, short enough for a socket: the kernel takes 107 bytes."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """A stream socket that listens at ``path``, with mode 0600.

    Raises:
        OSError: it cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with short_name(path) as name:
            listener.bind(name)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def connect(path: Path, limit_s: float) -> socket.socket:
    """A connection to the socket at ``path``.

    Args:
        limit_s: longest wait for it, and for everything that is read and written, seconds.

    Raises:
        OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(limit_s)
    limit = time.monotonic() + limit_s
    try:
        with short_name(path) as name:
            while True:
                try:
                    connection.connect(name)
                    break
                except BlockingIOError:  # too many wait there already: the kernel does not have this one wait
                    if time.monotonic() > limit:
                        raise
                    time.sleep(_RETRY_PERIOD_S)
    except OSError:
        connection.close()
        raise
    return connection
