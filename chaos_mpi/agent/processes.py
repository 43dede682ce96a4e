"""Processes by number: whether one still runs, and signals to a group."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_GET_PDEATHSIG = 2


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5)); with the pid it names one process. 0: it has
    ended."""
    try:
        # Bytes: a name, which is in brackets, need not be text.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def is_running(pid: int, started: int) -> bool:
    """Whether the process that had this number at that time still runs."""
    return started != 0 and start_time(pid) == started


def kill_group(group: int, number: int) -> None:
    """Send a signal to all processes of a group; nothing happens when there is none left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def die_with_parent(number: int) -> Callable[[], None]:
    """For a new child: the kernel sends it this signal when the parent dies, whatever kills that (prctl(2))."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)

    return prepare


def dies_with_parent() -> bool:
    """Whether the kernel sends this process a signal when its parent dies (prctl(2))."""
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(number))
    return number.value != 0


def live_without_parent() -> None:
    """Undo :func:`die_with_parent`, in the process that was started so."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)


def end_like(status: int) -> NoReturn:
    """End this process as another one has ended.

    Args:
        status: its exit status, or the negated number of the signal that killed it.
    """
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the dump of the other one is the one of interest
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)
