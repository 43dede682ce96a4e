"""Workers that a rank has forked end with it: they hold its connections, by whose end others tell that it is dead.

Of a rank that has joined nobody is told in another way, on one machine. Only daemonic processes of ``multiprocessing``
are meant (workers of a data loader, or of a pool): they are never to outlive who has started them, and do so only if it
is killed. What else a script forks lives as long as it likes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import util

from chaos_mpi.agent.processes import die_with_parent

_rank = 0
_die_with_rank = die_with_parent(signal.SIGKILL)
_forking = threading.local()


def end_workers_with_rank() -> None:
    """From here on, the kernel kills daemonic processes that this one's main thread forks when this one ends."""
    global _rank
    if _rank == os.getpid():
        return
    _rank = os.getpid()
    os.register_at_fork(before=_note_thread)
    util.register_after_fork(_end_with_rank, lambda end_with_rank: end_with_rank())


def _note_thread() -> None:
    # The kernel sends the signal when the thread ends that has forked.
    _forking.by_main_thread = threading.get_native_id() == os.getpid() == _rank


def _end_with_rank() -> None:
    """In the child, before what it is to do."""
    if not (multiprocessing.current_process().daemon and _forking.by_main_thread):
        return
    _die_with_rank()
    if os.getppid() != _rank:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
