"""``chaosctl``: looks at a job."""

from __future__ import annotations

from pathlib import Path

import click

from chaos_mpi import __version__
from chaos_mpi.cli.timeline import draw, rows
from chaos_mpi.events import read_events


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Look at a chaos_mpi job."""


@main.command()
@click.argument("events")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw a picture (PNG).")
def timeline(events: str, plot: Path | None) -> None:
    """Print what happened to a job, from its event log EVENTS (a file, or a glob pattern in quotes)."""
    found = read_events(events)
    if not found:
        raise click.ClickException(f"there are no events in {events}")
    for when, step, text in rows(found):
        click.echo(f"{when:8.2f} s  step {step:6d}  {text}")
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    main()
