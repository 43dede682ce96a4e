"""Ranks on several hosts, reached by ssh: proxies, supervisors, relays, severing, and the check of hosts beforehand.

Every host has its own network, name, shared memory and temporary directory of MPI. Skipped without root or ssh.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos_mpi.agent.environment import LAUNCHER_SETTINGS, network_settings
from chaos_mpi.agent.preflight import ask, ask_here, judge
from chaos_mpi.agent.registry import fence, registered
from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "tests" / "faults" / "agent_program.py")
LIMIT_S = 60.0

Bed = tuple[TestBed, SshServers]


def wait_for(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


@pytest.fixture
def remote_python(tmp_path: Path) -> str:
    """What ``--remote-python`` names in a host: this Python, and this copy of the package."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


class Job:
    """``mpirun`` in the launcher's namespace with a rank on each of some hosts."""

    def __init__(self, bed: TestBed, ssh: SshServers, hosts: list[str], python: str, tmp_path: Path) -> None:
        self.directory = tmp_path / "job"
        self.directory.mkdir()
        self.logs, self.proxies = tmp_path / "logs", tmp_path / "proxies"
        self.proxies.mkdir()
        self._ssh, self._python = ssh, python
        self._output = (tmp_path / "output").open("w+")
        command = [str(Path(sys.executable).with_name("mpirun")), "--with-ft", "ulfm", "-n", str(len(hosts))]
        command += ["--oversubscribe", "--bind-to", "none", "--allow-run-as-root"]
        settings = network_settings(bed.subnet) | {"pml": "ob1", "coll": "^han,hcoll,portals4,cuda"}
        for name, value in settings.items():
            command += ["--mca", name, value]
        environ = os.environ | LAUNCHER_SETTINGS | {"PYTHONPATH": str(ROOT), "SECRET": "x", "CHAOS_TEST": "y"}
        environ["PRTE_MCA_prte_tmpdir_base"] = str(tmp_path / "launcher")
        self.mpirun = subprocess.Popen(
            [*command, *self.proxy("--hosts", ",".join(hosts))], env=environ, stdout=self._output, stderr=self._output
        )

    def proxy(self, *where: str) -> list[str]:
        argv = [sys.executable, "-P", "-m", "chaos_mpi.agent.proxy", *where, "--remote-python", self._python]
        argv += [
            "--ssh-command",
            shlex.join([*self._ssh.command, "-oServerAliveInterval=1", "-oServerAliveCountMax=3"]),
            "--log-dir",
            str(self.logs),
        ]
        argv += ["--register", str(self.proxies)]
        return [*argv, "--", sys.executable, PROGRAM, str(self.directory)]

    def events(self, rank: int | str, event: str) -> list[dict[str, object]]:
        path = self.directory / f"{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def up(self, rank: int | str) -> dict[str, object]:
        wait_for(f"rank {rank}; output: {self.output()}", lambda: self.events(rank, "up"))
        return self.events(rank, "up")[0]

    def wait_for_sums(self, rank: int | str, more: int = 20) -> None:
        """Wait until a rank has done so many more sums."""
        before = self._sums(rank)
        wait_for(f"sums of rank {rank}", lambda: self._sums(rank) >= before + more)

    def wait_for_event(self, rank: int | str, event: str) -> dict[str, object]:
        wait_for(f"{event} of rank {rank}", lambda: self.events(rank, event))
        return self.events(rank, event)[-1]

    def stop(self) -> None:
        (self.directory / "stop").touch()

    def output(self) -> str:
        self._output.flush()
        return Path(self._output.name).read_text()

    def _sums(self, rank: int | str) -> int:
        found = self.events(rank, "sums")
        return int(str(found[-1]["sums"])) if found else 0

    def close(self) -> None:
        self.stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.mpirun.wait(10)
        self.mpirun.kill()
        self.mpirun.wait()
        self._output.close()


