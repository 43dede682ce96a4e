"""Scripts written for torch's DDP and for Horovod, on several hosts, of which some vanish and others come."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from horovod_problem import history, replay
from host_jobs import ENDLESS, Bed, Start, chaosctl, check_survivors, members, there, train
from jobs import Job, start
from problem import largest_difference

HOSTS = "edge1,edge2,edge3"


def step_of(job: Job, least: int) -> None:
    job.wait_until(lambda: job.steps_finished() >= least, f"step {least}")


def come_and_go(job: Job, bed: Bed, gone: str) -> None:
    """One host vanishes, and another one joins."""
    train(job)
    bed[0].power_off(gone)
    train(job, 10)
    done = chaosctl(job, "add", "--host", "edge4")
    assert "takes part" in done.stdout, done
    train(job, 10)


@pytest.mark.hosts(4)
@pytest.mark.parametrize("gone", ["edge2"])
def test_torch_ddp(launched: Start, ssh_bed: Bed, gone: str) -> None:
    job = launched(replace(ENDLESS, wrapper="hook"), HOSTS)
    come_and_go(job, ssh_bed, gone)
    check_survivors(job, *sorted({"edge1", "edge2", "edge3", "edge4"} - {gone}))


@pytest.mark.hosts(4)
@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod is not installed")
@pytest.mark.parametrize("gone", ["edge1", "edge2"])
def test_horovod_with_the_callback(launched: Start, ssh_bed: Bed, gone: str) -> None:
    """Real Horovod: the ranks that are left, and the newcomer, start it anew on their communicator."""
    job = launched(ENDLESS, HOSTS, script="../horovod_jobs/train_horovod.py")
    come_and_go(job, ssh_bed, gone)
    check_survivors(job, *sorted({"edge1", "edge2", "edge3", "edge4"} - {gone}))


@pytest.mark.hosts(4)
@pytest.mark.parametrize("gone", ["edge1"])
def test_an_elastic_horovod_script(ssh_bed: Bed, tmp_path: Path, remote_python: str, gone: str) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    told = folder / "job.json"
    told.write_text(json.dumps({"folder": str(folder), "faults": [], "epochs": 40, "pause_s": 0.02}))
    how = there(ssh_bed, tmp_path, remote_python, "--hosts", HOSTS)
    with start("horovod_elastic.py", folder, str(told), ranks=3, **how) as job:
        come_and_go(job, ssh_bed, gone)
        there_at_the_end = {member for host, member in members(job).items() if host != gone}
        finished = job.finish()
    assert finished.status == 0
    steps, traces = history(folder)
    assert set(finished.results()) == there_at_the_end
    assert set(steps[len(steps)]) == there_at_the_end
    states = [torch.load(folder / f"final-{member}.pt", weights_only=True) for member in sorted(there_at_the_end)]
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, other[name]) for other in states), f"{name} differs between hosts"
    assert largest_difference(replay(steps, traces), states[0]) < 1e-10
