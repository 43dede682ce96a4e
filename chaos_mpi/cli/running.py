"""The run of a job by ``chaosrun``, from its private directory to the exit status."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from chaos_mpi.agent import marks
from chaos_mpi.agent.home import held, note_down
from chaos_mpi.cli import handover, witness
from chaos_mpi.cli.cluster import Cluster
from chaos_mpi.cli.control import LAUNCHER, MEMORY_FILE, remove_left_over
from chaos_mpi.cli.outcome import EXIT_GOES_ON, EXIT_STOPPED, Records, Verdict, judge, read_records, untold
from chaos_mpi.cli.process import LauncherLostError, MpirunJob
from chaos_mpi.cli.starting import StartProgress
from chaos_mpi.cli.terminal import refuse, say
from chaos_mpi.mpi.launch import LAUNCHER_NOT_UP, SHM_DIRECTORY, mpirun_command

START_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Start:
    """All that is needed to start the job.

    Attributes:
        ranks: how many.
        program: the command of each.
        chosen: variables for them.
        hosts: where they run, if not all on this machine.
        tag_output: let mpirun say which rank each line is from.
        drop_noise: leave out what Open MPI remarks.
        grace_s: after a signal, the ranks have so long to end.
    """

    ranks: int
    program: list[str]
    chosen: dict[str, str]
    hosts: Cluster | None
    tag_output: bool
    drop_noise: bool
    grace_s: float

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
            drop_noise=self.drop_noise, outlived=self.hosts is not None, grace_s=self.grace_s,
        )  # fmt: skip


def run(start: Start, metrics: tuple[str, int] | None) -> int:
    """Run the job and return chaosrun's exit status."""
    remove_left_over()
    with (
        private_directories(shlex.join(start.program)) as (run_dir, settings),
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
            given_up = taken_over is not None and not taken_over.begun
            fate = (
                "the takeover is given up, and the job goes on as it was" if given_up else _fate(job, records, stopped)
            )
            say(f"interrupted by {job.interrupted_by.name}; {fate}")
            return 128 + job.interrupted_by
        verdict = judge(records, status, ranks=start.ranks, gave_up=job.mpi_gave_up)
        if verdict.message and not (verdict.status and job.has_shown(verdict.message)):
            say(verdict.message)
        if taken_over is not None and (advice := taken_over.left()):
            say(advice)
        return verdict.status


def _fate(job: MpirunJob, records: Records, verdict: Verdict) -> str:
    """What became of the ranks of a job that was interrupted."""
    if silent := untold(records, job.told):
        return (
            f"{', '.join(silent)} did not confirm it, and the ranks there may train on: look there with "
            "'chaosctl status'"
        )
    if any(record.get("outcome") == "finished" for record in records.outcomes.values()):
        return "the training had finished"
    if job.overdue and verdict.status != EXIT_STOPPED:
        return f"what had not ended was killed {job.overdue}, and the present state was not saved"
    return "all ranks were ended"


@contextlib.contextmanager
def _metrics(where: tuple[str, int] | None, run_dir: Path) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """What serves metrics of the job at this address and port, which is taken already; nothing if there is none."""
    if where is None:
        yield contextlib.nullcontext
        return
    try:
        from chaos_mpi.cli.metrics import MetricsEndpoint
    except ImportError:
        refuse("--metrics-port needs prometheus-client: pip install 'chaos-mpi[metrics]'")
    try:
        endpoint = MetricsEndpoint(*where, run_dir)
    except (OSError, UnicodeError) as error:  # the second one from names that cannot be one
        refuse(f"metrics cannot be served at {where[0]}, port {where[1]}: {getattr(error, 'strerror', '') or error}")
    with contextlib.closing(endpoint):
        say(f"metrics at {endpoint.url}")
        yield endpoint.serving


@contextlib.contextmanager
def private_directories(program: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """The job's directory, and settings that keep all files of the launcher and of MPI in such directories.

    They are removed at the end, because a killed rank cannot tidy up after itself. ``program`` is noted down there, for
    a person who has several jobs.
    """
    with contextlib.ExitStack() as stack:

        def private(parent: Path | None = None) -> str:
            # Made with mode 0700.
            made = tempfile.TemporaryDirectory(prefix="chaosrun-", dir=parent, ignore_cleanup_errors=True)
            return stack.enter_context(made)

        try:
            run_dir = private()
            stack.enter_context(held(Path(run_dir)))
            note_down(Path(run_dir), LAUNCHER, {**marks.here(), "program": program})
            settings = {"PRTE_MCA_prte_tmpdir_base": run_dir}
            if os.access(SHM_DIRECTORY, os.W_OK | os.X_OK):
                memory = settings["OMPI_MCA_btl_sm_backing_directory"] = private(SHM_DIRECTORY)
                Path(run_dir, MEMORY_FILE).write_text(memory)
        except OSError as error:
            refuse(
                f"the job's directory for temporary files cannot be made: {error}. Make room, or set TMPDIR to a "
                "directory that can be written to"
            )
        yield Path(run_dir), settings
