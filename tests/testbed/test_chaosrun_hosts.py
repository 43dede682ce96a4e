"""``chaosrun`` and ``chaosctl`` with ranks on several hosts, over ssh. Skipped without root or ssh."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from checks import check_history  # noqa: E402
from jobs import Finished, Job, start_training  # noqa: E402
from problem import Problem, read_traces  # noqa: E402

Bed = tuple[TestBed, SshServers]
HOSTS = "edge1,edge2,edge3"
LIMIT_S = 90.0
#: Trains until the file "stop" is there.
ENDLESS = Problem(ranks=3, epochs=10**6, pause_s=0.01)
Start = Callable[..., Job]


@pytest.fixture
def launched(ssh_bed: Bed, tmp_path: Path, remote_python: str) -> Iterator[Start]:
    """Starts a job on hosts of the bed."""
    bed, ssh = ssh_bed
    with ExitStack() as stack:

        def make(problem: Problem = ENDLESS, hosts: str = HOSTS, *options: str) -> Job:
            where = ["--hosts", hosts, "--ssh-args", shlex.join(ssh.command[1:]), "--remote-python", remote_python]
            where += ["--network", bed.subnet, "--log-dir", str(tmp_path / "logs"), *options]
            # The same as in the hosts, and for this job alone, so that what is left of it can be seen.
            environment = {"TMPDIR": str(tmp_path / "tmp")}
            return stack.enter_context(
                start_training(tmp_path / "job", problem, options=where, environment=environment, limit_s=LIMIT_S)
            )

        yield make


def members(job: Job) -> dict[str, str]:
    """Member ids by host, as the job began or grew; the newest of each host."""
    found = {}
    for path in job.folder.glob("events-*.jsonl"):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "session_started":
                found[event["host"]] = event["member"]
    return found


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


def check_nothing_left(job: Job) -> None:
    assert list((job.folder.parent / "tmp").iterdir()) == []


def test_a_job_on_hosts(launched: Start) -> None:
    problem = Problem(ranks=3)
    job = launched(problem)
    finished = job.finish()
    check_history(finished, problem, set(members(job).values()))
    assert set(members(job)) == {"edge1", "edge2", "edge3"}
    check_nothing_left(job)


def test_a_rank_is_killed(launched: Start) -> None:
    job = launched()
    train(job)
    os.kill(pid_of(job, "edge2"), signal.SIGKILL)
    train(job, 20)
    stop(job)
    finished = job.finish()
    of = members(job)
    check_training(finished, ENDLESS, {of["edge1"], of["edge3"]})
    assert [e["failed"] for e in finished.events("failure_detected") if e["failed"]]
    check_nothing_left(job)


def test_ranks_are_added_and_removed_from_the_launch_host(launched: Start) -> None:
    job = launched(ENDLESS, "edge1,edge2", "-n", "2")
    train(job)
    added = chaosctl(job, "add", "--host", "edge3")
    assert re.fullmatch(r"\S+ starts a rank\nedge3:\d+ takes part\n", added.stdout), added
    of = members(job)
    removed = chaosctl(job, "remove", of["edge1"])
    assert removed.stdout == f"{of['edge1']} left\n", removed
    status = json.loads(chaosctl(job, "status", "--json").stdout)
    assert status["members"] == [of["edge2"], of["edge3"]]
    train(job)
    stop(job)
    check_training(job.finish(), ENDLESS, {of["edge2"], of["edge3"]})
    check_nothing_left(job)


def test_chaosctl_on_a_host_of_the_job(launched: Start, ssh_bed: Bed, remote_python: str) -> None:
    job = launched()
    train(job)
    (home,) = (job.folder.parent / "tmp").glob("chaosrun-*-edge2")
    command = [remote_python, "-m", "chaos_mpi.cli.chaosctl", "status", "--json", "--job", str(home)]
    told = subprocess.run(ssh_bed[0].command("edge2", command), capture_output=True, text=True, timeout=30, check=False)
    assert json.loads(told.stdout)["member"] == members(job)["edge2"], told.stderr
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("killed", ["prterun", "chaosrun"])
def test_the_launcher_is_no_single_point_of_failure(launched: Start, killed: str) -> None:
    job = launched()
    train(job)
    if killed == "chaosrun":
        job.signal(signal.SIGKILL)
    else:
        os.kill(launcher_pid(job, "prterun"), signal.SIGKILL)
    of = members(job)
    before = job.steps_finished()
    wait(lambda: job.steps_finished() >= before + 20, "steps without the launcher")
    os.kill(pid_of(job, "edge3"), signal.SIGKILL)
    before = job.steps_finished()
    wait(lambda: job.steps_finished() >= before + 20, "steps after another loss")
    stop(job)
    if killed == "prterun":
        finished = job.finish()
        assert finished.status == 4
        assert "the ranks train on without it" in finished.output
    wait(lambda: not job.processes(), "the end of all")
    results = {path.name: json.loads(path.read_text()) for path in job.folder.glob("result-*.json")}
    assert set(results) == {f"result-{of[host]}.json" for host in ("edge1", "edge2")}
    assert len({result["digest"] for result in results.values()}) == 1
    assert all(result["identical"] for result in results.values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_job_leaves_nothing(launched: Start, number: signal.Signals) -> None:
    job = launched()
    train(job)
    job.signal(number)
    assert job.finish().status == 128 + number
    check_nothing_left(job)


def test_hosts_that_cannot_be_used_are_named(launched: Start, ssh_bed: Bed) -> None:
    ssh_bed[0].power_off("edge2")
    job = launched(ENDLESS, HOSTS, "--ssh-args", shlex.join([*ssh_bed[1].command[1:], "-oConnectTimeout=2"]))
    finished = job.finish()
    assert finished.status == 2
    assert re.search(r"^chaosrun: edge2: ssh cannot connect: .+", finished.output, re.MULTILINE), finished.output
    assert "edge1" not in finished.output
    check_nothing_left(job)


def wait(condition: Callable[[], bool], what: str) -> None:
    """As :meth:`Job.wait_until`, for when the launcher has ended."""
    limit = time.monotonic() + LIMIT_S / 2
    while not condition():
        assert time.monotonic() < limit, f"waited for {what}"
        time.sleep(0.02)
