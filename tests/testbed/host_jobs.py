"""Jobs on the hosts of a test bed, for tests of what becomes of them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from checks import check_history, check_move  # noqa: E402, F401
from jobs import Finished, Job, start_training  # noqa: E402
from problem import Problem, read_traces  # noqa: E402

Bed = tuple[TestBed, SshServers]
Start = Callable[..., Job]
LIMIT_S = 90.0
#: Trains until the file "stop" is there.
ENDLESS = Problem(ranks=3, epochs=10**6, pause_s=0.01)


def start_on_hosts(bed: Bed, folder: Path, python: str, problem: Problem, *options: str) -> Job:
    """``chaosrun`` on the launch host; ``options`` say on which hosts.

    Args:
        folder: for the job; ``tmp`` in it is where the launcher and the hosts have their temporary files.
        python: to be used on the hosts.
    """
    where = ["--ssh-args", shlex.join(bed[1].command[1:]), "--remote-python", python]
    where += ["--network", bed[0].subnet, "--log-dir", str(folder / "logs"), *options]
    environment = {"TMPDIR": str(folder / "tmp")}
    return start_training(folder / "job", problem, options=where, environment=environment, limit_s=LIMIT_S)


def members(job: Job) -> dict[str, str]:
    """Member ids by host, as the job began or grew; the newest of each host."""
    started = []
    for path in job.folder.glob("events-*.jsonl"):
        started += [event for event in map(json.loads, path.read_text().split("\n")[:-1])
                    if event["event"] == "session_started"]  # fmt: skip
    return {event["host"]: event["member"] for event in sorted(started, key=lambda event: event["mono"])}


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(job.folder.parent / "tmp")}
    command = [sys.executable, "-m", "chaos_mpi.cli.chaosctl", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def launcher_pid(job: Job, name: str) -> int:
    (found,) = [
        pid for pid in job.processes()
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(name.encode())
    ]  # fmt: skip
    return found


def check_training(job: Finished, problem: Problem, finals: set[str]) -> None:
    """All that is promised of the training, of a job that was stopped at the end of an epoch."""
    epochs = 1 + max(batch["epoch"] for trace in read_traces(job.folder).values() for batch in trace.batches.values())
    check_history(job, replace(problem, epochs=epochs), finals)


def wait(condition: Callable[[], bool], what: str) -> None:
    """As :meth:`Job.wait_until`, for when the launcher has ended."""
    limit = time.monotonic() + LIMIT_S / 2
    while not condition():
        assert time.monotonic() < limit, f"waited for {what}"
        time.sleep(0.02)


def check_nothing_left(job: Job) -> None:
    """The last agents go when they have agreed that they are the last."""
    wait(lambda: not list((job.folder.parent / "tmp").iterdir()), "the end of what the job has left")


def check_survivors(job: Job, *hosts: str) -> None:
    """These end well and alike, and nothing is left of the job."""
    stop(job)
    of = members(job)
    names = {f"result-{of[host]}.json" for host in hosts}
    wait(lambda: {path.name for path in job.folder.glob("result-*.json")} >= names, "the results")
    results = [json.loads((job.folder / name).read_text()) for name in sorted(names)]
    assert len({result["digest"] for result in results}) == 1, results
    assert all(result["identical"] and result["size"] == len(hosts) for result in results), results
    wait(lambda: not job.processes(), "the end of all processes")
