"""``chaosrun``: its options, and what they may be; :mod:`chaos_mpi.cli.running` runs the job."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from chaos_mpi import __version__
from chaos_mpi.cli import cluster
from chaos_mpi.cli.cluster import cluster_of
from chaos_mpi.cli.doctor import report
from chaos_mpi.cli.hosts import initial_ranks, slots_here
from chaos_mpi.cli.options import Seconds
from chaos_mpi.cli.outcome import EXIT_USAGE
from chaos_mpi.cli.process import GRACE_S
from chaos_mpi.cli.running import Start, run
from chaos_mpi.cli.terminal import refuse, say
from chaos_mpi.config import BATCH_POLICIES, JOIN_POLICIES, LOG_LEVELS, SCALE_POLICIES
from chaos_mpi.errors import ChaosError, ConfigError

_SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


class _Command(click.Command):
    """Says in one line what is wrong with the arguments, as :func:`~chaos_mpi.cli.terminal.refuse` does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            refuse(error.format_message())


@click.command(cls=_Command, context_settings=_SETTINGS)
@click.option("-n", "--np", "ranks", type=click.IntRange(min=1), help="Ranks to start with. Default: all slots, or 1.")
@cluster.options
@click.option("--min-ranks", type=click.IntRange(min=1), help="Stop, with the state saved, when fewer are left.")
@click.option("--max-ranks", type=click.IntRange(min=1), help="Refuse joins that would make the job larger.")
@click.option("--join-policy", type=click.Choice(JOIN_POLICIES), help="Train on while a newcomer gets the state?")
@click.option(
    "--hosts-from", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE|SCRIPT",
    help="Lines host:slots, of a file or printed by a script; may change while the job runs.",
)  # fmt: skip
@click.option(
    "--scale-policy", type=click.Choice(SCALE_POLICIES),
    help="Size of the job: the slots that are there (default with --hosts-from), or changed by request only.",
)  # fmt: skip
@click.option("--discovery-interval", type=Seconds(), help="Seconds between two looks.")
@click.option(
    "--restarts", type=click.IntRange(min=0), metavar="N",
    help="With --hosts: start crashed ranks again, N times an hour on each host. Default: 3; 0: not.",
)  # fmt: skip
@click.option("--batch-policy", type=click.Choice(BATCH_POLICIES), help="Batch and learning rate on a change of size.")
@click.option("--timeout", type=Seconds(), help="Longest wait for other ranks, seconds.")
@click.option(
    "--grace", type=Seconds(), default=GRACE_S, metavar="SECONDS",
    help=f"After Ctrl-C or SIGTERM, time for the present step, and for the state to be saved. Default: {GRACE_S:g}.",
)  # fmt: skip
@click.option("--checkpoint-dir", type=click.Path(file_okay=False, path_type=Path), help="Write checkpoints there.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, if there is one.")
@click.option(
    "--event-log", type=click.Path(dir_okay=False),
    help="Append events; %h and %m: host, member. Hosts that share a file system (NFS) need one of them.",
)  # fmt: skip
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="Serve Prometheus metrics; 0: any free port.")
@click.option("--metrics-address", help="Where to serve them. Default: 127.0.0.1.")
@click.option("--tag-output", is_flag=True, help="Put its rank in front of each line of output.")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="debug also shows Open MPI's own remarks.")
@click.option("-m", "module", is_flag=True, help="The first argument is a module, as in python -m.")
@click.option("--dry-run", is_flag=True, help="Print the mpirun line, and do nothing.")
@click.option("--doctor", is_flag=True, help="Check whether jobs can run here, and how to mend what is missing.")
@click.version_option(__version__)
@click.argument("script", nargs=-1, type=click.UNPROCESSED)
def main(
    ranks: int | None,
    min_ranks: int | None,
    max_ranks: int | None,
    join_policy: str | None,
    hosts_from: Path | None,
    scale_policy: str | None,
    discovery_interval: float | None,
    restarts: int | None,
    batch_policy: str | None,
    timeout: float | None,
    grace: float,
    checkpoint_dir: Path | None,
    checkpoint_every: int | None,
    resume: bool,
    event_log: str | None,
    metrics_port: int | None,
    metrics_address: str | None,
    tag_output: bool,
    log_level: str | None,
    module: bool,
    dry_run: bool,
    doctor: bool,
    script: tuple[str, ...],
    **where: Any,
) -> None:
    """Run SCRIPT with its arguments on -n ranks that may die while training goes on.

    Exit status: 0 when training finished, even if ranks died on the way; 3 when the job stopped itself (too few
    ranks left); 4 when the job goes on without this launcher, on several hosts: mpirun was lost, or another launcher
    took over; 2 for wrong arguments or hosts; 128 + signal when interrupted; 1 when it failed.
    """
    if doctor:
        sys.exit(report(ranks or 1, click.echo))
    try:
        hosts = cluster_of(ranks, **where)
    except ConfigError as error:
        refuse(str(error))
    slots = len(hosts.hosts) if hosts is not None else ranks
    ranks = _size(slots, min_ranks, max_ranks, hosts_from, scale_policy, for_ssh=hosts is not None)
    if restarts and hosts is None:
        refuse("--restarts is for jobs on several hosts: give --hosts or --hostfile as well")
    if restarts and hosts_from is not None and scale_policy != "manual":
        refuse("--scale-policy available fills the place of a rank that crashed already: leave --restarts out")
    if resume and checkpoint_dir is None:
        refuse("--resume needs --checkpoint-dir")
    if metrics_address is not None and metrics_port is None:
        refuse("--metrics-address needs --metrics-port")
    if checkpoint_dir is not None:
        _refuse_unwritable(checkpoint_dir)
    settings = {
        "CHAOS_MIN_RANKS": min_ranks,
        "CHAOS_MAX_RANKS": max_ranks,
        "CHAOS_JOIN_POLICY": join_policy,
        "CHAOS_HOSTS_FROM": hosts_from.absolute() if hosts_from is not None else None,
        "CHAOS_SCALE_POLICY": scale_policy,
        "CHAOS_DISCOVERY_INTERVAL_S": discovery_interval,
        "CHAOS_RESTARTS": restarts,
        "CHAOS_BATCH_POLICY": batch_policy,
        "CHAOS_TIMEOUT_S": timeout,
        "CHAOS_CHECKPOINT_DIR": checkpoint_dir.absolute() if checkpoint_dir is not None else None,
        "CHAOS_CHECKPOINT_EVERY": checkpoint_every,
        "CHAOS_RESUME": 1 if resume else None,
        "CHAOS_EVENT_LOG": Path(event_log).absolute() if event_log is not None else None,
        "CHAOS_LOG_LEVEL": log_level,
    }
    chosen = {name: str(value) for name, value in settings.items() if value is not None}
    if hosts is not None:
        needed = (Path.cwd(), *_files(script, checkpoint_dir, event_log, hosts_from))
        hosts = replace(hosts, paths=tuple(map(str, needed)))
    start = Start(ranks, _program(script, module), chosen, hosts, tag_output, log_level != "debug", grace)
    try:
        if dry_run:
            print(start.shown())
            return
        if hosts is not None:
            _refuse_hosts(hosts.check())
        sys.exit(run(start, (metrics_address or "127.0.0.1", metrics_port) if metrics_port is not None else None))
    except ChaosError as error:
        refuse(str(error))


