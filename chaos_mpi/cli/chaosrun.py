"""``chaosrun``: starts a job here or on several hosts, passes its output on, and says how it ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import click

from chaos_mpi import __version__
from chaos_mpi.agent import marks
from chaos_mpi.agent.home import held, note_down
from chaos_mpi.cli import cluster, handover, witness
from chaos_mpi.cli.cluster import Cluster, cluster_of
from chaos_mpi.cli.control import LAUNCHER, MEMORY_FILE, remove_left_over
from chaos_mpi.cli.doctor import report
from chaos_mpi.cli.hosts import initial_ranks, slots_here
from chaos_mpi.cli.options import Seconds
from chaos_mpi.cli.outcome import EXIT_GOES_ON, EXIT_STOPPED, EXIT_USAGE, judge, read_records, untold
from chaos_mpi.cli.process import LauncherLostError, MpirunJob
from chaos_mpi.cli.starting import StartProgress
from chaos_mpi.cli.terminal import say
from chaos_mpi.config import BATCH_POLICIES, JOIN_POLICIES, LOG_LEVELS, SCALE_POLICIES
from chaos_mpi.errors import ChaosError, ConfigError
from chaos_mpi.mpi.launch import LAUNCHER_NOT_UP, SHM_DIRECTORY, mpirun_command

START_ATTEMPTS = 3
_SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


class _Command(click.Command):
    """Says in one line what is wrong with the arguments, as :func:`_refuse` does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _refuse(error.format_message())


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
        _refuse(str(error))
    slots = len(hosts.hosts) if hosts is not None else ranks
    ranks = _size(slots, min_ranks, max_ranks, hosts_from, scale_policy, for_ssh=hosts is not None)
    if restarts and hosts is None:
        _refuse("--restarts is for jobs on several hosts: give --hosts or --hostfile as well")
    if restarts and hosts_from is not None and scale_policy != "manual":
        _refuse("--scale-policy available fills the place of a rank that crashed already: leave --restarts out")
    if resume and checkpoint_dir is None:
        _refuse("--resume needs --checkpoint-dir")
    if metrics_address is not None and metrics_port is None:
        _refuse("--metrics-address needs --metrics-port")
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
    start = _Start(ranks, _program(script, module), chosen, hosts, tag_output, drop_noise=log_level != "debug")
    try:
        if dry_run:
            print(start.shown())
            return
        if hosts is not None:
            _refuse_hosts(hosts.check())
        sys.exit(_run(start, (metrics_address or "127.0.0.1", metrics_port) if metrics_port is not None else None))
    except ChaosError as error:
        _refuse(str(error))


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
        _refuse(f"--min-ranks {min_ranks} is more than --max-ranks {max_ranks}")
    if hosts_from is None and scale_policy == "available":
        _refuse("--scale-policy available needs --hosts-from")
    if ranks is None and hosts_from is None:
        ranks = 1
    if ranks is not None and min_ranks is not None and min_ranks > ranks:
        _refuse(f"--min-ranks {min_ranks} is more than -n {ranks}")
    if ranks is not None and max_ranks is not None and max_ranks < ranks:
        _refuse(f"--max-ranks {max_ranks} is less than -n {ranks}")
    try:
        if hosts_from is not None and ranks is None:
            return initial_ranks(hosts_from, min_ranks, max_ranks)
        if hosts_from is not None:
            slots_here(hosts_from, for_ssh=for_ssh)  # so that an error shows before anything is started
    except ConfigError as error:
        _refuse(str(error))
    assert ranks is not None
    return ranks


@dataclass(frozen=True, slots=True)
class _Start:
    """All that is needed to start the job.

    Attributes:
        ranks: how many.
        program: the command of each.
        chosen: variables for them.
        hosts: where they run, if not all on this machine.
        tag_output: let mpirun say which rank each line is from.
        drop_noise: leave out what Open MPI remarks.
    """

    ranks: int
    program: list[str]
    chosen: dict[str, str]
    hosts: Cluster | None
    tag_output: bool
    drop_noise: bool

    def line(self, run_dir: Path, witness_name: str | None = None) -> list[str]:
        """The mpirun line, with the job's private directory and the name of its witness, if it has one."""
        hosts, program = self.hosts, self.program
        names = {*self.variables(run_dir), "CHAOS_RUN_DIR", *os.environ}
        return mpirun_command(
            self.ranks,
            program if hosts is None else hosts.rank_command(run_dir, program, witness_name),
            forward=sorted(name for name in names if name.startswith("CHAOS_")),
            tag_output=self.tag_output,
            settings=None if hosts is None else hosts.mca_settings(os.environ),
        )

    def variables(self, run_dir: Path) -> dict[str, str]:
        """For mpirun, beside those that are there and that of the job's private directory."""
        return {**self.chosen, **({} if self.hosts is None else self.hosts.environment(run_dir))}

    def shown(self) -> str:
        """The mpirun line, with the variables, for a person to read."""
        run_dir = Path("CHAOS_RUN_DIR")
        variables = self.variables(run_dir).items()
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in variables), shlex.join(self.line(run_dir))]
        )

    def witness(self, run_dir: Path) -> AbstractContextManager[str | None]:
        """What has this host take part in the vote, if no rank does; gives its name."""
        settings = None if self.hosts is None else self.hosts.witness_settings()
        return contextlib.nullcontext() if settings is None else witness.running(run_dir, settings)

    def progress(self, run_dir: Path) -> Callable[[float], None]:
        """What says how far the start is, when it is called with the time."""
        if self.hosts is None:
            return lambda _: None
        return StartProgress(run_dir, self.hosts.hosts, time.monotonic(), say).look

    def job(self, run_dir: Path, environment: dict[str, str], witness_name: str | None) -> MpirunJob:
        """Start it."""
        return MpirunJob(
            self.line(run_dir, witness_name), environment, run_dir, ranks=self.ranks, tagged=self.tag_output,
            drop_noise=self.drop_noise, outlived=self.hosts is not None,
        )  # fmt: skip


