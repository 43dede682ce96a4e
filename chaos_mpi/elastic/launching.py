"""The process of a newcomer, from its command line to its end, as the member sees it that has it started."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import psutil

from chaos_mpi.agent import launcher
from chaos_mpi.agent.environment import THREADS_BY_HOST
from chaos_mpi.agent.spawning import JOIN_OPTION, VARIABLE, spawn_command
from chaos_mpi.errors import JoinError
from chaos_mpi.membership import Join, host_of
from chaos_mpi.mpi import growth
from chaos_mpi.mpi.growth import Bridge

_LOOK_PERIOD_S = 0.25
#: Tells the process of a newcomer how many ranks there were and are: its script may ask for the length of an epoch.
_SIZES_OPTION = "chaos_mpi_sizes"
#: Variables of one rank, of its host or of its launcher, which make no sense under another one.
_OF_ONE_RANK = frozenset({
    VARIABLE, THREADS_BY_HOST, "CHAOS_RUN_DIR", "CHAOS_HOST", "CHAOS_LAUNCHER_PIPE", "CHAOS_AGENT_SOCKET",
    "CHAOS_RESUME_FROM", "CHAOS_TAKEOVER",
})  # fmt: skip
_THREADS = "OMP_NUM_THREADS"


class Sizes(NamedTuple):
    """How many ranks a job has begun with, and has."""

    initial: int
    present: int


def start(join: Join, sizes: Sizes, directory: str) -> Bridge:
    """Start another process like this one and return the bridge to it. Blocks; call it in a thread.

    Args:
        join: which it is started for.
        sizes: of the job.
        directory: its working directory.

    Raises:
        JoinError: there is nobody left who could start it.
        EngineError: MPI could not start it.
        PeerFailedError: it died at once.
    """
    if launcher.is_lost():
        raise JoinError(
            "mpirun, which starts ranks, is gone; those that are left train on, but none can be added before another "
            "launcher takes over: run 'chaosctl takeover' on one of their hosts"
        )
    own = own_arguments(join, sizes)
    proxied = spawn_command(os.environ, join.host, directory, own)
    if proxied is not None:
        return growth.spawn(proxied, host="", directory="")
    return growth.spawn([sys.executable, *own], host=join.host, directory=directory)


def own_arguments(join: Join, sizes: Sizes) -> list[str]:
    """The arguments of this Python process, to start another one like it, which bears the name of the join."""
    return ["-X", mark(join), "-X", f"{_SIZES_OPTION}={sizes.initial},{sizes.present}", *arguments()]


def arguments() -> list[str]:
    """The arguments of this Python process, without what a sponsor has added."""
    given, found = list(sys.orig_argv[1:]), list[str]()
    while given:
        if given[0] == "-X" and len(given) > 1 and given[1].partition("=")[0] in (JOIN_OPTION, _SIZES_OPTION):
            del given[:2]
        else:
            found.append(given.pop(0))
    return found


def told_sizes() -> Sizes | None:
    """What the sponsor of this process has said of the job; None if it has none."""
    told = str(sys._xoptions.get(_SIZES_OPTION, ""))
    return Sizes(*map(int, told.split(","))) if told else None


def facts(environ: Mapping[str, str], arguments: Sequence[str], directory: str) -> dict[str, Any]:
    """What another launcher has to know of a rank to start its job anew. Pure.

    Told over the control socket only, which is its owner's alone: settings may be nobody else's business.

    Args:
        environ: of the rank.
        arguments: of its Python.
        directory: that it was started in.
    """
    settings = {
        name: value for name, value in environ.items() if name.startswith("CHAOS_") and name not in _OF_ONE_RANK
    }
    if _THREADS in environ and THREADS_BY_HOST not in environ:
        settings[_THREADS] = environ[_THREADS]
    proxy = json.loads(environ.get(VARIABLE) or "[]")
    return {"arguments": list(arguments), "directory": directory, "settings": settings, "proxy": proxy}


def own_host(environ: Mapping[str, str]) -> str:
    """What this machine is called in the id of this member.

    On one machine a newcomer calls it as its sponsor does, also when it has got another name since (DHCP, VPN): scale
    policies count members by host.

    Args:
        environ: of this rank.
    """
    if told := environ.get("CHAOS_HOST"):
        return told
    sponsors = host_of(_sponsor())
    # As mpirun knows it, which leaves a domain out. With proxies it would be the name of the launch host.
    known = environ.get("PMIX_HOSTNAME") if VARIABLE not in environ else None
    return sponsors if known and known in (sponsors, sponsors.partition(".")[0]) else socket.gethostname()


def refuse_orphan() -> None:
    """To be called before MPI is initialised: Open MPI's launcher may crash over a process whose sponsor is dead.

    It connects the two, and has no use for an answer from one of them that is gone (PRRTE, ``pmix_server_dyn.c``).

    Raises:
        JoinError: this process was started by a member on this machine that is gone.
    """
    sponsor = _sponsor()
    host, _, pid = sponsor.rpartition(":")
    if pid.isdigit() and host == own_host(os.environ) and not psutil.pid_exists(int(pid)):
        raise JoinError(f"{sponsor}, which started this rank, has ended meanwhile")


class LaunchWatch:
    """Sees the process of a newcomer end before MPI connects it.

    MPI says nothing of it: whoever waits for the process to come up waits for ever. The launcher of this machine starts
    it as a child of its own, as it did with this process. In a job on several machines nothing is seen, but told by the
    agents: see :meth:`chaos_mpi.elastic.sponsor.Sponsorship.process_ended`.

    Args:
        join: what the process is started for.
        ended: called from a thread when it has ended.
    """

    def __init__(self, join: Join, ended: Callable[[], None]) -> None:
        self._mark, self._ended = mark(join), ended
        self._over = threading.Event()
        here = ("", "localhost", socket.gethostname(), os.environ.get("PMIX_HOSTNAME", ""))
        self._local = VARIABLE not in os.environ and join.host in here

    def start(self) -> None:
        """Begin to look."""
        if self._local:
            threading.Thread(target=self._run, name="chaos_mpi-launch", daemon=True).start()

    def stop(self) -> None:
        """It is connected, or it does not matter any more."""
        self._over.set()

    def _run(self) -> None:
        process: psutil.Process | None = None
        while not self._over.wait(_LOOK_PERIOD_S):
            process = process or self._find()
            if process is not None and not _runs(process):
                self._ended()
                return

    def _find(self) -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(os.getppid()).children():
                with contextlib.suppress(psutil.Error):
                    if self._mark in process.cmdline():
                        return process
        return None


def mark(join: Join) -> str:
    """The option in the command line of the process that is started for a join."""
    return f"{JOIN_OPTION}={join.id}.{join.attempt}@{join.sponsor}"


def _sponsor() -> str:
    """The member that has started this process; empty if there is none."""
    return str(sys._xoptions.get(JOIN_OPTION, "")).rpartition("@")[2]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