def _size(
    ranks: int | None,
    min_ranks: int | None,
    max_ranks: int | None,
    hosts_from: Path | None,
    scale_policy: str | None,
    *,
    for_ssh: bool,
) -> int:
    """How many ranks to start, once all that speaks of sizes fits together."""
    if min_ranks is not None and max_ranks is not None and min_ranks > max_ranks:
        refuse(f"--min-ranks {min_ranks} is more than --max-ranks {max_ranks}")
    if hosts_from is None and scale_policy == "available":
        refuse("--scale-policy available needs --hosts-from")
    if ranks is None and hosts_from is None:
        ranks = 1
    if ranks is not None and min_ranks is not None and min_ranks > ranks:
        refuse(f"--min-ranks {min_ranks} is more than -n {ranks}")
    if ranks is not None and max_ranks is not None and max_ranks < ranks:
        refuse(f"--max-ranks {max_ranks} is less than -n {ranks}")
    try:
        if hosts_from is not None and ranks is None:
            return initial_ranks(hosts_from, min_ranks, max_ranks)
        if hosts_from is not None:
            slots_here(hosts_from, for_ssh=for_ssh)  # so that an error shows before anything is started
    except ConfigError as error:
        refuse(str(error))
    assert ranks is not None
    return ranks


def _program(script: tuple[str, ...], module: bool) -> list[str]:
    """The command of one rank."""
    if not script:
        refuse("there is no script to run: chaosrun -n 4 train.py")
    if module:
        return [sys.executable, "-m", *script]
    name = script[0]
    if name.startswith("-"):
        refuse(f"no such option: {name}")
    if Path(name).suffix == ".py":
        if not os.path.isfile(name):
            refuse(f"there is no file {name}")
        return [sys.executable, *script]
    if shutil.which(name) is None:
        refuse(f"{name} is neither a Python file (.py) nor an executable")
    return list(script)


def _files(
    script: tuple[str, ...], checkpoint_dir: Path | None, event_log: str | None, hosts_from: Path | None
) -> list[Path]:
    """What has to be on every host: the script, the directories that it is told to write to, and the list of hosts."""
    program = Path(script[0]) if script and Path(script[0]).suffix == ".py" else None
    log_dir = Path(event_log).absolute().parent if event_log is not None else None
    while log_dir is not None and ("%h" in str(log_dir) or "%m" in str(log_dir)):
        log_dir = log_dir.parent  # each rank makes its own below it
    return [path.absolute() for path in (program, checkpoint_dir, log_dir, hosts_from) if path is not None]


def _refuse_hosts(problems: list[str]) -> None:
    for problem in problems:
        say(problem)
    if problems:
        sys.exit(EXIT_USAGE)


def _refuse_unwritable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"the checkpoint directory {directory} cannot be made: {error.strerror}")
    if not os.access(directory, os.W_OK | os.X_OK):
        refuse(f"the checkpoint directory {directory} cannot be written to")


if __name__ == "__main__":
    main()
