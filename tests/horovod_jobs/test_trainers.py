"""Jobs of PyTorch Lightning and of the Hugging Face Trainer, on real Horovod, in which ranks die, join and leave."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from checks import check_history, check_survival
from fault_points import Rule
from jobs import PACKAGE_ROOT, Job, chaosrun, clean_environment, start_training
from problem import Problem, as_trained, read_traces
from test_horovod_jobs import NEWCOMER, die, rule

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(400, method="signal")]

LIMIT_S = 360.0
#: Loading Lightning or transformers takes long where the machine has much else to do.
TIMEOUT_S = 180.0


def trainer_of(name: str) -> Any:
    """The name as a parameter of tests that need it."""
    reason = f"{name} is not installed: pip install 'chaos-mpi[{name}]'"
    return pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=reason))


TRAINERS = pytest.mark.parametrize("trainer", [trainer_of("lightning"), trainer_of("transformers")])


def start(folder: Path, trainer: str, problem: Problem, rules: list[Rule], **how: Any) -> Job:
    """A job of this trainer with these rules."""
    script = f"../horovod_jobs/train_{trainer}.py"
    return start_training(folder, problem, rules, script=script, limit_s=LIMIT_S, timeout_s=TIMEOUT_S, **how)


#: Rules, and who dies. An epoch has eight steps.
KILLS: dict[str, tuple[list[Rule], set[int]]] = {
    "in the very first forward": ([die(1, "forward", step=0)], {1}),
    "rank 0 while Horovod reduces": ([die(0, "horovod")], {0}),
    "between step and step": ([die(1, "boundary")], {1}),
    "in the last step of an epoch": ([die(1, "between buckets", step=7)], {1}),
    "down to one rank": ([die(0, "forward", step=2), die(2, "between buckets", step=5)], {0, 2}),
    "rank 0 when all are done": ([die(0, "close", step="close")], {0}),
}


@TRAINERS
@pytest.mark.parametrize("case", KILLS, ids=lambda case: case.replace(" ", "-"))
def test_training_survives_a_kill(trainer: str, case: str, tmp_path: Path) -> None:
    rules, dead = KILLS[case]
    problem = Problem(ranks=3)
    with start(tmp_path, trainer, problem, rules) as job:
        check_survival(job.finish(), problem, dead, is_named=False)
    assert any(tmp_path.glob("saved*")), "nobody saved the model"


@TRAINERS
def test_clipping_workers_and_a_set_that_leaves_a_rank_nothing_at_the_end(trainer: str, tmp_path: Path) -> None:
    problem = Problem(ranks=3, clip=0.5, workers=1, samples=50, policy="none")
    with start(tmp_path, trainer, problem, [die(1, "between buckets")]) as job:
        check_survival(job.finish(), problem, {1}, is_named=False)


JOIN = [
    rule(1, "boundary", "join"),
    rule(NEWCOMER, "newcomer:register", step=None),
    # The others train through before it is ready, otherwise.
    rule(0, "boundary", None, f"newcomer:register.{NEWCOMER}", step=8) | {"limit_s": TIMEOUT_S},
]
#: Rules, who dies, who leaves, who joins, and the policy for joins.
CHANGES: dict[str, tuple[list[Rule], Collection[int], Collection[int], Collection[int], str]] = {
    "rank 0 leaves": ([rule(0, "boundary", "leave")], [], [0], [], "auto"),
    "one joins while the others train on": (JOIN, [], [], [NEWCOMER], "overlap"),
    "one joins and dies in its first step": (
        [*JOIN, die(NEWCOMER, "forward", step=None)], [NEWCOMER], [], [NEWCOMER], "blocking",
    ),
}  # fmt: skip


@TRAINERS
@pytest.mark.parametrize("case", CHANGES, ids=lambda case: case.replace(" ", "-"))
def test_ranks_join_and_leave(trainer: str, case: str, tmp_path: Path) -> None:
    rules, dead, left, joined, policy = CHANGES[case]
    problem = Problem(ranks=3, epochs=40 if joined else 2)
    with start(tmp_path, trainer, problem, rules, environment={"CHAOS_JOIN_POLICY": policy}) as job:
        finished = job.finish()
    ranks = [*range(problem.ranks), *joined]
    steps = check_history(finished, problem, {finished.member(r) for r in ranks if r not in {*dead, *left}})
    for label in joined:
        assert any(finished.member(label) in contributors for contributors in steps.values()) or label in dead
    assert bool(finished.events("failure_detected")) == bool(dead), "a leave is no failure"


STOPS = [
    pytest.param(*trainer_of(trainer).values, method, marks=trainer_of(trainer).marks, id=f"{trainer}-{method}")
    for trainer, method in [
        ("lightning", "on_train_batch_end"),
        ("lightning", "on_train_epoch_end"),
        ("transformers", "on_log"),
        ("transformers", "on_step_end"),
        ("transformers", "on_evaluate"),
        ("transformers", "on_save"),
    ]
]


@pytest.mark.parametrize(("trainer", "method"), STOPS)
def test_all_stop_when_one_wants_to_wherever_it_says_so(trainer: str, method: str, tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=3)
    with start(tmp_path, trainer, problem, [], options_of_script={"rank_0_stops_in": method}) as job:
        finished = job.finish()
    assert finished.status == 0
    results = finished.results().values()
    assert len(results) == problem.ranks
    assert all(result["identical"] for result in results)
    steps_of_epoch = problem.samples // (problem.batch_size * problem.ranks)
    when = {
        "on_train_batch_end": 1, "on_train_epoch_end": steps_of_epoch,
        "on_log": 4, "on_step_end": 1, "on_evaluate": 6, "on_save": 10,
    }  # fmt: skip
    assert {result["steps"] for result in results} == {when[method]}


#: Rules, the ranks at the start, whether one joins, and how many steps' metrics may be missing.
TAKEOVERS: dict[str, tuple[list[Rule], int, bool, int]] = {
    "rank 0 dies": ([die(0, "forward", step=5)], 2, False, 1),
    "rank 0 leaves": ([rule(0, "boundary", "leave", step=5)], 2, False, 1),
    "a newcomer is left alone": (
        [
            rule(0, "boundary", "join"),
            rule(NEWCOMER, "newcomer:register", step=None),
            rule(0, "boundary", None, f"newcomer:register.{NEWCOMER}", step=8) | {"limit_s": TIMEOUT_S},
            rule(NEWCOMER, "boundary", step=None),
            rule(0, "boundary", "leave", f"boundary.{NEWCOMER}", step=240),
        ],
        1, True, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("trainer", [trainer_of("lightning")])
@pytest.mark.parametrize("case", TAKEOVERS, ids=lambda case: case.replace(" ", "-"))
def test_logged_metrics_outlive_rank_0(trainer: str, case: str, tmp_path: Path) -> None:
    rules, ranks, joins, missing = TAKEOVERS[case]
    problem = Problem(ranks=ranks, epochs=40 if joins else 2)
    with start(tmp_path, trainer, problem, rules, options_of_script={"csv": ranks, "bar": True}) as job:
        finished = job.finish()
    assert finished.status == 0
    assert joins or "Epoch 1" in finished.output, "nobody went on with the progress bar"
    (result,) = finished.results().values()
    (written,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    with open(written, newline="") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
    assert len(logged) == len(set(logged))
    assert set(logged) <= set(range(result["steps"]))
    assert len(logged) >= result["steps"] - missing
    assert (written.parent / "checkpoints").is_dir()
    assert {path.name for path in written.parent.parent.iterdir()} == {written.parent.name}


@pytest.mark.parametrize("trainer", [trainer_of("lightning")])
def test_only_rank_0_has_a_logger(trainer: str, tmp_path: Path) -> None:
    problem = Problem(ranks=2)
    with start(tmp_path, trainer, problem, [], options_of_script={"csv": 1}) as job:
        check_survival(job.finish(), problem, set())
    assert list(tmp_path.glob("lightning_logs/version_0/metrics.csv"))


@TRAINERS
def test_kill_9_and_chaosctl_add(trainer: str, tmp_path: Path) -> None:
    problem = Problem(ranks=3, epochs=1_000_000, pause_s=0.02)
    temporary = tmp_path / "t"  # its own, so that chaosctl finds no other job
    temporary.mkdir()
    runtime = {"TMPDIR": str(temporary)}
    options = {"until_told": True}
    with start(tmp_path, trainer, problem, [], environment=runtime, options_of_script=options) as job:
        job.wait_until(lambda: job.steps_finished() >= 5, "five steps were finished")
        job.kill(job.pid(1))
        before = job.steps_finished()
        job.wait_until(lambda: job.steps_finished() > before + 5, "the others trained on")
        added = subprocess.run(
            [sys.executable, "-m", "chaos_mpi.cli.chaosctl", "add"], env={**clean_environment(), **runtime},
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert added.returncode == 0, added.stdout + added.stderr
        (tmp_path / "stop").touch()
        finished = job.finish()
    ranks = [0, 2, NEWCOMER]
    assert os.uname().nodename in added.stdout
    steps = check_history(finished, as_trained(problem, tmp_path), {finished.member(rank) for rank in ranks})
    assert finished.member(NEWCOMER) in steps[len(steps)], "the newcomer is not in the last step"
    assert finished.member(1) not in steps[len(steps)]


@pytest.mark.parametrize("trainer", [trainer_of("transformers")])
def test_the_example_leaves_no_folder_behind_and_can_be_resumed_at_its_end(trainer: str, tmp_path: Path) -> None:
    example = PACKAGE_ROOT / "launch" / "examples" / f"{trainer}_text.py"
    command = [*chaosrun(2), "--checkpoint-dir", str(tmp_path / "saved"), "--resume", str(example), "--steps", "2"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env={**clean_environment(), "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
            timeout=LIMIT_S, check=False,
        )  # fmt: skip

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replicas identical: True" in done.stdout
    assert not list(tmp_path.glob("tmp*"))
    again = run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "no step was left, replicas identical: True" in again.stdout
    assert "there is nothing left to train: step 2 of 2 is finished" in again.stderr


@pytest.mark.parametrize("saved", [8, 10])
@TRAINERS
def test_a_job_is_resumed(trainer: str, saved: int, tmp_path: Path) -> None:
    problem = Problem(ranks=2, samples=64)  # two epochs of eight steps
    options = ["--checkpoint-dir", str(tmp_path / "checkpoints"), "--checkpoint-every", "2"]
    wait = [rule(0, "boundary", None, "never.0", step=saved + 1) | {"limit_s": TIMEOUT_S}]
    with start(tmp_path / "1", trainer, problem, wait, options=options) as job:
        job.wait_until((tmp_path / "checkpoints" / f"step-{saved:09}.safetensors").exists, f"step {saved} was saved")
        job.kill_all()
    with start(tmp_path / "2", trainer, problem, [], options=[*options, "--resume"]) as job:
        finished = job.finish()
    assert finished.status == 0
    assert len(finished.results()) == 2
    for result in finished.results().values():
        assert result["identical"]
    traces = read_traces(tmp_path / "2").values()
    for trace in traces:
        assert min(trace.steps) == saved + 1
        assert {batch["epoch"] for batch in trace.batches.values()} == {1}
        assert max(trace.steps) == 16
