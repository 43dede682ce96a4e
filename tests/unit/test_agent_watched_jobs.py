"""Proxies, supervisors and ranks as processes that watch each other, with a script in the place of ssh, without MPI.

All hosts are this machine, so there is nothing that may be severed; for that see the tests on the test bed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.watched_jobs import LIMIT_S, ROOT, Processes, WatchedJob, wait_for


@pytest.fixture
def job(tmp_path: Path) -> Iterator[WatchedJob]:
    """Three ranks on three hosts, by name."""
    script = tmp_path / "ssh"
    script.write_text(f'#!/bin/sh\nexec env -i HOME=/ PATH="$PATH" PYTHONPATH={ROOT} sh -c "$2"\n')
    script.chmod(0o755)
    made = WatchedJob(tmp_path, ["edge1", "edge2", "edge3"], ["--ssh-command", str(script), "--network", "lo"])
    yield made
    made.close()


@pytest.mark.faults
def test_a_node_that_pauses_for_long_is_out_and_ends(job: WatchedJob) -> None:
    one, two, three = job.ranks
    assert [rank.member.partition(":")[0] for rank in job.ranks] == ["edge1", "edge2", "edge3"]
    stopped = Processes(three.member)
    stopped.signal(signal.SIGSTOP)
    job.ask(three.member)
    for rank in (one, two):
        assert rank.wait_for("answer") == ""
        assert rank.wait_for("severed") == []
    (job.directory / "stubborn").touch()
    stopped.signal(signal.SIGCONT)
    assert f"the others went on without {three.member}" in three.wait_for("stopped")
    assert three.proxy.wait(LIMIT_S) == -signal.SIGKILL
    assert f"chaos_mpi: edge3: the others went on without {three.member} in epoch 1" in three.log.read_text()
    job.stop()
    assert [rank.proxy.wait(LIMIT_S) for rank in (one, two)] == [0, 0]
    wait_for("the end of the supervisor", lambda: not stopped.live)


@pytest.mark.faults
def test_ranks_that_crash_and_come_anew(job: WatchedJob) -> None:
    one, two, three = (Processes(rank.member) for rank in job.ranks)
    newcomer = job.add("edge2")
    assert newcomer.member.startswith("edge2:")
    for processes in (one, three):
        processes.kill_rank()
    job.ask(job.ranks[0].member, job.ranks[2].member)
    assert [rank.wait_for("answer") for rank in (job.ranks[1], newcomer)] == ["", ""]
    # Half of them were left, without the lowest: they go on since those that have ended voted for it.
    for processes in (one, three):
        wait_for("the end of a supervisor", lambda processes=processes: not processes.live)
    assert not newcomer.told("stopped")
    assert two.live
    job.stop()
    assert [rank.proxy.wait(LIMIT_S) for rank in (job.ranks[1], newcomer)] == [0, 0]
    wait_for("the end of all", lambda: not two.live)
