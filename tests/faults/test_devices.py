"""Modules that are on an accelerator: their gradients and their state go through the memory of the host.

On CUDA where there is some, and on a device without hardware (``hostlike.cpp``) where there is a compiler.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hostlike
import pytest
import torch
from checks import check_survival
from jobs import start_training
from problem import Problem
from test_membership_changes import FIRST, LONG, check_changes, rule, until_ready

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400, method="signal")]

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))


@pytest.fixture(params=[hostlike.NAME, CUDA])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == hostlike.NAME and (reason := hostlike.build()):
        pytest.skip(reason)
    return str(request.param)


def test_a_rank_dies(device: str, tmp_path: Path) -> None:
    problem = Problem(device=device)
    with start_training(tmp_path, problem, [rule(1, "between buckets", "die", step=3)]) as job:
        check_survival(job.finish(), problem, {1})


@pytest.mark.parametrize(("policy", "optimizer"), [("blocking", "sgd"), ("overlap", "adamw")])
def test_a_rank_joins_and_another_dies(device: str, policy: str, optimizer: str, tmp_path: Path) -> None:
    problem = dataclasses.replace(LONG, device=device, optimizer=optimizer, pause_s=0.02)
    rules = [rule(1, "boundary", "join", step=3), *until_ready(), rule(2, "forward", "die", step=120)]
    with start_training(tmp_path, problem, rules, options=["--join-policy", policy]) as job:
        finished = job.finish()
        check_changes(finished, problem, joined=[FIRST], dead=[2])
        (active,) = finished.events("join_active")
        assert (active["repeated_steps"] > 0) == (policy == "overlap")


def test_training_is_resumed(device: str, tmp_path: Path) -> None:
    problem, saved = Problem(ranks=2, epochs=3, device=device), tmp_path / "saved"
    options = ["--checkpoint-dir", str(saved), "--checkpoint-every", "5"]
    with start_training(tmp_path / "whole", problem) as job:
        whole = job.finish().results()
    with start_training(tmp_path / "a", problem, [rule(0, "boundary", None, "never", step=12)], options=options) as job:
        job.wait_until(lambda: job.steps_finished() >= 12, "the checkpoint of step 10")
        job.kill_all()
    with start_training(tmp_path / "b", problem, options=[*options, "--resume"]) as job:
        resumed = job.finish().results()
    assert {r["digest"] for r in whole.values()} == {r["digest"] for r in resumed.values()}
