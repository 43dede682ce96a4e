"""Finding a running job of this user, and talking to one of its members."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from chaos_mpi.agent import sockets
from chaos_mpi.agent.home import refuse_foreign
from chaos_mpi.agent.marks import has_owner, is_left_over
from chaos_mpi.errors import EngineError

#: A member that does not take a connection, or does not greet, within this time is passed over.
CONNECT_LIMIT_S = 2.0
#: Whoever is tried after others have used up the time gets so much, at least.
_LEAST_LIMIT_S = 0.05
_SPEECHLESS = "the job in {} is starting, or about to end, or hangs, or is not of chaos_mpi: none of its ranks answers"
#: The kind of the file in a job's private directory that the launcher writes when it begins.
LAUNCHER = "launcher"
#: Holds the path of the job's other private directory, which is in shared memory, if it has one.
MEMORY_FILE = "memory"
#: Where temporary files go if nothing else is chosen: into the first with room (:mod:`tempfile`), which may be another
#: one than when a job was started. Only directories of this user count there.
_PLACES = ("/tmp", "/var/tmp", "/usr/tmp")  # noqa: S108


def living_jobs() -> dict[Path, bool]:
    """A private directory of each of this user's jobs that live, and whether it has a member to talk to."""
    answering: dict[str, Path] = {}
    living: dict[str, Path] = {}
    for directory in own_directories():
        job = _job_of(directory)
        if job not in answering and (member := _first_member(directory)) is not None:
            member.close()
            answering[job] = directory
        elif has_owner(directory):
            living[job] = directory
    return {directory: job in answering for job, directory in {**living, **answering}.items()}


def own_directories() -> list[Path]:
    """The private directories of all jobs of this user, also of those that were killed and could not tidy up."""
    found, now = [], tempfile.gettempdir()
    for place in _PLACES if now in _PLACES else (now,):
        for path in sorted(Path(place).glob("chaosrun-*")):
            with contextlib.suppress(OSError):  # it may go away meanwhile
                if path.is_dir() and path.stat().st_uid == os.getuid():
                    found.append(path)
    return found


def remove_left_over() -> None:
    """Remove the private directories of jobs of which it is certain that no process lives any more.

    A job on several hosts may have some on this machine: they are removed together, or all are kept.
    """
    directories: dict[str, list[Path]] = {}
    for directory in own_directories():
        directories.setdefault(_job_of(directory), []).append(directory)
    for of_job in directories.values():
        if not all(map(_is_left_over, of_job)):
            continue
        for directory in of_job:
            with contextlib.suppress(OSError):
                memory = Path((directory / MEMORY_FILE).read_text())
                if memory.name.startswith("chaosrun-") and memory.stat().st_uid == os.getuid():
                    shutil.rmtree(memory, ignore_errors=True)
            shutil.rmtree(directory, ignore_errors=True)


def _is_left_over(directory: Path) -> bool:
    """Whether this is certain of a directory that nobody else can write to."""
    try:
        refuse_foreign(directory)
    except (EngineError, OSError):
        return False
    return is_left_over(directory)


def _job_of(directory: Path) -> str:
    """The name of the job. One on several hosts has more than one directory where these share their temporary files:
    that of the launcher, and for each host one with its name behind.
    """
    return "-".join(directory.name.split("-")[:2])


def find_job(job: Path | None) -> Path:
    """The job that is meant: the one given, else the only one that there is.

    Raises:
        click.ClickException: there is none, or more than one, or it cannot be talked to.
    """
    if job is not None:
        if any(job.glob("control-*.sock")):
            return job
        raise click.ClickException(_SPEECHLESS.format(job) if has_owner(job) else f"no job runs in {job}")
    jobs = living_jobs()
    if not jobs:
        raise click.ClickException("no job of yours is running on this machine (it has to be started with chaosrun)")
    if len(jobs) > 1:
        named = [
            f"  --job {path}{_program(path)}{'' if answers else ' (starting, or about to end)'}"
            for path, answers in jobs.items()
        ]
        raise click.ClickException("\n".join(["several jobs are running; choose one:", *named]))
    ((directory, answers),) = jobs.items()
    if not answers:
        raise click.ClickException(_SPEECHLESS.format(directory))
    return directory


