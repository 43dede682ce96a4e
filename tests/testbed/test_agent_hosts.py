"""Ranks on several hosts, reached by ssh: proxies, supervisors, relays, severing, and the check of hosts beforehand.

Every host has its own network, name, shared memory and temporary directory of MPI. Skipped without root or ssh.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos_mpi.agent.preflight import ask, ask_here, judge
from chaos_mpi.agent.registry import fence, registered
from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed
from tests.faults.agent_jobs import Job, give, pid_in, wait_for

Bed = tuple[TestBed, SshServers]


@pytest.fixture
def start(ssh_bed: Bed, remote_python: str, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    bed, ssh = ssh_bed
    command = shlex.join([*ssh.command, "-oServerAliveInterval=1", "-oServerAliveCountMax=3"])
    way = ["--remote-python", remote_python, "--ssh-command", command]
    with contextlib.ExitStack() as stack:

        def make(*hosts: str) -> Job:
            job = Job(tmp_path, len(hosts), bed.subnet, ["--hosts", ",".join(hosts)], way)
            stack.callback(job.close)
            return job

        yield make


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
