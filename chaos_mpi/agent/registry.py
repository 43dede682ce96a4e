"""Which proxies a job has on its launch host, and for which hosts; so that a host can be fenced off.

A host that was given up may only have paused. When its ranks wake, they find their connections with all others
severed, and report those as dead; through ``mpirun`` that report reaches the living, which Open MPI then aborts. So the
proxies of a host are killed *before* the connections with it are severed: what its ranks say after that reaches nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from chaos_mpi.agent.jsonfiles import JsonFiles
from chaos_mpi.agent.processes import is_running, start_time
from chaos_mpi.errors import EngineError

_POLL_S = 0.02


class Registered(NamedTuple):
    """A proxy.

    Attributes:
        host: where its rank is, as ssh knows it; empty for the launch host.
        job: the PMIx namespace of its rank; every spawn makes a new one.
        rank: number of its rank in that.
        pid: its process id.
        started: when it was started, which tells it from a later process with the same number.
    """

    host: str
    job: str
    rank: int
    pid: int
    started: int


def register(directory: Path, host: str, job: str, rank: int) -> None:
    """Enter this process. Does nothing when the directory is not there: the job is then not watched by anyone.

    Args:
        directory: of the job, on this host.
        host: where the rank is.
        job: its PMIx namespace.
        rank: its number in that.

    Raises:
        EngineError: it cannot be entered: the host could not be fenced off, nor the rank be ended with the job.
    """
    pid = os.getpid()
    entry = Registered(host, job, rank, pid, start_time(pid))
    new = directory / f"{_name(pid)}.new"
    try:
        new.write_text(json.dumps(entry))
        new.rename(directory / _name(pid))
    except FileNotFoundError:
        return
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise EngineError(
            f"a rank that cannot be entered in the list of the job's ranks is not started: {directory}: "
            f"{error.strerror}"
        ) from error


def registered(directory: Path) -> Iterator[Registered]:
    """All proxies of a job that run."""
    for path in sorted(directory.glob(_name("*"))):
        with contextlib.suppress(OSError, ValueError, TypeError):
            entry = Registered(*json.loads(path.read_text()))
            if is_running(entry.pid, entry.started):
                yield entry


def note_end(directory: Path, join: str, how: str) -> None:
    """Note down that this process, the proxy of a newcomer, ends, which MPI tells nobody.

    Args:
        directory: of the job, on this host.
        join: see :func:`chaos_mpi.agent.spawning.join_of`.
        how: what has become of the rank.
    """
    path = directory / f"ended-{os.getpid()}.json"
    with contextlib.suppress(OSError):  # the job is over
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"join": join, "how": how}))
        new.rename(path)


class Ends:
    """The joins whose proxies have ended, looked up again and again; each is read once.

    Args:
        directory: of the job, on this host.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._files = directory, JsonFiles()
        self._found: dict[str, str] = {}

    def look(self) -> dict[str, str]:
        """All of them so far, and how they ended; what cannot be read is passed over."""
        for path in sorted(self._directory.glob("ended-*.json")):  # of another join each time: a number may come twice
            with contextlib.suppress(TypeError, KeyError):
                fields = self._files.read(path)
                self._found[str(fields["join"])] = str(fields["how"])
        return dict(self._found)


def fence(directory: Path, host: str) -> int:
    """Cut the ranks of a host off from ``mpirun``, for which they are dead from here on.

    Args:
        directory: of the job, on this host.
        host: name of the host, as ssh knows it.

    Returns:
        How many ranks it had.
    """
    doomed = [entry for entry in registered(directory) if entry.host == host]
    _signal(doomed, signal.SIGKILL)
    return len(doomed)


def end(directory: Path, number: int, limit_s: float) -> None:
    """End all proxies of a job: with this signal, and with SIGKILL those that are left.

    Args:
        directory: of the job, on this host.
        number: the signal that they heed by having their rank ended.
        limit_s: how long they have.
    """
    _signal(registered(directory), number)
    _signal(wait_for_end(directory, limit_s), signal.SIGKILL)


def wait_for_end(directory: Path, limit_s: float) -> list[Registered]:
    """Return when all proxies of a job have ended by themselves, or after ``limit_s`` seconds; those that are left."""
    limit = time.monotonic() + limit_s
    while (left := list(registered(directory))) and time.monotonic() < limit:
        time.sleep(_POLL_S)
    return left


def _signal(entries: Iterable[Registered], number: int) -> None:
    for entry in entries:
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry.pid, number)


def _name(pid: int | str) -> str:
    return f"proxy-{pid}.json"