def _program(directory: Path) -> str:
    """What runs in the job, in brackets; nothing if this is not its launcher's directory."""
    for path in directory.glob(f"{LAUNCHER}-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return f" ({' '.join(json.loads(path.read_text())['program'].split())[:100]})"
    return ""


class RefusedError(click.ClickException):
    """A member does not do what it was asked for."""


def ask(job: Path, request: dict[str, Any], limit_s: float) -> Iterator[dict[str, Any]]:
    """Send a request to some member of the job that answers, and yield what it says.

    Raises:
        RefusedError: the answer is an error.
        click.ClickException: nobody answers.
    """
    with contextlib.closing(_connect(job)) as member:
        try:
            member.ask(request, limit_s)
            for line in member.stream:
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise RefusedError(answer["error"])
                yield answer
                if answer.get("last"):
                    return
        except TimeoutError:
            raise click.ClickException(f"the job has not answered within {limit_s:.0f} s; it may still do it") from None
        except (OSError, ValueError):  # its end cut the connection, or the last line
            pass
        raise click.ClickException(
            "the member that was asked has ended; the others may still carry the request out: see chaosctl status"
        )


def ask_all(job: Path, request: dict[str, Any], limit_s: float) -> list[dict[str, Any]]:
    """The last answers of all members on this machine that answer within ``limit_s`` seconds, asked all at once."""
    paths = sorted(job.glob("control-*.sock"))
    if not paths:
        return []
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = pool.map(lambda path: _ask_one(path, request, limit_s), paths)
        return [answer for answer in answers if answer is not None]


def follow(path: Path, limit_s: float) -> Iterator[dict[str, Any] | None]:
    """The last events of the member behind a control socket, then those to come, until it ends or is gone.

    The first is None, once the member has said that it is there; so are others, when nothing has happened for a while.

    Args:
        path: of the socket.
        limit_s: a member that says nothing for so long hangs.
    """
    if (connection := _reach(path)) is None:
        return
    with contextlib.suppress(OSError, ValueError), connection, contextlib.closing(_Member(connection)) as member:
        member.ask({"do": "follow"}, limit_s)
        yield None
        for line in member.stream:
            answer = json.loads(line)
            if answer.get("last"):
                return
            yield answer.get("event")


def _ask_one(path: Path, request: dict[str, Any], limit_s: float) -> dict[str, Any] | None:
    """The last answer of a member; None if it is gone, hangs, or does not understand."""
    if (connection := _reach(path, limit_s)) is None:
        return None
    answer: dict[str, Any] = {"error": "it said nothing"}
    with contextlib.suppress(OSError, ValueError), connection, contextlib.closing(_Member(connection)) as member:
        member.ask(request, limit_s)
        for line in member.stream:
            answer = json.loads(line)
            if answer.get("last"):
                break
    return None if "error" in answer else answer


def end_ranks(job: Path, name: str, limit_s: float) -> bool:
    """Tell every rank that the job is to stop after the present step; whether any could be told.

    All are told before any is waited for: those that hang are not to use up the time of the others. Without threads,
    for this is done within a signal handler, which may have interrupted whoever starts or ends one.

    Args:
        job: its private directory.
        name: of the signal for which they are to stop.
        limit_s: they have so long, seconds.
    """
    limit = time.monotonic() + CONNECT_LIMIT_S
    request = json.dumps({"do": "end", "signal": name, "limit_s": limit_s}).encode() + b"\n"
    with contextlib.ExitStack() as told, selectors.DefaultSelector() as answering:
        for path in sorted(job.glob("control-*.sock")):
            if (connection := _reach(path, max(_LEAST_LIMIT_S, limit - time.monotonic()))) is not None:
                told.enter_context(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(request)
                    answering.register(connection, selectors.EVENT_READ)
        any_told = bool(answering.get_map())
        # Until they have taken the connection; those that hang will find the request when they go on.
        while answering.get_map() and (left_s := limit - time.monotonic()) > 0:
            for key, _ in answering.select(left_s):
                answering.unregister(key.fileobj)
    return any_told


class _Member:
    """A conversation with one member.

    Raises:
        OSError: it is not there, or does not say anything.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.stream = connection.makefile("rwb")
        if not self.stream.readline():
            raise ConnectionError("it hung up")

    def ask(self, request: dict[str, Any], limit_s: float) -> None:
        """Send a request; the answers are lines of :attr:`stream`, each within ``limit_s`` seconds."""
        self._connection.settimeout(limit_s)
        self.stream.write(json.dumps(request).encode() + b"\n")
        self.stream.flush()

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):  # what could not be sent
            self.stream.close()
        self._connection.close()


def _connect(job: Path) -> _Member:
    member = _first_member(job)
    if member is None:
        raise click.ClickException(f"no member of the job in {job} answers")
    return member


def _first_member(job: Path) -> _Member | None:
    """The first that says who it is: one that hangs takes connections, too."""
    for path in sorted(job.glob("control-*.sock")):
        if (connection := _reach(path)) is None:
            continue
        try:
            return _Member(connection)
        except OSError:
            connection.close()
    return None


def _reach(path: Path, limit_s: float | None = None) -> socket.socket | None:
    try:
        return sockets.connect(path, CONNECT_LIMIT_S if limit_s is None else limit_s)
    except OSError:  # a member that was killed leaves its socket behind
        return None
