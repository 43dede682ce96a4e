"""Starts real jobs for the fault tests, gathers all they left, and makes sure that nothing of them goes on running.

Every process of a job carries a variable of its own in its environment; that is how the processes are found, whatever
sessions or process groups they are in.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fault_points import Rule
from problem import Problem, read_traces

import chaos_mpi

HERE = Path(__file__).resolve().parent
PACKAGE_ROOT = Path(chaos_mpi.__file__).resolve().parent.parent
_MARKER = "CHAOS_TEST_JOB"
#: What is left of a job must be gone this soon after its launcher ended.
GRACE_S = 5.0
#: How often a test looks whether what it waits for has come. Looking takes the time of cores that the job wants.
PAUSE_S = 0.02


class JobError(AssertionError):
    """A job did not end, or left something running."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A job that ended.

    Attributes:
        status: exit status of the launcher.
        output: standard output and error of everything.
        folder: where the script wrote.
        seconds: from start to end.
    """

    status: int
    output: str
    folder: Path
    seconds: float

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The lines of all members' event logs, those called ``name`` only if given, in order of time."""
        found = []
        for path in self.folder.glob("events-*.jsonl"):
            lines = path.read_text().split("\n")
            # A process that is killed while it writes may leave half a line, and nothing after it.
            found += [json.loads(line) for line in lines[:-1]]
        return sorted((e for e in found if name in (None, e["event"])), key=lambda e: e["mono"])

    def results(self) -> dict[str, dict[str, Any]]:
        """What the members that came to the end wrote, by member."""
        return {
            path.name.removeprefix("result-").removesuffix(".json"): json.loads(path.read_text())
            for path in self.folder.glob("result-*.json")
        }

    def pid(self, rank: int) -> int:
        """The process id of a rank, as numbered at the start."""
        return int((self.folder / f"mark-pid.{rank}").read_text())

    def member(self, rank: int) -> str:
        """The member id of a rank, as numbered at the start."""
        return f"{os.uname().nodename}:{self.pid(rank)}"


class Job:
    """One job under way. A context manager: at its end no process of the job is left."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str], limit_s: float) -> None:
        self.folder = folder
        self._limit_s = limit_s
        self._token = uuid.uuid4().hex
        self._log = folder / "output.txt"
        self._began = time.monotonic()
        env = {**clean_environment(), **environment, _MARKER: self._token}
        self._temporary = Path(environment.get("TMPDIR", folder))
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                list(command), cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - as without nohup
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_rest()
        # Who was killed leaves it; no later job finds it where the directory for temporary files is the test's own.
        for note in self._temporary.glob("chaosrun-*/memory"):
            shutil.rmtree(note.read_text(), ignore_errors=True)
        # pytest shows it only when the test fails.
        print(f"--- output of the job in {self.folder}\n{self.output()}")
        for path in sorted(self.folder.glob("events-*.jsonl")):
            lines = [line for line in path.read_text().splitlines() if '"event":"step"' not in line.replace(" ", "")]
            print(f"--- {path.name}\n" + "\n".join(lines))

    def output(self) -> str:
        """What the job has written so far."""
        return self._log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Ids of the job's living processes, the launcher included."""
        needle = f"{_MARKER}={self._token}".encode()
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    if needle in Path(entry.path, "environ").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue  # gone in the meantime
        return found

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until ``condition()``; fails when the job ends before, or takes too long."""
        while not condition():
            if self._process.poll() is not None:
                raise JobError(f"the job ended before {what}")
            self._check_limit(what)
            time.sleep(PAUSE_S)

    def pid(self, rank: int) -> int:
        """The process id of a rank, as numbered at the start."""
        path = self.folder / f"mark-pid.{rank}"
        self.wait_until(path.exists, f"rank {rank} started")
        return int(path.read_text())

    def steps_finished(self) -> int:
        """The number of steps that some member has logged as finished."""
        traces = read_traces(self.folder).values()
        return max((max(trace.steps, default=0) for trace in traces), default=0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the launcher."""
        self._process.send_signal(number)

    def kill(self, pid: int) -> None:
        """Kill one process of the job."""
        os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill every process of the job at once, as a power failure would."""
        self._kill_rest()

    def finish(self) -> Finished:
        """Wait for the end of the job.

        Raises:
            JobError: it did not end in time, or processes are left.
        """
        while self._process.poll() is None:
            self._check_limit("it ended")
            time.sleep(PAUSE_S)
        seconds = time.monotonic() - self._began
        deadline = time.monotonic() + GRACE_S
        while left := self.processes():
            if time.monotonic() > deadline:
                raise JobError(f"processes are left: {[_describe(pid) for pid in left]}")
            time.sleep(0.02)
        return Finished(self._process.returncode, self.output(), self.folder, seconds)

    def finish_launcher(self) -> int:
        """Wait for the end of the launcher alone; its exit status."""
        while self._process.poll() is None:
            self._check_limit("the launcher ended")
            time.sleep(PAUSE_S)
        return self._process.returncode

    def _check_limit(self, what: str) -> None:
        if time.monotonic() - self._began > self._limit_s:
            stacks = "\n".join(f"--- {_describe(pid)}\n{_stack(pid)}" for pid in self.processes())
            raise JobError(f"{self._limit_s:.0f} s passed before {what}\n{stacks}")

    def _kill_rest(self) -> None:
        # Again and again, since a process may have been starting another one just now.
        while left := self.processes():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if self._process.poll() is None:
                self._process.wait()
        self._process.wait()
        for record in self._session_directories():
            shutil.rmtree(record, ignore_errors=True)

    def _session_directories(self) -> list[Path]:
        return list(self.folder.glob("tmp/prte.*")) + list(self.folder.glob("tmp/ompi.*"))


def clean_environment() -> dict[str, str]:
    """This process's environment without what a surrounding job or a user's settings would change."""
    prefixes = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "CHAOS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    path = [str(PACKAGE_ROOT), str(HERE), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def chaosrun(ranks: int, *options: str) -> list[str]:
    """The launcher's command line, up to the script."""
    return [sys.executable, "-m", "chaos_mpi.cli.chaosrun", "-n", str(ranks), *options]


