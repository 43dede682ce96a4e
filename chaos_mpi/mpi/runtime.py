"""Start and end of MPI in this process.

MPI is initialised here and nowhere else, because three things have to be right before ``MPI_Init``:
the component selection (:data:`chaos_mpi.mpi.launch.MCA_DEFAULTS`), the thread level, and that mpi4py leaves
``MPI_Finalize`` to us. A process that ends by an exception must *not* finalize: finalize waits for
the other ranks, and they are to see a dead peer and train on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from chaos_mpi.errors import EngineError
from chaos_mpi.mpi.launch import MCA_DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos_mpi.mpi.world import World

log = logging.getLogger("chaos_mpi.mpi")

#: How exact the limit of a blocking call is.
_WATCH_PERIOD_S = 0.5


def start(limit_s: float) -> World:
    """Initialise MPI and return the world communicator of this job.

    Under ``mpirun`` the job must have been started with ``--with-ft ulfm`` when it has more than one
    rank. A script started without ``mpirun`` becomes a world of one rank.

    Args:
        limit_s: seconds that the other ranks have to arrive, too; the process ends with a traceback when they do not.

    Raises:
        EngineError: MPI cannot be loaded or initialised, or has no fault tolerance here.
    """
    given = set(os.environ)
    for name, value in MCA_DEFAULTS.items():
        os.environ.setdefault(f"OMPI_MCA_{name}", value)
    if alone := "PMIX_NAMESPACE" not in given and "OMPI_MCA_btl" not in given:
        # No launcher, so nobody to share memory with; Open MPI would leave the 16 MiB that it takes for that behind.
        os.environ["OMPI_MCA_btl"] = "self,tcp"
    from chaos_mpi.mpi.world import MPI, World  # raises EngineError when MPI cannot be loaded

    if MPI.Is_finalized():
        raise EngineError("MPI was already finalized in this process; a session can be opened once per process.")
    if ours := not MPI.Is_initialized():
        _wait_for_every_rank_in_mpi_init(limit_s)
    if alone:
        os.environ["OMPI_MCA_btl"] = MCA_DEFAULTS["btl"]  # for what this process starts
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise EngineError(
            "MPI was initialised without THREAD_MULTIPLE before chaos_mpi.init(); "
            "call chaos_mpi.init() before anything else imports mpi4py.MPI."
        )
    Watchdog.prepare()
    world = World(MPI.COMM_WORLD)
    if reason := _why_refused(world.size):
        if ours:  # processes that just end leave segments of shared memory behind
            with _at_most(limit_s):
                MPI.Finalize()
        raise EngineError(reason)
    return world


def _why_refused(size: int) -> str:
    """Why a world of so many ranks cannot be a job; nothing if it can. The same at all of them."""
    if size == 1 and (others := _started_by_another_launcher()):
        return (
            f"this process was started by {others}, of which MPI knows nothing, so each rank would train alone: "
            "start the script with 'chaosrun -n N script.py' or 'mpirun --with-ft ulfm -n N python script.py'."
        )
    if size > 1 and not _fault_tolerant():
        return (
            f"this job of {size} ranks was started without fault tolerance: "
            "start it with 'chaosrun -n N script.py' or 'mpirun --with-ft ulfm -n N python script.py'."
        )
    return ""


def _wait_for_every_rank_in_mpi_init(limit_s: float) -> None:
    """Initialise MPI, which returns when all ranks of the job have called it."""
    from mpi4py import MPI

    with _at_most(limit_s):
        MPI.Init_thread(MPI.THREAD_MULTIPLE)


@contextlib.contextmanager
def _at_most(limit_s: float) -> Iterator[None]:
    """Within it, a call of MPI that waits for all ranks may take so long; then the process ends.

    mpi4py holds the interpreter lock meanwhile, so no thread of Python can watch over it. ``faulthandler`` has one
    that needs no lock; what it prints when it ends the process is a traceback, with the calling function on top.
    """
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def stop() -> None:
    """Leave MPI, once every member has agreed that nothing is left to do.

    Under ``mpirun`` the process just ends afterwards, without ``MPI_Finalize``: finalize fences with every
    process the launcher ever started, and was seen to wait for ever, with the interpreter locked, in one of six
    runs in which a rank had been killed. With ``--with-ft ulfm`` the launcher takes a plain exit with status 0 as
    success and cleans up behind it. A process without a launcher has nobody to wait for, and finalizes.
    """
    from mpi4py import MPI

    if not _fault_tolerant() and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()


def bound_threads() -> None:
    """Share the cores among the ranks of this node, unless the user chose a number of threads."""
    ranks = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def _started_by_another_launcher() -> str:
    """What started several ranks that do not form one MPI job; empty if nothing did."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return ""  # mpirun, with one rank
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        return "torchrun"
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ and os.environ.get("HOROVOD_SIZE", "1") != "1":
        return "horovodrun"
    return ""


def _fault_tolerant() -> bool:
    # Set by mpirun --with-ft ulfm in every rank's environment.
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "0").lower() in ("1", "true", "yes")


class Watchdog:
    """Ends the process when a blocking MPI call outlasts its limit.

    A blocked MPI call cannot be interrupted from Python, so a limit on it can only end the process; the
    other ranks then see a dead peer, and go on. Used for the few calls that have no
    non-blocking form.

    Args:
        what: what is waited for, for the message.
        limit_s: seconds.
    """

    _armed: ClassVar[set[Watchdog]] = set()
    _thread: ClassVar[threading.Thread | None] = None

    def __init__(self, what: str, limit_s: float) -> None:
        self._what, self._limit_s = what, limit_s
        self._deadline = 0.0

    def __enter__(self) -> Self:
        self._deadline = time.monotonic() + self._limit_s
        self._armed.add(self)
        self.prepare()
        return self

    def __exit__(self, *_: object) -> None:
        self._armed.discard(self)

    @classmethod
    def prepare(cls) -> None:
        """Have the thread that watches: to start one for each call takes longer than most calls do."""
        if cls._thread is None:
            cls._thread = threading.Thread(target=cls._watch, name="chaos_mpi-watchdog", daemon=True)
            cls._thread.start()

    @classmethod
    def _watch(cls) -> None:
        while True:
            time.sleep(_WATCH_PERIOD_S)  # and not until it is woken, which those that it watches would have to pay for
            for watchdog in tuple(cls._armed):
                if time.monotonic() > watchdog._deadline:
                    watchdog._expired()

    def _expired(self) -> None:
        log.error(
            "%s did not return within %.0f s on %s (pid %d); ending this process",
            self._what, self._limit_s, socket.gethostname(), os.getpid(),
        )  # fmt: skip
        logging.shutdown()
        # Not by an exit status: the launcher would not tell the other ranks of it.
        os.kill(os.getpid(), signal.SIGKILL)
