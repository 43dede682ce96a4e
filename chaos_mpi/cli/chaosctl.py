"""``chaosctl``: looks at a job, and lets ranks join and leave."""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click

from chaos_mpi import __version__
from chaos_mpi.cli.cluster import check_further
from chaos_mpi.cli.control import ask, find_job
from chaos_mpi.cli.joblog import show
from chaos_mpi.cli.options import Seconds
from chaos_mpi.cli.outcome import EXIT_USAGE
from chaos_mpi.cli.status import NOBODY, describe_link, lines, look
from chaos_mpi.cli.takeover import take_over
from chaos_mpi.cli.timeline import draw, rows, runs
from chaos_mpi.errors import ChaosError
from chaos_mpi.events import read_events

_JOB = click.option(
    "--job", type=click.Path(file_okay=False, path_type=Path), help="Private directory of the job, if several run."
)
_LIMIT = click.option(
    "--timeout", "limit_s", type=Seconds(), default=150.0, show_default=True,
    help="Longest wait for the job, seconds.",
)  # fmt: skip


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Look at a chaos_mpi job, and change who takes part in it."""


@main.command()
@click.argument("events")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw a picture (PNG).")
def timeline(events: str, plot: Path | None) -> None:
    """Print what happened to a job, from its event log EVENTS (a file, or a glob pattern in quotes).

    Of a log to which several jobs were appended all are told; the picture shows the last one.
    """
    try:
        found = [event for event in read_events(events) if {"t", "event", "step"} <= set(event)]
        jobs = runs(found) if found else []
        stories = [rows(job) for job in jobs]
    except OSError as error:
        raise _UsageError(f"{events} cannot be read: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise _UsageError(f"{events} is no event log of chaos_mpi: {type(error).__name__} {error}") from None
    if not found:
        raise _UsageError(f"there are no events of chaos_mpi in {events}")
    for number, story in enumerate(stories, start=1):
        if len(stories) > 1:
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(jobs[number - 1][0]["t"]))
            click.echo(f"job {number} of {len(stories)}, started {began}:")
        for when, step, text in story:
            click.echo(f"{when:8.2f} s  step {step:6d}  {text}")
    if plot is not None:
        try:
            draw(jobs[-1], plot)
        except ImportError:
            raise _UsageError("a picture needs matplotlib: pip install 'chaos-mpi[plot]'") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise _UsageError(f"the picture cannot be written to {plot}: {reason}") from None


@main.command()
@_JOB
@click.option("--json", "as_json", is_flag=True, help="For programs to read; says more.")
def status(job: Path | None, as_json: bool) -> None:
    """Who takes part in a running job, how far it is, and what it takes of the machine."""
    directory = find_job(job)
    if (state := look(directory)) is None:
        raise click.ClickException(NOBODY)
    state["directory"] = str(directory)
    for line in [json.dumps(state)] if as_json else (*lines(state), f"  job: {directory}"):
        click.echo(line)


@main.command()
@_JOB
@click.option("--once", is_flag=True, help="Print one picture and end, as without a terminal.")
def top(job: Path | None, once: bool) -> None:
    """Show a running job on the whole terminal, anew every second; q ends it."""
    try:
        from rich.console import Console

        from chaos_mpi.cli import top as screen
    except ImportError:
        raise _UsageError("chaosctl top needs rich: pip install rich") from None
    directory, console = find_job(job), Console()
    if once or not (console.is_terminal and sys.stdin.isatty()):
        if not screen.once(directory, console):
            raise click.ClickException(NOBODY)
        return
    try:
        if end := screen.watch(directory, console):
            click.echo(end)
    except KeyboardInterrupt:
        return


@main.command()
@_JOB
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the job ends.")
@click.option("--member", help="Only what this one (its id, or its rank) tells of.")
@click.option("-n", "last", type=click.IntRange(min=0), help="The last so many lines only.")
def log(job: Path | None, following: bool, member: str | None, last: int | None) -> None:
    """Print the last events of a running job: the twenty that each member remembers."""
    with contextlib.suppress(KeyboardInterrupt):
        for line in show(find_job(job), member, last, following):
            click.echo(line)


@main.command()
@_JOB
@_LIMIT
@click.option("-n", "ranks", type=click.IntRange(min=1), default=1, show_default=True, help="How many ranks.")
@click.option("--host", default="", help="Machine they are to run on.")
def add(job: Path | None, limit_s: float, ranks: int, host: str) -> None:
    """Let more ranks join a running job, and wait until they take part."""
    where = find_job(job)
    try:
        problems = check_further(where, host) if host else []
    except ChaosError as error:
        raise click.ClickException(str(error)) from error
    if problems:
        raise click.ClickException("; ".join(problems))
    request = {"do": "add", "host": host}
    reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
    for _ in range(ranks):
        # Nobody waits for these when Ctrl-C ends the process; what they have asked for goes on.
        threading.Thread(target=lambda: reasons.put(_outcome(where, request, limit_s)), daemon=True).start()
    refused = {reasons.get() for _ in range(ranks)} - {""}
    if refused:
        raise click.ClickException("; ".join(sorted(refused)))


@main.command()
@_JOB
@_LIMIT
@click.argument("member")
def remove(job: Path | None, limit_s: float, member: str) -> None:
    """Let MEMBER (its id, or its rank) leave a running job after the present step."""
    where = find_job(job)
    if member.isdigit():
        (answer,) = ask(where, {"do": "status"}, limit_s=10.0)
        if int(member) >= len(answer["members"]):
            raise click.ClickException(f"there is no rank {member}; the job has {len(answer['members'])}")
        member = answer["members"][int(member)]
    if reason := _follow(where, {"do": "remove", "member": member}, limit_s):
        raise click.ClickException(reason)


@main.command(context_settings={"ignore_unknown_options": True})
@_JOB
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def takeover(job: Path | None, options: tuple[str, ...]) -> None:
    """Become the launcher of a job on several hosts, which goes on where it was.

    To be run on one of its hosts, from where ssh reaches the others. The ranks are started anew from here; when they
    are up, the old ones end after their present step, with the state in the memory of each host, and the new go on.
    OPTIONS of chaosrun, such as --hosts, say what is to be otherwise.
    """
    take_over(find_job(job).absolute(), options)


@main.command()
@_JOB
@click.argument("order", type=click.Choice(["show", "down", "up"]), default="show")
@click.argument("hosts", nargs=-1)
def link(job: Path | None, order: str, hosts: tuple[str, ...]) -> None:
    """Show the links between the hosts of a job; or have one not be used any more (down A B), or used again (up A B).

    What would go over a link that is down goes over a third host, where the agents may set routes.
    """
    where = find_job(job)
    if order == "show":
        if hosts:
            raise _UsageError("chaosctl link shows all links; down and up are for the link between two hosts")
        if (state := look(where)) is None:
            raise click.ClickException(NOBODY)
        if not state["links"]:
            raise click.ClickException("no links are known: the job runs on one host, or without agents")
        for row in state["links"]:
            click.echo(f"{row['a']} - {row['b']}: {describe_link(row)}")
        return
    if len(hosts) != 2:
        raise _UsageError(f"chaosctl link {order} takes the names of two hosts")
    (answer,) = ask(where, {"do": "link", "a": hosts[0], "b": hosts[1], "down": order == "down"}, limit_s=10.0)
    if answer["reason"]:
        raise click.ClickException(answer["reason"])


class _UsageError(click.ClickException):
    """An error that is the caller's, with the exit status for those."""

    exit_code = EXIT_USAGE


def _outcome(job: Path, request: dict[str, Any], limit_s: float) -> str:
    """The same as :func:`_follow`, with errors as reasons."""
    try:
        return _follow(job, request, limit_s)
    except click.ClickException as error:
        return error.message
    except Exception as error:  # whoever waits for the outcome is to get one
        return str(error) or type(error).__name__


def _follow(job: Path, request: dict[str, Any], limit_s: float) -> str:
    """Print what becomes of a request; why it was refused, or nothing."""
    for answer in ask(job, request, limit_s):
        if answer["what"] == "starting":
            again = f" (attempt {answer['attempt']}; the one before: {answer['failure']})"
            click.echo(f"{answer['sponsor']} starts a rank{again if answer['attempt'] > 1 else ''}")
        elif answer["what"] == "active":
            click.echo(f"{answer['member']} takes part")
        elif answer["what"] == "left":
            click.echo(f"{', '.join(answer['members'])} left")
        elif answer["what"] == "refused":
            return str(answer["reason"])
    return ""


if __name__ == "__main__":
    main()
