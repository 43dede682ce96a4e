"""The processes that load data for a rank: SIGTERM is for the rank, and not for them.

Who tells a machine or a process group to end sends SIGTERM to the workers, too. torch's would end by it at once, and
the rank would take that for a crash, before it has come to a place where it can save its state.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import RawValue
from typing import NoReturn

from chaos_mpi.agent.processes import die_with_parent, dies_with_parent, is_running, start_time

WorkerInit = Callable[[int], None]

#: How often a worker looks for its rank, where the kernel does not tell it of the end.
_LOOK_MS = 1000


class SurvivingInit:
    """The ``worker_init_fn`` of a loader whose workers live as long as their rank does.

    A worker still ends when torch's loader tells it to, which needs no signal; when its rank is gone; and by SIGTERM
    once its rank is about to go, because the interpreter ends what is left of its children so, and waits for them.

    Args:
        script_init: the script's own, which is called afterwards.
    """

    def __init__(self, script_init: WorkerInit | None) -> None:
        self._script_init = script_init
        self._rank_ends = _rank_ends()
        self._rank = os.getpid(), start_time(os.getpid())
        self._parent = 0  # the rank, or the server that forks for it

    def __call__(self, worker: int) -> None:
        self._parent = os.getppid()
        if self._parent != self._rank[0]:  # the server lives as long as what it has forked
            threading.Thread(target=_end_with, args=self._rank, name="chaos_mpi-rank", daemon=True).start()
        # A handler, because programs that the worker starts would inherit that a signal is ignored, or held off.
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.siginterrupt(signal.SIGTERM, False)
        if not dies_with_parent():  # set at the fork, to a signal that nothing holds up: see elastic/children.py
            die_with_parent(signal.SIGTERM)()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        if self._script_init is not None:
            self._script_init(worker)

    def _on_sigterm(self, *_: object) -> None:
        if self._rank_ends.value or os.getppid() != self._parent:
            os._exit(0)  # as torch's own workers do


def _end_with(pid: int, started: int) -> NoReturn:
    """End this process when another one does."""
    ends = select.poll()  # unlike select(), with descriptors above 1023 as well
    limit_ms = _LOOK_MS
    with contextlib.suppress(OSError):  # it has ended, or this kernel or container does not know the call
        ends.register(os.pidfd_open(pid), select.POLLIN)
        limit_ms = -1
    while is_running(pid, started):
        ends.poll(limit_ms)
    os._exit(0)


@contextlib.contextmanager
def sigterm_held_off(start_method: str) -> Iterator[None]:
    """Within it, workers are started: they inherit that SIGTERM has to wait until :class:`SurvivingInit` is called.

    Args:
        start_method: of multiprocessing.
    """
    if start_method != "fork":
        resource_tracker.ensure_running()  # which would let SIGTERM come again when it is started with the first worker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _rank_ends() -> ctypes.c_bool:
    """Whether this process is at its end, for its workers to see."""
    told = RawValue(ctypes.c_bool, False)
    pid = os.getpid()

    def tell() -> None:
        if os.getpid() == pid:  # and not a child that was forked
            told.value = True

    atexit.register(tell)  # called before multiprocessing, which was there before, ends the children
    return told
