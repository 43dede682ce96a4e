"""A connection to another host that is closed before it has begun, for no reason but that many are made at once.

OpenSSH's server drops connections at random when more than ten wait to be let in (``MaxStartups`` of sshd_config(5)),
which many ranks of one host can be. Those are tried again; one that is refused, or has no answer, is not.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import Callable

#: What ssh ends with when it could not connect, or lost the connection (ssh(1)).
SSH_FAILED = 255
#: How often a connection is tried again.
TRIES = 5
#: The pause before each, seconds: by chance, for all that were dropped try again.
PAUSE_S = (0.5, 2.0)
#: None is tried again so long after the first, seconds.
LIMIT_S = 15.0
#: What ssh says when the other side hangs up while they still agree on how to talk. It names the port before the login
#: only; later the order to start the rank may have arrived, and must not be given twice.
_DROPPED = re.compile(rb"exchange_identification|Connection (closed|reset) by \S+ port \d")
#: More of what is printed before anything has begun is not kept.
_KEPT_BYTES = 1 << 14


class Dialling:
    """The attempts to reach one host. To be made in a running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._left, self._limit_s = TRIES, self._loop.time() + LIMIT_S

    def pause_s(self, status: int, said: bytes) -> float | None:
        """How long to wait before the next attempt; None: there is to be none.

        Args:
            status: what the last one ended with.
            said: what it printed on standard error.
        """
        pause_s = random.uniform(*PAUSE_S)  # noqa: S311 - no secret
        if status != SSH_FAILED or not _DROPPED.search(said) or not self._left:
            return None
        if self._loop.time() + pause_s > self._limit_s:
            return None
        self._left -= 1
        return pause_s


class Errors:
    """Standard error of one attempt: passed on as it comes, and its beginning kept. Made in a running event loop.

    Args:
        write: takes what comes.

    Attributes:
        theirs: for the new process; to be closed by :meth:`started`.
        said: what has come first.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write, self.said = write, b""
        self._ours, self.theirs = os.pipe()
        os.set_blocking(self._ours, False)
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ours, self._pass_on)

    def started(self) -> None:
        """The process has its end, or was not started."""
        os.close(self.theirs)

    def close(self) -> None:
        """Pass on what there is, and no more: what a process left behind may hold the other end for ever."""
        if self._closed:
            return
        self._closed = True
        while self._pass_on():
            pass
        self._loop.remove_reader(self._ours)
        os.close(self._ours)

    def _pass_on(self) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(self._ours, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._ours)
        self.said += data[: _KEPT_BYTES - len(self.said)]
        self._write(data)
        return bool(data)