@pytest.fixture
def start(ssh_bed: Bed, remote_python: str, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    with contextlib.ExitStack() as stack:

        def make(*hosts: str) -> Job:
            job = Job(*ssh_bed, list(hosts), remote_python, tmp_path)
            stack.callback(job.close)
            return job

        yield make


def pid_in(job: Job, rank: int | str) -> int:
    """Process id of a rank; hosts of a bed share the numbers."""
    return int(str(job.up(rank)["pid"]))


def give(job: Job, order: str, content: object) -> None:
    """Put an order where the ranks see it, at once and whole."""
    new = job.directory / "new"
    new.write_text(json.dumps(content))
    new.rename(job.directory / order)


def spawn(job: Job, host: str) -> None:
    give(job, "spawn", job.proxy("--host", host))
    assert job.up("spawned")["host"] == host


def sever(job: Job, address: str) -> None:
    give(job, "sever", [address])


def ranks_in(bed: TestBed, host: str) -> list[bytes]:
    """Command lines of ranks and supervisors in a host."""
    found = []
    for pid in bed.pids(host):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return [line for line in found if b"agent_program" in line or b"supervisor" in line]


def test_ranks_on_hosts_have_what_they_need_and_nothing_else(start: Callable[..., Job], ssh_bed: Bed) -> None:
    job = start("edge1", "edge2")
    for rank, host in ((0, "edge1"), (1, "edge2")):
        up = job.up(rank)
        assert up["host"] == host
        env = up["env"]
        assert isinstance(env, dict)
        assert env["PMIX_MCA_gds"] == "hash"
        assert env["CHAOS_TEST"] == "y"
        assert env["SECRET"] is None
        assert "tcp4://127.0.0.1:" in env["PMIX_SERVER_URI41"]
    job.wait_for_sums(0)
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ssh_bed[0].pids("edge1")]
    assert commands
    assert not [line for line in commands if b"PMIX_" in line]
    job.stop()
    assert job.mpirun.wait(20) == 0
    assert job.output().count("rank is up") == 2
    assert not job.logs.exists()


def test_the_loss_of_mpirun_and_then_of_a_rank(start: Callable[..., Job]) -> None:
    job = start("edge1", "edge2", "edge3")
    job.wait_for_sums(2)
    job.mpirun.kill()
    job.wait_for_sums(2, 50)
    lost = [line["launcher_lost"] for line in job.events(2, "sums")]
    assert (lost[0], lost[-1]) == (False, True)
    os.kill(pid_in(job, 2), signal.SIGKILL)
    for rank in (0, 1):
        assert job.wait_for_event(rank, "shrunk")["size"] == 2
    job.wait_for_sums(0, 50)
    assert "sums" in (next(job.logs.glob("*/rank-0.log"))).read_text()


def test_a_killed_rank(start: Callable[..., Job]) -> None:
    job = start("edge1", "edge2", "edge3")
    job.wait_for_sums(0)
    os.kill(pid_in(job, 1), signal.SIGKILL)
    for rank in (0, 2):
        assert job.wait_for_event(rank, "shrunk")["size"] == 2
    job.wait_for_sums(0)
    job.stop()
    job.mpirun.wait(20)


@pytest.mark.parametrize("how", ["abort", "SIGINT", "SIGTERM"])
def test_a_job_that_is_ended_leaves_nothing(start: Callable[..., Job], ssh_bed: Bed, how: str) -> None:
    bed, _ = ssh_bed
    job = start("edge1", "edge2", "")
    job.wait_for_sums(0)
    here = pid_in(job, 2)
    if how == "abort":
        give(job, "abort", None)
    else:
        job.mpirun.send_signal(signal.Signals[how])
    assert job.mpirun.wait(20) != 0
    wait_for("the end of all ranks", lambda: ranks_in(bed, "edge1") + ranks_in(bed, "edge2") == [])
    wait_for("the end of the rank here", lambda: not Path(f"/proc/{here}").exists())
    assert not job.logs.exists()


