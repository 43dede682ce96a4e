"""Finding a running job of this user, and talking to one of its members."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil

from chaos_mpi.elastic.control import short_name

#: A member that does not take a connection within this time is passed over.
CONNECT_LIMIT_S = 2.0
#: Holds the process id of the launcher, in a job's private directory.
LAUNCHER_FILE = "launcher"


def running_jobs() -> list[Path]:
    """The private directories of this user's jobs that have a member to talk to."""
    running = []
    for job in own_directories():
        if (connection := _first_member(job)) is not None:
            connection.close()
            running.append(job)
    return running


def own_directories() -> list[Path]:
    """The private directories of all jobs of this user, also of those that were killed and could not tidy up."""
    found = []
    for path in Path(tempfile.gettempdir()).glob("chaosrun-*"):
        with contextlib.suppress(OSError):  # it may go away meanwhile
            if path.is_dir() and path.stat().st_uid == os.getuid():
                found.append(path)
    return sorted(found)


def remove_left_over() -> None:
    """Remove the private directories of jobs whose launcher is gone, and all of whose ranks are."""
    for job in own_directories():
        pids = [path.stem.rpartition("-")[2] for path in job.glob("*-*.json")]
        with contextlib.suppress(OSError):
            pids.append((job / LAUNCHER_FILE).read_text())
        if pids and not any(pid.isdigit() and psutil.pid_exists(int(pid)) for pid in pids):
            shutil.rmtree(job, ignore_errors=True)


def find_job(job: Path | None) -> Path:
    """The job that is meant: the one given, else the only one that runs.

    Raises:
        click.ClickException: there is none, or more than one.
    """
    if job is not None:
        if not any(job.glob("control-*.sock")):
            raise click.ClickException(f"no job runs in {job}")
        return job
    jobs = running_jobs()
    if not jobs:
        raise click.ClickException("no job of yours is running on this machine (it has to be started with chaosrun)")
    if len(jobs) > 1:
        raise click.ClickException(f"several jobs are running; choose one with --job: {', '.join(map(str, jobs))}")
    return jobs[0]


def ask(job: Path, request: dict[str, Any], limit_s: float) -> Iterator[dict[str, Any]]:
    """Send a request to some member of the job that answers, and yield what it says.

    Raises:
        click.ClickException: nobody answers, or the answer is an error.
    """
    with _connect(job) as connection, connection.makefile("rwb") as stream:
        connection.settimeout(limit_s)
        stream.write(json.dumps(request).encode() + b"\n")
        stream.flush()
        try:
            for line in stream:
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise click.ClickException(answer["error"])
                yield answer
                if answer.get("last"):
                    return
        except TimeoutError:
            raise click.ClickException(f"the job has not answered within {limit_s:.0f} s; it may still do it") from None
        raise click.ClickException(
            "the member that was asked has ended; the others may still carry the request out: see chaosctl status"
        )


def end_ranks(job: Path) -> bool:
    """Tell every rank of the job to end as soon as it can, as SIGTERM does, but once; whether any could be told."""
    told = False
    for path in sorted(job.glob("control-*.sock")):
        if (connection := _reach(path)) is not None:
            with connection, contextlib.suppress(OSError):
                connection.sendall(b'{"do": "end"}\n')
                told = True
    return told


def _connect(job: Path) -> socket.socket:
    connection = _first_member(job)
    if connection is None:
        raise click.ClickException(f"no member of the job in {job} answers")
    return connection


def _first_member(job: Path) -> socket.socket | None:
    for path in sorted(job.glob("control-*.sock")):
        if (connection := _reach(path)) is not None:
            return connection
    return None


def _reach(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(CONNECT_LIMIT_S)
    try:
        with short_name(path) as name:
            connection.connect(name)
    except OSError:
        connection.close()  # a member that was killed leaves its socket behind
        return None
    return connection
