"""Hosts of the test bed watch each other, and one loses its power: the others agree, fence it off and sever.

Ranks without MPI. Skipped without root or ssh.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed
from tests.faults.watched_jobs import LIMIT_S, WatchedJob, wait_for


@pytest.fixture
def job(ssh_bed: tuple[TestBed, SshServers], remote_python: str, tmp_path: Path) -> Iterator[WatchedJob]:
    """Three ranks on three hosts."""
    _, ssh = ssh_bed
    directory = tmp_path / "job"
    directory.mkdir()
    options = ["--ssh-command", shlex.join(ssh.command), "--remote-python", remote_python]
    made = WatchedJob(directory, ["edge1", "edge2", "edge3"], options)
    yield made
    made.close()


@pytest.mark.faults
def test_a_host_without_power_is_fenced_and_severed(ssh_bed: tuple[TestBed, SshServers], job: WatchedJob) -> None:
    bed, _ = ssh_bed
    one, two, three = job.ranks
    members = [rank.member for rank in job.ranks]
    bed.power_off("edge3")
    job.ask(members[2])
    for rank in (one, two):
        assert rank.wait_for("answer") == ""
        assert rank.wait_for("severed") == [bed.address("edge3")]
    assert three.proxy.wait(LIMIT_S) == -signal.SIGKILL
    job.stop()
    assert [rank.proxy.wait(LIMIT_S) for rank in (one, two)] == [0, 0]


@pytest.mark.faults
def test_a_host_with_a_newcomer_is_lost_when_the_launcher_is(
    ssh_bed: tuple[TestBed, SshServers], job: WatchedJob
) -> None:
    """Two of four are on it; the two that are left have the lowest."""
    bed, _ = ssh_bed
    one, two, _ = job.ranks
    job.add("edge3")
    lost = [rank.member for rank in job.ranks][2:]  # all have begun
    for rank in job.ranks:  # all at once, as with mpirun: of single ones that die the others tell
        rank.proxy.send_signal(signal.SIGSTOP)
    for rank in job.ranks:
        rank.proxy.kill()
    bed.power_off("edge3")
    job.ask(*lost)
    for rank in (one, two):
        assert rank.wait_for("answer") == ""
        wait_for("severing", lambda rank=rank: [bed.address("edge3")] in rank.told("severed"))
        assert not rank.told("stopped")


@pytest.mark.faults
def test_a_host_that_is_cut_off_stops(ssh_bed: tuple[TestBed, SshServers], job: WatchedJob) -> None:
    bed, _ = ssh_bed
    one, two, three = job.ranks
    members = [rank.member for rank in job.ranks]
    bed.cut("edge1", "edge3")
    bed.cut("edge2", "edge3")
    job.ask(members[2])
    for rank in (one, two):
        assert rank.wait_for("answer") == ""
        assert rank.wait_for("severed") == [bed.address("edge3")]
    assert "was cut off from the majority for 30 s" in three.wait_for("stopped")
    assert not one.told("stopped") and not two.told("stopped")