def test_a_spawned_rank_on_another_host(start: Callable[..., Job]) -> None:
    job = start("edge1", "edge2")
    job.wait_for_sums(0)
    spawn(job, "edge3")
    assert job.wait_for_event(1, "grown")["size"] == 3
    job.wait_for_sums("spawned")
    os.kill(pid_in(job, "spawned"), signal.SIGKILL)
    for rank in (0, 1):
        assert job.wait_for_event(rank, "shrunk")["size"] == 2
    job.wait_for_sums(0)


def test_a_host_that_vanishes_is_severed_and_left_behind(start: Callable[..., Job], ssh_bed: Bed) -> None:
    bed, _ = ssh_bed
    job = start("edge1", "edge2", "edge3")
    job.wait_for_sums(0)
    bed.power_off("edge3")
    time.sleep(1)
    assert not job.events(0, "failure")
    sever(job, bed.address("edge3"))
    for rank in (0, 1):
        assert job.wait_for_event(rank, "shrunk")["size"] == 2
    job.wait_for_sums(0)


def test_the_same_without_mpirun(start: Callable[..., Job], ssh_bed: Bed) -> None:
    bed, _ = ssh_bed
    job = start("edge1", "edge2", "edge3")
    job.wait_for_sums(0)
    job.mpirun.kill()
    bed.power_off("edge3")
    sever(job, bed.address("edge3"))
    for rank in (0, 1):
        assert job.wait_for_event(rank, "shrunk")["size"] == 2
    job.wait_for_sums(0)


def test_the_host_of_a_spawned_rank_vanishes(start: Callable[..., Job], ssh_bed: Bed) -> None:
    bed, _ = ssh_bed
    job = start("edge1", "edge2")
    job.wait_for_sums(0)
    spawn(job, "edge3")
    job.wait_for_sums("spawned")
    bed.power_off("edge3")
    sever(job, bed.address("edge3"))
    for rank in (0, 1):
        assert job.wait_for_event(rank, "shrunk")["size"] == 2
    job.wait_for_sums(0)


@pytest.mark.parametrize("launcher", [True, False])
def test_a_host_that_only_paused_and_was_given_up_harms_nobody(
    start: Callable[..., Job], ssh_bed: Bed, launcher: bool
) -> None:
    bed, _ = ssh_bed
    job = start("edge1", "edge2", "edge3")
    job.wait_for_sums(0)
    if not launcher:
        job.mpirun.kill()
        wait_for("the end of the proxies", lambda: not list(registered(job.proxies)))
    paused = pid_in(job, 2)
    os.kill(paused, signal.SIGSTOP)
    assert fence(job.proxies, "edge3") == launcher
    sever(job, bed.address("edge3"))
    for rank in (0, 1):
        assert job.wait_for_event(rank, "shrunk")["size"] == 2
    os.kill(paused, signal.SIGCONT)
    job.wait_for_event(2, "failure")
    for rank in (0, 1):
        job.wait_for_sums(rank, 100)
        assert len(job.events(rank, "failure")) == 1


def test_hosts_are_checked(ssh_bed: Bed, remote_python: str, tmp_path: Path, launcher_directory: Path) -> None:
    bed, ssh = ssh_bed
    bed.power_off("edge3")
    hidden = launcher_directory / "data"
    hidden.touch()
    command = (*ssh.command, "-oBatchMode=yes", "-oConnectTimeout=2")
    paths = [str(tmp_path), str(hidden)]
    found = judge(ask(bed.hosts, remote_python, command, paths), ask_here(), remote_python)
    texts = {problem.host: problem.text for problem in found}
    assert set(texts) == {"edge1", "edge2", "edge3"}
    assert texts["edge1"] == texts["edge2"] == f"there is no {hidden}"
    assert "ssh cannot connect" in texts["edge3"]
    missing = judge(ask(["edge1"], "/no/python", command), ask_here(), "/no/python")
    assert "--remote-python" in missing[0].text
