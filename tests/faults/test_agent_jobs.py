"""Jobs on one host whose ranks are started by proxies: they outlive ``mpirun``, but not an end on purpose."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.agent_jobs import Job, give, pid_in, wait_for

pytestmark = pytest.mark.faults


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    (tmp_path / "launcher").mkdir()
    with contextlib.closing(Job(tmp_path, 3, "lo", [], [])) as made:
        yield made


def test_without_mpirun_ranks_go_on_and_a_death_is_noticed(job: Job) -> None:
    job.wait_for_sums(0)
    job.mpirun.kill()
    job.wait_for_sums(0, 50)
    os.kill(pid_in(job, 1), signal.SIGKILL)
    for rank in (0, 2):
        assert job.wait_for_event(rank, "shrunk")["size"] == 2
    job.wait_for_sums(0, 50)
    assert "sums" in next(job.logs.glob("*/rank-0.log")).read_text()


def test_a_rank_that_is_spawned_by_proxy_is_one_like_the_others(job: Job) -> None:
    job.wait_for_sums(0)
    give(job, "spawn", job.proxy())
    assert job.wait_for_event(2, "grown")["size"] == 4
    job.mpirun.kill()
    os.kill(pid_in(job, "spawned"), signal.SIGKILL)
    for rank in (0, 1, 2):
        assert job.wait_for_event(rank, "shrunk")["size"] == 3
    job.wait_for_sums(0)


@pytest.mark.parametrize("how", ["abort", "SIGTERM"])
def test_a_job_that_is_ended_leaves_nothing(job: Job, how: str) -> None:
    job.wait_for_sums(0)
    pids = [pid_in(job, rank) for rank in range(3)]
    if how == "abort":
        give(job, "abort", None)
    else:
        job.mpirun.send_signal(signal.Signals[how])
    assert job.mpirun.wait(20) != 0
    wait_for("the end of all ranks", lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])
    assert not job.logs.exists()


def test_a_job_that_ends_well(job: Job) -> None:
    job.wait_for_sums(0)
    job.stop()
    assert job.mpirun.wait(20) == 0
    assert job.output().count("rank is up") == 3
