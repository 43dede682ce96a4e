"""Finding a running job of this user, and talking to one of its members."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from chaos_mpi.elastic.control import short_name

#: A member that does not take a connection within this time is passed over.
CONNECT_LIMIT_S = 2.0


def running_jobs() -> list[Path]:
    """The private directories of this user's jobs that have a member to talk to."""
    root = Path(tempfile.gettempdir())
    own = (path for path in root.glob("chaosrun-*") if path.is_dir() and path.stat().st_uid == os.getuid())
    return sorted(path for path in own if any(path.glob("control-*.sock")))


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
    for path in sorted(job.glob("control-*.sock")):
        if (connection := _reach(path)) is not None:
            return connection
    raise click.ClickException(f"no member of the job in {job} answers")


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
