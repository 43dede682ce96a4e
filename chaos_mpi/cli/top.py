"""``chaosctl top``: a running job on the whole terminal, anew every second."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from chaos_mpi.cli.joblog import as_text, told
from chaos_mpi.cli.status import (
    SILENT,
    Job,
    describe_join,
    describe_machine,
    describe_transfer,
    duration,
    headline,
    look,
    rank_cells,
)

#: Time between two pictures, seconds.
PERIOD_S = 1.0
#: Lines of the log that are shown.
LOG_LINES = 8
#: A job of which nobody has answered for so many looks has ended.
SILENT_LOOKS = 3

_COLUMNS: tuple[tuple[str, JustifyMethod], ...] = (
    ("rank", "right"),
    ("host", "left"),
    ("pid", "right"),
    ("cpu", "right"),
    ("rss", "right"),
    ("step", "right"),
    ("state", "left"),
)


def frame(job: Job, directory: str) -> RenderableType:
    """One picture of a job; see :func:`chaos_mpi.cli.status.combine`."""
    parts: list[RenderableType] = [_header(job, directory), _ranks(job), _machines(job)]
    if job["joins"] or job["transfers"]:
        parts.append(_newcomers(job))
    if log := told(job["events"])[-LOG_LINES:]:
        parts += [
            Text("\nlast events", style="bold"),
            Text("\n".join(map(as_text, log)), no_wrap=True, overflow="ellipsis"),
        ]
    return Group(*parts)


def _header(job: Job, directory: str) -> Text:
    changes = job["changes"]
    counts = ", ".join(f"{what} {changes[what]}" for what in ("deaths", "joins", "leaves"))
    most = f" to {job['max_ranks']}" if job["max_ranks"] is not None else " or more"
    return Text.assemble((headline(job), "bold"), f"\n{counts}; {job['min_ranks']}{most} members wanted; {directory}")


def _ranks(job: Job) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in _COLUMNS:
        table.add_column(name, justify=justify)
    for rank in job["ranks"]:
        number, _, state, step, cpu, memory = rank_cells(rank)
        style = "red" if state == SILENT else ""
        table.add_row(number, rank["host"], str(rank["pid"] or "-"), cpu, memory, step, state, style=style)
    return table


def _machines(job: Job) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for host, machine in sorted(job["machines"].items()):
        table.add_row(host, describe_machine(machine, job["at"]))
    return table


def _newcomers(job: Job) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for join in job["joins"]:
        table.add_row("on its way", "", describe_join(join, job["at"]))
    for transfer in job["transfers"]:
        bar = ProgressBar(total=max(transfer["wanted_bytes"], 1), completed=transfer["got_bytes"], width=24)
        table.add_row(transfer["member"], bar, describe_transfer(transfer))
    return table


def once(directory: Path, console: Console) -> bool:
    """Print one picture; False if nobody answers."""
    job = look(directory)
    if job is not None:
        console.print(frame(job, str(directory)))
    return job is not None


def watch(directory: Path, console: Console) -> str:
    """Show the job until it ends, or ``q`` or ctrl-C is pressed; returns what there is to say at the end."""
    silent, seen = 0, time.time()
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while silent < SILENT_LOOKS:
            job = look(directory)
            if job is not None:
                silent, seen = 0, time.time()
                live.update(frame(job, str(directory)), refresh=True)
            else:
                silent += 1
            if pressed(PERIOD_S) in ("q", "Q"):
                return ""
    return f"nobody has answered for {duration(time.time() - seen)}: the job has ended, or hangs"


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key of the terminal, and gives it back, or an empty string."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(limit_s: float) -> str:
        if not select.select([descriptor], [], [], limit_s)[0]:
            return ""
        return os.read(descriptor, 1).decode(errors="replace") or "q"  # nothing to read: the terminal is gone

    tty.setcbreak(descriptor)
    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
