"""``chaosctl takeover``: this process becomes the launcher of a job that has lost its own, or is to have another."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from chaos_mpi.agent.relaunch import launch_of
from chaos_mpi.cli.control import ask
from chaos_mpi.elastic import kept
from chaos_mpi.errors import ChaosError


def take_over(job: Path, options: Sequence[str]) -> NoReturn:
    """Become ``chaosrun`` for the job, which goes on as it is until all is ready: see :mod:`chaos_mpi.cli.handover`.

    Args:
        job: its private directory on this host, one of those that it runs on.
        options: of ``chaosrun``, for what is to be otherwise than before.

    Raises:
        click.ClickException: it cannot be taken over; says why.
    """
    (told,) = ask(job, {"do": "relaunch"}, limit_s=10.0)
    try:
        launch = launch_of(told, sys.executable, [option.partition("=")[0] for option in options])
        os.chdir(launch.directory)
    except ChaosError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"the job was started in {launch.directory}, which is not here: {error}") from error
    environment = {**os.environ, **launch.settings, kept.VARIABLE: kept.new_name(), kept.OLD_JOB: str(job.absolute())}
    line = [*launch.options, *options, *launch.program]
    os.execve(sys.executable, [sys.executable, "-P", "-m", "chaos_mpi.cli.chaosrun", *line], environment)  # noqa: S606
