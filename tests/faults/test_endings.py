"""How jobs begin and end when something is wrong: every job ends by itself, says why, and leaves nothing running."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from checks import TOLERANCE, check_survival
from fault_points import Rule
from jobs import HERE, MPIRUN_ENVIRONMENT, Finished, Job, mpirun, start, start_training
from problem import Problem, as_trained, check_exactly_once, largest_difference, read_traces, replay

from chaos_mpi.cli.process import LEFT_ALONE_S
from chaos_mpi.elastic import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150, method="signal")]

STEP = 3
STOPPED = 3


def rule(rank: int, at: str, do: str | None, step: int | str | None = None, *wait: str) -> Rule:
    """See :mod:`fault_points`."""
    made: Rule = {"rank": rank, "at": at, "wait": list(wait)}
    return made | ({"do": do} if do else {}) | ({"step": step} if step is not None else {})


# -- start-up and end -----------------------------------------------------------------------------------


def test_a_rank_is_killed_after_init(tmp_path: Path) -> None:
    problem = Problem(ranks=3)
    with start_training(tmp_path, problem, [rule(1, "opened", "die")]) as job:
        check_survival(job.finish(), problem, {1})


def test_a_rank_is_killed_before_init(tmp_path: Path) -> None:
    problem = Problem(ranks=3)
    with start_training(tmp_path, problem, [rule(1, "start", "die")], limit_s=50) as job:
        finished = job.finish()
    assert finished.status == 1
    (line,) = [line for line in finished.output.splitlines() if "before MPI was up" in line]
    assert f"1 of the 3 ranks died before MPI was up (pid {finished.pid(1)})" in line


def test_a_rank_is_killed_in_init(tmp_path: Path) -> None:
    # Rank 2 is kept out of MPI_Init, so that the others wait in it; they have connected to the launcher by then.
    with start_training(tmp_path, Problem(ranks=3), [rule(2, "start", None, None, "dead:1")], limit_s=50) as job:
        victim = psutil.Process(job.pid(1))
        job.wait_until(lambda: bool(victim.net_connections()), "rank 1 was in MPI_Init")
        victim.kill()
        finished = job.finish()
    # Either MPI itself gives up, or the launcher sees that the others wait in vain.
    assert finished.status != 0
    (line,) = [line for line in finished.output.splitlines() if line.startswith("chaosrun: ")]
    assert "before MPI was up" in line or "no rank had joined the job yet" in line


CLOSE_CASES = {
    "before close": ([rule(1, "close", "die", "close")], {1}),
    "rank 0 before close": ([rule(0, "close", "die", "close")], {0}),
    "while comparing digests": (
        [rule(3, "close", None, "close", "dead:1"), rule(1, "inside:gather", "die", "close", "close.3")],
        {1},
    ),
    "while agreeing to close": (
        [rule(3, "phase:agree", None, "close", "dead:1"), rule(1, "inside:agree", "die", "close", "phase:agree.3")],
        set(),
    ),
    "at the very end": ([rule(1, "end", "die", "close")], set()),
}


@pytest.mark.parametrize("case", CLOSE_CASES, ids=lambda case: case.replace(" ", "-"))
def test_a_rank_is_killed_while_closing(case: str, tmp_path: Path) -> None:
    rules, noticed = CLOSE_CASES[case]
    victim = next(r["rank"] for r in rules if r.get("do") == "die")
    problem = Problem(epochs=1)
    with start_training(tmp_path, problem, rules) as job:
        check_survival(job.finish(), problem, {victim}, events_of=noticed)


def test_a_script_that_forgets_to_close(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "forgets_to_close", ranks=2) as job:
        finished = job.finish()
    assert finished.status == 0
    assert {e["outcome"] for e in finished.events("session_ended")} == {"finished"}
    assert "without chaos_mpi.finalize()" in finished.output


# -- errors of one rank ---------------------------------------------------------------------------------


def test_an_exception_on_one_rank(tmp_path: Path) -> None:
    problem = Problem()
    with start_training(tmp_path, problem, [rule(1, "forward", "raise", STEP)]) as job:
        finished = job.finish()
        check_survival(finished, problem, {1})
    told = [line for line in finished.output.splitlines() if "InjectedError: injected into rank 1" in line]
    assert len(told) == 2, "the traceback ends with it, and the launcher's last line says it again"
    assert told[1].startswith("chaosrun: training finished, but 1 of 4 ranks crashed on the way")
    (crashed,) = [e for e in finished.events("session_ended") if e["outcome"] == "crashed"]
    assert crashed["member"] == finished.member(1)
    assert "injected into rank 1" in crashed["message"]


@pytest.mark.parametrize(
    ("scenario", "parts"),
    [
        ("model_differs", ["model differs", "'1.weight' of shape (6, 6)", "rank 2", "(7, 6)"]),
        ("optimizer_differs", ["training state differs", "rank 1", "lr", "0.1", "0.2"]),
        ("call_of_equal_size_differs", ["0, 2: all_reduce[sum", "1: all_reduce[max"]),
        (
            "order_of_models_differs",
            ["different collective calls", "0, 2: gradient step", "1: gradient step of model 2"],
        ),
        ("call_differs", ["gradient step", "all_reduce", "every rank must make the same calls"]),
    ],
)
def test_ranks_that_differ_are_refused(scenario: str, parts: list[str], tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, scenario, ranks=3) as job:
        finished = job.finish()
    assert finished.status != 0
    assert "came to the end" not in finished.output
    assert "Traceback" not in finished.output
    (line,) = [line for line in finished.output.splitlines() if parts[0] in line]
    assert all(part in line for part in parts)


def test_a_wrong_setting_is_said_once_in_a_line(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "setting_is_wrong", ranks=3, environment={"CHAOS_MIN_RANKS": "many"}) as job:
        finished = job.finish()
    assert finished.status != 0
    assert "Traceback" not in finished.output
    (line,) = [line for line in finished.output.splitlines() if "CHAOS_MIN_RANKS" in line]
    assert "'many'" in line


@pytest.mark.parametrize(("ulfm", "words"), [(True, "'many'"), (False, "mpirun --with-ft ulfm")])
def test_plain_mpirun_says_a_wrong_start_once_in_a_line(ulfm: bool, words: str, tmp_path: Path) -> None:
    command = [part for part in mpirun(3) if ulfm or part not in ("--with-ft", "ulfm")]
    environment = {**MPIRUN_ENVIRONMENT, "TMPDIR": str(tmp_path), **({"CHAOS_MIN_RANKS": "many"} if ulfm else {})}
    script = str(HERE / "scenarios.py")
    with Job([*command, script, "forgets_to_close"], tmp_path, environment, limit_s=60) as job:
        finished = job.finish()
    assert finished.status != 0
    assert "Traceback" not in finished.output
    (line,) = [line for line in finished.output.splitlines() if line.startswith("chaos_mpi: ")]
    assert words in line
    assert not list(tmp_path.glob("*.*/**/said.*")), "something is left where the launcher keeps its files"


def test_a_script_that_fails_after_training(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "fails_afterwards", ranks=2) as job:
        finished = job.finish()
    assert finished.status == 1
    assert "training finished, but the script failed after it: OSError: no room for the results" in finished.output


def test_an_error_in_backward_that_the_script_catches(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "catches_an_error_in_backward", ranks=3) as job:
        finished = job.finish()
    assert finished.status == 0
    assert "the last backward pass of this model did not come to its end" in finished.output
    assert sorted(line for line in finished.output.splitlines() if "made" in line) == [
        "rank 0 made 4 steps", "rank 2 made 4 steps",
    ]  # fmt: skip


def test_a_rank_leaves_where_the_model_is_called_more_than_once_a_step(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "leaves_between_forwards", ranks=3) as job:
        finished = job.finish()
    assert finished.status == 0
    assert {event["epoch"] for event in finished.events("leave_committed")}
    assert finished.events("leave_committed")[0]["step"] < 10


def test_passes_after_the_last_step_leave_replicas_alike(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "passes_after_the_last_step", ranks=2) as job:
        assert job.finish().status == 0


def test_work_after_training_takes_as_long_as_it_takes(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "works_afterwards", ranks=2) as job:
        finished = job.finish()
    assert finished.status == 0
    assert (tmp_path / "exported").exists(), "the rank was killed while it worked"


def test_a_shell_script_that_goes_on_after_training(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    after = f"sleep {LEFT_ALONE_S + 1}; touch after-$OMPI_COMM_WORLD_RANK"
    script.write_text(f"#!/bin/sh\n{sys.executable} {HERE}/scenarios.py forgets_to_close || exit 1\n{after}\n")
    script.chmod(0o755)
    with start(str(script), tmp_path, ranks=2) as job:
        finished = job.finish()
    assert finished.status == 0
    assert sorted(path.name for path in tmp_path.glob("after-*")) == ["after-0", "after-1"]


def test_an_exit_status_that_only_the_launcher_sees(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "raises_an_exit_afterwards", ranks=2) as job:
        finished = job.finish()
    assert finished.status == 1
    assert "training finished, but the script failed after it: a rank exited with 5" in finished.output


ENDS = {
    "exits_at_once": "it called os._exit(1) (",
    "exits_by_the_builtin": "the script called sys.exit(1) (",
    "raises_under_another_hook": "ValueError: no such file (",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_rank_that_ends_by_itself_is_noticed(how: str, tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, how, ranks=3) as job:
        finished = job.finish()
    assert finished.status == 0, finished.output
    assert finished.output.count("came to the end") == 2
    assert f"1 of 3 ranks crashed on the way: {ENDS[how]}" in finished.output


# -- when the job cannot go on --------------------------------------------------------------------------


def test_a_hung_rank_ends_the_job(tmp_path: Path) -> None:
    timeout_s = 4.0
    problem = Problem(epochs=50)
    with start_training(tmp_path, problem, [rule(1, "forward", "stop", STEP)], timeout_s=timeout_s) as job:
        job.wait_until(lambda: job.steps_finished() >= STEP, "the steps before the hang")
        begun = time.monotonic()
        finished = job.finish()
        took = time.monotonic() - begun
    assert finished.status != 0
    # The wait itself, the writing of the state, and the end of the processes.
    assert took < timeout_s + 8.0
    (line,) = [line for line in finished.output.splitlines() if "stuck or cut off" in line]
    assert all(part in line for part in ("waited 4 s for", "gradient step", "rank", "The state is saved in"))


def run_again(first: Finished, folder: Path, problem: Problem, *options: str) -> Finished:
    """Resume in ``folder`` what ``first`` left."""
    with start_training(folder, problem, options=options) as job:
        return job.finish()


def test_too_few_ranks(tmp_path: Path) -> None:
    problem = Problem()
    rules = [rule(1, "forward", "die", STEP, "forward.2"), rule(2, "forward", "die", STEP, "forward.1")]
    saved = tmp_path / "saved"
    with start_training(
        tmp_path / "a", problem, rules, options=["--min-ranks", "3", "--checkpoint-dir", str(saved)]
    ) as job:
        first = job.finish()
    assert first.status == STOPPED
    lines = [line for line in first.output.splitlines() if "ranks are left" in line]
    assert len(lines) == 1, lines
    assert f"stopped at step {STEP}: 2 of 4 ranks are left, and min_ranks is 3" in lines[0]
    assert str(saved / f"step-{STEP:09d}.safetensors") in lines[0]

    left = replace(problem, ranks=2)
    second = run_again(first, tmp_path / "b", left, "--checkpoint-dir", str(saved), "--resume")
    assert second.status == 0
    _check_continued(problem, first, second, STEP)
    batches = [trace.batches for trace in read_traces(second.folder).values()]
    sizes = {sum(len(of_rank[step]["indices"]) for of_rank in batches) for step in batches[0]}
    assert sizes == {problem.ranks * problem.batch_size}, "the global batch is not what it was"


def test_too_few_ranks_of_a_job_that_was_resumed_with_more(tmp_path: Path) -> None:
    saved = ["--checkpoint-dir", str(tmp_path / "saved"), "--resume"]
    for ranks, step in ((2, STEP), (3, STEP + 2)):
        folder, death = tmp_path / str(ranks), rule(1, "forward", "die", step)
        options = ["--min-ranks", str(ranks), *saved]
        with start_training(folder, Problem(ranks=ranks), [death], options=options) as job:
            finished = job.finish()
        assert finished.status == STOPPED
        words = f"stopped at step {step}: {ranks - 1} of {ranks} ranks are left, and min_ranks is {ranks} "
        assert words in finished.output


@pytest.mark.parametrize("machine", [False, True], ids=["the ranks", "the whole machine"])
def test_all_are_told_to_end_and_resumed(machine: bool, tmp_path: Path) -> None:
    # With workers on the whole machine: they are told, too, and the ranks need them until they have stopped.
    problem = Problem(ranks=3, epochs=10, pause_s=0.02, workers=2 if machine else 0)
    options = ["--checkpoint-dir", str(tmp_path / "saved"), "--resume"]
    with start_training(tmp_path / "a", problem, options=options) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        for pid in job.processes() if machine else [job.pid(rank) for rank in range(3)]:
            with contextlib.suppress(ProcessLookupError):  # some end when those before them are told to
                os.kill(pid, signal.SIGTERM)
        first = job.finish()
    assert first.status == (128 + signal.SIGTERM if machine else STOPPED)
    assert "Traceback" not in first.output
    assert not first.events("failure_detected")
    (line,) = [line for line in first.output.splitlines() if "stopped at step" in line]
    (saved,) = (tmp_path / "saved").glob("step-*.safetensors")
    step = int(saved.stem.removeprefix("step-"))
    assert f"stopped at step {step} on request" in line
    assert f"The state is saved in {saved}; go on with --checkpoint-dir" in line

    second = run_again(first, tmp_path / "b", problem, *options)
    assert second.status == 0
    _check_continued(problem, first, second, step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_launcher_that_is_told_to_end_stops_all_ranks_at_one_step(number: signal.Signals, tmp_path: Path) -> None:
    problem, saved = Problem(ranks=3, epochs=10**6), tmp_path / "saved"
    with start_training(tmp_path / "a", problem, options=["--checkpoint-dir", str(saved)]) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        job.signal(number)
        finished = job.finish()
    assert finished.status == 128 + number
    ends = finished.events("session_ended")
    assert [e["outcome"] for e in ends] == ["stopped"] * 3
    (path,) = saved.glob("step-*.safetensors")
    assert {e["step"] for e in ends} == {checkpoint.step_of(path)}
    line, last = (line for line in finished.output.splitlines() if line.startswith(("chaos_mpi: ", "chaosrun: ")))
    step = checkpoint.step_of(path)
    assert f": stopped at step {step} on request: the job was told to end ({number.name}, host " in line
    assert f"The state is saved in {path}; go on with --checkpoint-dir {saved} --resume." in line
    assert last == f"chaosrun: interrupted by {number.name}; all ranks were ended"
    assert not finished.events("leave_committed")


def test_the_next_rank_saves_where_the_one_that_was_to_is_killed(tmp_path: Path) -> None:
    problem, saved = Problem(ranks=3, epochs=10**6), tmp_path / "saved"
    die = rule(0, "save on request", "die")
    with start_training(tmp_path / "a", problem, [die], options=["--checkpoint-dir", str(saved)]) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        job.signal(signal.SIGTERM)
        finished = job.finish()
    assert finished.status == 128 + signal.SIGTERM
    (path,) = saved.glob("step-*.safetensors")
    ends = finished.events("session_ended")
    assert {e["member"] for e in ends} == {finished.member(1), finished.member(2)}
    assert {e["outcome"] for e in ends} == {"stopped"}
    (message,) = {e["message"] for e in ends}
    assert f"The state is saved in {path}" in message
    assert finished.output.count("stopped at step") == 1


@pytest.mark.parametrize("again", [False, True], ids=["at the limit", "at a second signal"])
def test_ranks_that_do_not_stop_in_time_are_killed_and_it_is_said(again: bool, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    options = ["--checkpoint-dir", str(saved), "--grace", "300" if again else "1"]
    hang = rule(1, "forward", "stop", STEP)
    with start_training(tmp_path / "a", Problem(ranks=2), [hang], options=options) as job:
        job.wait_until((tmp_path / "a" / "mark-forward.1").exists, "the hang")
        job.signal(signal.SIGINT)
        if again:
            job.signal(signal.SIGTERM)  # two of a kind may come as one
        finished = job.finish()
    assert finished.status == 128 + signal.SIGINT
    assert not list(saved.glob("step-*.safetensors"))
    when = "at a second signal" if again else "1 s later (--grace)"
    assert finished.output.splitlines()[-1] == (
        f"chaosrun: interrupted by SIGINT; what had not ended was killed {when}, and the present state was not saved"
    )


@pytest.mark.parametrize("how", ["it is told to end", "the training is over"])
def test_a_rank_that_is_still_starting_ends_with_the_job(how: str, tmp_path: Path) -> None:
    newcomer = 100  # see fault_points.own_label
    rules = [rule(1, "boundary", "join", 3), rule(newcomer, "start", "stop")]
    problem = Problem(ranks=2, pause_s=0.02, epochs=10**6 if how == "it is told to end" else 20)
    with start_training(tmp_path, problem, rules) as job:
        job.wait_until((tmp_path / f"mark-start.{newcomer}").exists, "the start of the newcomer")
        if how == "it is told to end":
            job.signal(signal.SIGTERM)
        finished = job.finish()
    assert finished.status == (128 + signal.SIGTERM if how == "it is told to end" else 0)


def test_a_launcher_that_is_told_to_end_too_late(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "works_on_after_the_training", ranks=2) as job:
        job.wait_until(lambda: "trained" in job.output(), "the end of the training")
        job.signal(signal.SIGTERM)
        finished = job.finish()
    assert finished.status == 128 + signal.SIGTERM
    assert finished.output.splitlines()[-1] == "chaosrun: interrupted by SIGTERM; the training had finished"


def test_a_closed_terminal_stops_the_job_with_its_state_saved(tmp_path: Path) -> None:
    problem, close, saved = Problem(ranks=3, epochs=10**6), tmp_path / "close", tmp_path / "saved"
    terminal = [sys.executable, str(HERE / "terminal.py"), str(close)]
    with start_training(tmp_path / "a", problem, options=["--checkpoint-dir", str(saved)], before=terminal) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        close.touch()
        finished = job.finish()
    assert finished.status == 128 + signal.SIGHUP
    assert len(list(saved.glob("step-*.safetensors"))) == 1
    (stopped,) = {e["message"] for e in finished.events("session_ended") if e["message"]}
    assert "told to end (SIGHUP, host" in stopped


def test_a_hang_up_is_named_and_is_nothing_to_nohup(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=10**6)
    with start_training(tmp_path / "a", problem) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        for _ in range(2):  # as a shell and then the kernel do
            job.signal(signal.SIGHUP)
        finished = job.finish()
    assert finished.status == 128 + signal.SIGHUP
    assert "stopped at step" in finished.output and "told to end (SIGHUP, host" in finished.output
    assert "SIGTERM" not in finished.output

    with start_training(tmp_path / "b", problem, before=["nohup"]) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        job.signal(signal.SIGHUP)
        before = job.steps_finished()
        job.wait_until(lambda: job.steps_finished() > before + 100, "steps after the signal")
        job.signal(signal.SIGTERM)
        assert job.finish().status == 128 + signal.SIGTERM


def test_all_are_told_to_end_where_several_may_not_leave(tmp_path: Path) -> None:
    problem, saved = Problem(ranks=3, epochs=10**6), tmp_path / "saved"
    options = ["--checkpoint-dir", str(saved), "--min-ranks", "2"]
    with start_training(tmp_path / "a", problem, options=options) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        for rank in range(3):
            os.kill(job.pid(rank), signal.SIGTERM)
        finished = job.finish()
    assert finished.status == STOPPED
    assert "Traceback" not in finished.output
    # All at one boundary, or one rank by agreement first and the others later: what is left never goes on.
    lines = [line for line in finished.output.splitlines() if "stopped at step" in line]
    (path,) = saved.glob("step-*.safetensors")
    assert lines
    assert all(f"The state is saved in {path}" in line for line in lines)


def test_all_are_told_to_end_and_nothing_is_saved_where_nobody_asked(tmp_path: Path) -> None:
    with start_training(tmp_path, Problem(ranks=2, epochs=10**6)) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        for rank in range(2):
            os.kill(job.pid(rank), signal.SIGTERM)
        finished = job.finish()
    assert finished.status == STOPPED
    assert "No state was saved, because there is no checkpoint directory" in finished.output
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_everything_is_killed_and_resumed(tmp_path: Path) -> None:
    problem = Problem(epochs=3)
    saved = tmp_path / "saved"
    with start_training(tmp_path / "whole", problem) as job:
        whole = job.finish()
    digests = {result["digest"] for result in whole.results().values()}
    assert len(digests) == 1

    options = ["--checkpoint-dir", str(saved), "--checkpoint-every", "2"]
    hold = [rule(0, "boundary", None, 8, "never")]
    with start_training(tmp_path / "a", problem, hold, options=options) as job:
        job.wait_until(lambda: job.steps_finished() == 9, "step 9")
        # The writer leaves one out when it is behind.
        late = [saved / f"step-00000000{step}.safetensors" for step in (6, 8)]
        job.wait_until(lambda: any(path.exists() for path in late), "the checkpoint of step 6 or 8")
        job.kill_all()
    first = Finished(-9, "", tmp_path / "a", 0.0)
    second = run_again(first, tmp_path / "b", problem, *options, "--resume")
    assert second.status == 0
    assert {result["digest"] for result in second.results().values()} == digests
    resumed = min(min(trace.batches) for trace in read_traces(second.folder).values())
    assert resumed in {6, 8}
    _check_continued(problem, first, second, resumed)


def test_a_checkpoint_that_cannot_be_written_costs_no_rank(tmp_path: Path) -> None:
    problem, saved = Problem(epochs=3), tmp_path / "saved"
    options = ["--checkpoint-dir", str(saved), "--checkpoint-every", "2"]
    rules = [rule(0, "forward", "die", 5, "gone")]
    with start_training(tmp_path / "job", problem, rules, options=options) as job:
        job.wait_until(lambda: (job.folder / "mark-forward.0").exists(), "step 6 began")
        saved.rename(tmp_path / "elsewhere")
        saved.touch()  # not a directory any more: also root cannot write to it
        (job.folder / "mark-gone").touch()
        finished = job.finish()
    check_survival(finished, problem, {0})
    assert "there is no checkpoint of step 6: the checkpoint directory" in finished.output


def _check_continued(problem: Problem, first: Finished, second: Finished, at: int) -> None:
    """Both runs together are one: each sample once, and the result that one process gets."""
    before, after = read_traces(first.folder), read_traces(second.folder)
    steps = {}
    for traces in (before, after):
        for trace in traces.values():
            steps.update({k: v for k, v in trace.steps.items() if (k <= at) == (traces is before)})
    assert sorted(steps) == list(range(1, len(steps) + 1))
    check_exactly_once(problem, steps, before | after)
    reference = replay(problem, steps, before | after)
    for member in after:
        final = torch.load(second.folder / f"final-{member}.pt", weights_only=True)
        assert largest_difference(reference, final) < TOLERANCE


# -- kills from outside, at any moment ------------------------------------------------------------------


def _kill_at_random(job: Job, ranks: int, left: int, seed: int) -> set[int]:
    choice = random.Random(seed)
    victims = choice.sample(range(ranks), ranks - left)
    dead = set(victims)
    pids = {rank: job.pid(rank) for rank in range(ranks)}
    job.wait_until(lambda: job.steps_finished() >= 2, "the first steps")
    while victims:
        # Now and then two at once; otherwise at any moment, also in the recovery from the last one.
        together = [victims.pop() for _ in range(min(len(victims), choice.choice((1, 1, 2))))]
        pause = time.monotonic() + choice.choice((0.0, 0.001, 0.01, 0.1)) * choice.random()
        while time.monotonic() < pause:
            pass
        for rank in together:
            os.kill(pids[rank], signal.SIGKILL)
    return dead


@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills_of_eight_down_to_two(seed: int, tmp_path: Path) -> None:
    problem = Problem(ranks=8, epochs=100_000)  # the killing is over before the training is
    with start_training(tmp_path, problem, limit_s=120) as job:
        dead = _kill_at_random(job, problem.ranks, 2, seed)
        (tmp_path / "stop").touch()
        check_survival(job.finish(), as_trained(problem, tmp_path), dead)