def _run(start: _Start, metrics: tuple[str, int] | None) -> int:
    """Run the job and return chaosrun's exit status."""
    remove_left_over()
    with (
        _private_directories() as (run_dir, settings),
        _metrics(metrics, run_dir) as serving,
        start.witness(run_dir) as witness_name,
    ):
        if start.hosts is not None:
            start.hosts.note(run_dir)
        environment = {**settings, **os.environ, **start.variables(run_dir), "CHAOS_RUN_DIR": str(run_dir)}
        taken_over = handover.begin(environment, run_dir, start.ranks)
        for attempt in range(1, START_ATTEMPTS + 1):
            job = start.job(run_dir, environment, witness_name)
            try:
                with serving():  # not before: there are to be no threads while mpirun is started
                    status = job.wait(start.progress(run_dir))
            except LauncherLostError as error:
                say(str(error))
                return EXIT_GOES_ON
            records = read_records(run_dir)
            unstarted = status == LAUNCHER_NOT_UP and not records.starting and job.interrupted_by is None
            if not unstarted or attempt == START_ATTEMPTS:
                break
            say("mpirun could not set itself up, see above; trying again")
        if job.interrupted_by is not None:
            stopped = judge(records, status)
            if stopped.status == EXIT_STOPPED and not job.has_shown(stopped.message):
                say(stopped.message)
            fate = "all ranks were ended"
            if taken_over is not None and not taken_over.begun:
                fate = "the takeover is given up, and the job goes on as it was"
            elif silent := untold(records, job.told):
                fate = (
                    f"{', '.join(silent)} did not confirm it, and the ranks there may train on: look there with "
                    "'chaosctl status'"
                )
            say(f"interrupted by {job.interrupted_by.name}; {fate}")
            return 128 + job.interrupted_by
        verdict = judge(records, status)
        if verdict.message and not (verdict.status and job.has_shown(verdict.message)):
            say(verdict.message)
        if taken_over is not None and (advice := taken_over.left()):
            say(advice)
        return verdict.status


@contextlib.contextmanager
def _metrics(where: tuple[str, int] | None, run_dir: Path) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """What serves metrics of the job at this address and port, which is taken already; nothing if there is none."""
    if where is None:
        yield contextlib.nullcontext
        return
    try:
        from chaos_mpi.cli.metrics import MetricsEndpoint
    except ImportError:
        _refuse("--metrics-port needs prometheus-client: pip install 'chaos-mpi[metrics]'")
    try:
        endpoint = MetricsEndpoint(*where, run_dir)
    except (OSError, UnicodeError) as error:  # the second one from names that cannot be one
        _refuse(f"metrics cannot be served at {where[0]}, port {where[1]}: {getattr(error, 'strerror', '') or error}")
    with contextlib.closing(endpoint):
        say(f"metrics at {endpoint.url}")
        yield endpoint.serving


@contextlib.contextmanager
def _private_directories() -> Iterator[tuple[Path, dict[str, str]]]:
    """The job's directory, and settings that keep all files of the launcher and of MPI in such directories.

    They are removed at the end, because a killed rank cannot tidy up after itself.
    """
    with contextlib.ExitStack() as stack:

        def private(parent: Path | None = None) -> str:
            # Made with mode 0700.
            made = tempfile.TemporaryDirectory(prefix="chaosrun-", dir=parent, ignore_cleanup_errors=True)
            return stack.enter_context(made)

        try:
            run_dir = private()
            stack.enter_context(held(Path(run_dir)))
            note_down(Path(run_dir), LAUNCHER, marks.here())
            settings = {"PRTE_MCA_prte_tmpdir_base": run_dir}
            if os.access(SHM_DIRECTORY, os.W_OK | os.X_OK):
                memory = settings["OMPI_MCA_btl_sm_backing_directory"] = private(SHM_DIRECTORY)
                Path(run_dir, MEMORY_FILE).write_text(memory)
        except OSError as error:
            _refuse(
                f"the job's directory for temporary files cannot be made: {error}. Make room, or set TMPDIR to a "
                "directory that can be written to"
            )
        yield Path(run_dir), settings


def _program(script: tuple[str, ...], module: bool) -> list[str]:
    """The command of one rank."""
    if not script:
        _refuse("there is no script to run: chaosrun -n 4 train.py")
    if module:
        return [sys.executable, "-m", *script]
    name = script[0]
    if name.startswith("-"):
        _refuse(f"no such option: {name}")
    if Path(name).suffix == ".py":
        if not os.path.isfile(name):
            _refuse(f"there is no file {name}")
        return [sys.executable, *script]
    if shutil.which(name) is None:
        _refuse(f"{name} is neither a Python file (.py) nor an executable")
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
        _refuse(f"the checkpoint directory {directory} cannot be made: {error.strerror}")
    if not os.access(directory, os.W_OK | os.X_OK):
        _refuse(f"the checkpoint directory {directory} cannot be written to")


def _refuse(reason: str) -> NoReturn:
    say(reason)
    sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