def mpirun(ranks: int) -> list[str]:
    """Plain mpirun's command line, up to and including the interpreter."""
    return ["mpirun", "--with-ft", "ulfm", "-n", str(ranks), sys.executable]


MPIRUN_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def start(
    script: str,
    folder: Path,
    *arguments: str,
    ranks: int = 4,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    plain_mpirun: bool = False,
    before: Sequence[str] = (),
    limit_s: float = 90.0,
    timeout_s: float = 40.0,  # a newcomer that others wait for may take long to start where tests share few cores
) -> Job:
    """Start ``script`` (a file beside this one) on ``ranks`` ranks, with ``chaosrun`` or plain mpirun.

    Args:
        folder: where the job works and writes.
        options: of chaosrun.
        before: a command that runs the one which follows.
        limit_s: the job is killed, and the test fails, when it takes longer.
        timeout_s: the limit of the session's own waits.
    """
    env = {"CHAOS_EVENT_LOG": str(folder / "events-%m.jsonl"), "CHAOS_TIMEOUT_S": str(timeout_s), **(environment or {})}
    if plain_mpirun:
        command, env = mpirun(ranks), {**MPIRUN_ENVIRONMENT, **env}
    else:
        command = chaosrun(ranks, *options)
    return Job([*before, *command, str(HERE / script), *arguments], folder, env, limit_s)


def start_training(
    folder: Path,
    problem: Problem,
    faults: Sequence[Rule] = (),
    *,
    may_be_armed: bool = False,
    script: str = "train.py",
    options_of_script: Mapping[str, Any] | None = None,
    **how: Any,
) -> Job:
    """Start ``script`` with these rules; ``how`` as for :func:`start`."""
    folder.mkdir(exist_ok=True)
    job = folder / "job.json"
    told = {"problem": dataclasses.asdict(problem), "faults": list(faults), "may_be_armed": may_be_armed}
    told["options"] = dict(options_of_script or {})
    job.write_text(json.dumps({"folder": str(folder), **told}))
    environment = {"CHAOS_BATCH_POLICY": problem.policy, **how.pop("environment", {})}
    return start(script, folder, str(job), ranks=problem.ranks, environment=environment, **how)


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return f"{pid} (gone)"
    return f"{pid} ({state}) {command[:160]}"


def _stack(pid: int) -> str:
    tool = shutil.which("py-spy")
    if tool is None:
        return "(install py-spy to see stacks here)"
    try:
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--native", "--pid", str(pid)],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "(py-spy did not answer)"
    return done.stdout or done.stderr
