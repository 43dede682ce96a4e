"""Jobs on the hosts of a test bed, for tests of what becomes of them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from checks import check_history, check_move  # noqa: E402, F401
from fault_points import Rule  # noqa: E402
from jobs import Finished, Job, clean_environment, start, start_training  # noqa: E402, F401
from problem import Problem, as_trained  # noqa: E402

Bed = tuple[TestBed, SshServers]
Start = Callable[..., Job]
LIMIT_S = 150.0
#: The same for one thing that a job is to do; a start of four hosts on two cores takes a while.
WAIT_LIMIT_S = 100.0
#: Trains until the file "stop" is there.
ENDLESS = Problem(ranks=3, epochs=10**6, pause_s=0.01)


def start_on_hosts(
    bed: Bed, folder: Path, python: str, problem: Problem, *options: str, rules: Sequence[Rule] = (), **how: Any
) -> Job:
    """``chaosrun`` on the launch host; ``options`` say on which hosts, and ``how`` is as for :func:`start_training`.

    Args:
        folder: for the job; ``tmp`` in it is where the launcher and the hosts have their temporary files.
        python: to be used on the hosts.
        rules: see :mod:`fault_points`.
    """
    return start_training(folder / "job", problem, rules, **there(bed, folder, python, *options), **how)


def there(bed: Bed, folder: Path, python: str, *options: str) -> dict[str, Any]:
    """How to start something on hosts: what :func:`start` takes.

    Ranks that crash are not started again, unless the options say so.
    """
    where = ["--ssh-args", shlex.join(bed[1].command[1:]), "--remote-python", python]
    where += ["--network", bed[0].subnet, "--log-dir", str(folder / "logs"), "--restarts", "0"]
    where += ["--heartbeat-limit", "2", *options]  # two cores hold up the agents of five hosts, now and then
    return {"options": where, "environment": {"TMPDIR": str(folder / "tmp")}, "limit_s": LIMIT_S}


def members(job: Job) -> dict[str, str]:
    """Member ids by host, as the job began or grew; the newest of each host."""
    return {event["host"]: event["member"] for event in events(job, "session_started")}


def pid_of(job: Job, host: str) -> int:
    return int(members(job)[host].rpartition(":")[2])


def train(job: Job, steps: int = 5) -> None:
    """Wait until it has trained so many steps more."""
    before = job.steps_finished()
    job.wait_until(lambda: job.steps_finished() >= before + steps, f"step {before + steps}")


def stop(job: Job) -> None:
    (job.folder / "stop").touch()


def chaosctl(job: Job, *arguments: str) -> subprocess.CompletedProcess[str]:
    """On the launch host."""
    with asked(job, *arguments) as process:
        output, errors = process.communicate(timeout=LIMIT_S)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@contextlib.contextmanager
def asked(job: Job, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``chaosctl`` on the launch host, which is not waited for."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(job.folder.parent / "tmp")}
    command = [sys.executable, "-m", "chaos_mpi.cli.chaosctl", *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def launcher_pid(job: Job, name: str) -> int:
    (found,) = [
        pid for pid in job.processes()
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(name.encode())
    ]  # fmt: skip
    return found


def witness_pid(job: Job) -> int:
    """The agent on the launch host, which has no rank."""
    (found,) = [
        pid for pid in job.processes() if b"chaos_mpi.agent.witness" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def check_training(job: Finished, problem: Problem, finals: set[str]) -> None:
    """All that is promised of the training, of a job that was stopped at the end of an epoch."""
    check_history(job, as_trained(problem, job.folder), finals)


def wait(condition: Callable[[], bool], what: str) -> None:
    """As :meth:`Job.wait_until`, for when the launcher has ended."""
    limit = time.monotonic() + WAIT_LIMIT_S
    while not condition():
        assert time.monotonic() < limit, f"waited for {what}"
        time.sleep(0.02)


def check_survivors(job: Job, *hosts: str) -> None:
    """The newest ranks of these end well and alike, and nothing is left of the job."""
    stop(job)
    of = members(job)
    names = {f"result-{of[host]}.json" for host in hosts}
    wait(lambda: {path.name for path in job.folder.glob("result-*.json")} >= names, "the results")
    results = [json.loads((job.folder / name).read_text()) for name in sorted(names)]
    assert len({result["digest"] for result in results}) == 1, results
    assert all(result["identical"] and result["size"] == len(hosts) for result in results), results
    wait(lambda: not job.processes(), "the end of all processes")


def reach(job: Job, mark: str) -> None:
    """Wait until a rank is at the point of a rule that says so."""
    job.wait_until((job.folder / f"mark-{mark}").exists, mark)


def events(job: Job, name: str) -> list[dict[str, Any]]:
    """Those so far, in order of time."""
    lines = [line for path in job.folder.glob("events-*.jsonl") for line in path.read_text().split("\n")[:-1]]
    return sorted((e for e in map(json.loads, lines) if e["event"] == name), key=lambda e: e["mono"])


def check_nothing_left(job: Job) -> None:
    """The last agents go when they have agreed that they are the last."""
    wait(lambda: not list((job.folder.parent / "tmp").iterdir()), "the end of what the job has left")
