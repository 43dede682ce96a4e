"""A rank is killed at one exactly known point after another: no step is lost, none is applied twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import check_survival
from fault_points import Rule
from jobs import start_training
from problem import Problem, read_traces

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]

GRADIENTS = "gradient step"
STEP = 3


def die(rank: int, at: str, step: int | str | None = STEP, *wait: str) -> Rule:
    """``rank`` kills itself there."""
    return {"rank": rank, "at": at, "wait": list(wait), "do": "die", **({} if step is None else {"step": step})}


def hold(rank: int, at: str, step: int | str | None = STEP, *wait: str) -> Rule:
    """``rank`` waits there."""
    return {"rank": rank, "at": at, "wait": list(wait), **({} if step is None else {"step": step})}


def in_allreduce(victim: int, late: int, others: list[int]) -> list[Rule]:
    """``victim`` dies inside the allreduce, together with all but ``late``, which is kept from joining it."""
    inside = f"inside:{GRADIENTS}"
    return [
        hold(late, "forward", STEP, f"dead:{victim}"),
        *[hold(other, inside) for other in others],
        die(victim, inside, STEP, *[f"{inside}.{other}" for other in others]),
    ]


def in_recovery(phase: str, victim: int = 2, late: int = 3) -> list[Rule]:
    """Rank 1 dies; ``victim`` dies inside this part of the recovery, which ``late`` keeps from ending."""
    return [
        die(1, "forward"),
        hold(late, f"phase:{phase}", STEP, f"dead:{victim}"),
        die(victim, f"inside:{phase}", STEP, f"phase:{phase}.{late}"),
    ]


CASES: dict[str, tuple[list[Rule], set[int]]] = {
    "in forward": ([die(1, "forward")], {1}),
    "in the very first forward": ([die(1, "forward", 0)], {1}),
    "between two buckets": ([die(2, "between buckets")], {2}),
    "inside the allreduce": (in_allreduce(1, 3, [0, 2]), {1}),
    "rank 0 inside the allreduce": (in_allreduce(0, 2, [1, 3]), {0}),
    "before optimizer.step": ([die(3, "before optimizer")], {3}),
    "at the step boundary": ([die(1, "boundary")], {1}),
    "after the last step of an epoch": ([die(1, "boundary", 5)], {1}),
    "while evaluating": ([die(2, "evaluate", None)], {2}),
    "rank 0": ([die(0, "forward")], {0}),
    "rank 0 at the step boundary": ([die(0, "boundary")], {0}),
    "the last rank between two buckets": ([die(3, "between buckets")], {3}),
    "two at once": ([die(1, "forward", STEP, "forward.2"), die(2, "forward", STEP, "forward.1")], {1, 2}),
    "two at once, at different points": (
        [die(0, "before optimizer", 2), die(3, "between buckets", 3, "dead:0")], {0, 3}
    ),
    "all but one at once": (
        [die(rank, "forward", STEP, *[f"forward.{r}" for r in (0, 1, 3)]) for rank in (0, 1, 3)], {0, 1, 3}
    ),
    "all but one, one by one": ([die(0, "forward", 2), die(2, "between buckets", 4), die(1, "boundary", 8)], {0, 1, 2}),
    "a second one while agreeing": (in_recovery("agree"), {1, 2}),
    "a second one while shrinking": (in_recovery("shrink"), {1, 2}),
    "rank 0 while shrinking": (in_recovery("shrink", victim=0), {0, 1}),
    "a second one while exchanging": (in_recovery("exchange"), {1, 2}),
    "a second one while committing": (in_recovery("commit"), {1, 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_training_survives_a_kill(case: str, tmp_path: Path) -> None:
    rules, dead = CASES[case]
    problem = Problem()
    with start_training(tmp_path, problem, rules) as job:
        check_survival(job.finish(), problem, dead)


# With a binomial tree, rank 3 need only begin the last sum for ranks 0 and 2 to finish the step, while rank 1 still
# wants something of it that never comes. The launcher would choose another algorithm, so plain mpirun it is.
WITHHOLD = [die(3, "settle", STEP, f"done {STEP + 1}.0", f"done {STEP + 1}.2")]
BINOMIAL = {"OMPI_MCA_coll_libnbc_iallreduce_algorithm": "2"}


def test_the_finished_result_is_adopted(tmp_path: Path) -> None:
    problem = Problem()
    with start_training(tmp_path, problem, WITHHOLD, environment=BINOMIAL, plain_mpirun=True) as job:
        finished = job.finish()
        steps = check_survival(finished, problem, {3}, status=None)
    behind = finished.member(1)
    detected = [e["step"] for e in finished.events("failure_detected") if e["member"] == behind]
    assert detected == [STEP], "rank 1 was not behind when rank 3 died, so this run has tested nothing"
    assert finished.member(3) in steps[STEP + 1], "the step that others had finished was done again without rank 3"


ADOPTION_CASES = {
    "adopter": ([hold(2, "phase:adopt", None, "dead:1"), die(1, "phase:adopt", None, "phase:adopt.2")], {1, 3}),
    "adopter afterwards": ([hold(2, "phase:commit", None, "dead:1"), die(1, "phase:commit", None)], {1, 3}),
    "source": ([hold(2, "phase:adopt", None, "dead:0"), die(0, "phase:adopt", None, "phase:adopt.2")], {0, 3}),
}


@pytest.mark.parametrize("case", ADOPTION_CASES)
def test_a_second_one_dies_while_the_result_is_adopted(case: str, tmp_path: Path) -> None:
    rules, dead = ADOPTION_CASES[case]
    problem = Problem()
    with start_training(tmp_path, problem, [*WITHHOLD, *rules], environment=BINOMIAL, plain_mpirun=True) as job:
        finished = job.finish()
        steps = check_survival(finished, problem, dead, status=None)
    assert finished.member(3) in steps[STEP + 1]


def test_gradients_clipped_while_a_peer_dies(tmp_path: Path) -> None:
    # Those who are ahead have scaled their own gradients by the time they hand the sum to the one that is behind.
    problem = Problem(clip=0.01)
    with start_training(tmp_path, problem, WITHHOLD, environment=BINOMIAL, plain_mpirun=True) as job:
        finished = job.finish()
        steps = check_survival(finished, problem, {3}, status=None)
    assert finished.member(3) in steps[STEP + 1]


@pytest.mark.parametrize("policy", ["keep_global_batch", "linear", "sqrt", "none"])
def test_policies(policy: str, tmp_path: Path) -> None:
    problem = Problem(policy=policy, optimizer="adamw", samples=94)
    with start_training(tmp_path, problem, [die(1, "forward")]) as job:
        finished = job.finish()
        # The learning rate is checked here, by the parameters it leads to.
        steps = check_survival(finished, problem, {1})
    traces = read_traces(finished.folder)
    assert len(steps[STEP]) == 4
    assert len(steps[STEP + 2]) == 3
    of_step = {step: [len(traces[m].batches[step - 1]["indices"]) for m in steps[step]] for step in steps}
    assert of_step[STEP] == [4, 4, 4, 4]
    # The step in flight is done with the batches that were handed out for four ranks.
    assert of_step[STEP + 1] == [4, 4, 4]
    assert of_step[STEP + 2] == ([6, 5, 5] if policy == "keep_global_batch" else [4, 4, 4])


def test_loader_workers_that_fetch_ahead(tmp_path: Path) -> None:
    problem = Problem(workers=2)
    with start_training(tmp_path, problem, [die(1, "forward"), die(2, "boundary", 7)]) as job:
        check_survival(job.finish(), problem, {1, 2})


def test_plain_mpirun(tmp_path: Path) -> None:
    problem = Problem(ranks=3)
    with start_training(tmp_path, problem, [die(1, "between buckets")], plain_mpirun=True) as job:
        check_survival(job.finish(), problem, {1}, status=None)


def test_nobody_dies(tmp_path: Path) -> None:
    problem = Problem(samples=90)
    with start_training(tmp_path, problem) as job:
        check_survival(job.finish(), problem, set())
