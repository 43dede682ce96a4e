"""The command line tools, on real jobs: what they print, how they exit, and that they leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from checks import check_survival
from fault_points import Rule
from jobs import HERE, Job, clean_environment, start, start_training
from problem import Problem

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]

#: Until it is killed.
ENDLESS = Problem(ranks=3, epochs=10**6)


def tool(name: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end."""
    return subprocess.run(
        [sys.executable, "-m", f"chaos_mpi.cli.{name}", *arguments],
        capture_output=True, text=True, timeout=90, env={**clean_environment(), **(environment or {})}, check=False,
    )  # fmt: skip


def started(folder: Path, rules: Sequence[Rule] = (), options: Sequence[str] = ()) -> Job:
    """A long job whose temporary files are its own, so that chaosctl finds no other."""
    temporary = folder / "t"
    temporary.mkdir()
    return start_training(folder, ENDLESS, rules, options=options, environment={"TMPDIR": str(temporary)})


def ctl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """chaosctl, for the job in ``folder``."""
    return tool("chaosctl", *arguments, environment={"TMPDIR": str(folder / "t")})


# -- starting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no script to run"),
        (["-n", "2", "missing.py"], "there is no file missing.py"),
        (["-n", "2", "no-such-program"], "neither a Python file"),
        (["-n", "2", "--no-such-option", "train.py"], "no such option"),
        (["-n", "2", "--min-ranks", "3", "train.py"], "--min-ranks 3 is more than -n 2"),
        (["-n", "3", "--max-ranks", "2", "train.py"], "--max-ranks 2 is less than -n 3"),
        (["-n", "2", "--resume", "train.py"], "--resume needs --checkpoint-dir"),
        (["-n", "2", "--checkpoint-dir", "/proc/here", "train.py"], "cannot be made"),
        (["-n", "0", "train.py"], "'-n'"),
        (["-n", "two", "train.py"], "'two' is not a valid integer"),
        (["-n", "2", "--batch-policy", "magic", "train.py"], "'magic' is not one of"),
        (["-n", "2", "--timeout"], "'--timeout' requires an argument"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    done = tool("chaosrun", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


def test_the_line_of_a_dry_run_works(tmp_path: Path) -> None:
    script = tmp_path / "a script's name.py"
    script.write_text(
        "import os; print('hello from', *(os.environ[n] for n in ('OMPI_COMM_WORLD_RANK', 'CHAOS_MIN_RANKS')))"
    )
    done = tool("chaosrun", "-n", "2", "--min-ranks", "2", "--dry-run", str(script))
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    again = subprocess.run(
        done.stdout, shell=True, capture_output=True, text=True, timeout=60, env=clean_environment(), check=False
    )
    assert again.returncode == 0, again.stderr
    # Whole lines of two ranks may come in any order.
    assert sorted(again.stdout.splitlines()) == ["hello from 0 2", "hello from 1 2"]


# -- the doctor -------------------------------------------------------------------------------------------


def test_the_doctor_finds_nothing_wrong_here() -> None:
    done = tool("chaosrun", "-n", "2", "--doctor")
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert "FAIL" not in done.stdout
    assert "OK    fault tolerance  a killed rank was noticed after" in done.stdout
    assert done.stdout.splitlines()[-1] == "Jobs can run here."


def test_the_doctor_says_what_to_do_about_wrong_settings() -> None:
    done = tool("chaosrun", "-n", "2", "--doctor", environment={"OMPI_MCA_pml": "nonsense"})
    assert done.returncode == 1
    assert done.stderr == ""
    (setting,) = [line for line in done.stdout.splitlines() if line.startswith("WARN  MPI settings")]
    assert setting.endswith("OMPI_MCA_pml=nonsense instead of what was tested -> unset OMPI_MCA_pml")
    (failure,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert failure.startswith("FAIL  fault tolerance  two ranks could not run: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_doctor_who_is_called_away_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chaos_mpi.cli.chaosrun", "--doctor"]
    with Job(command, tmp_path, {"TMPDIR": str(tmp_path)}, limit_s=60) as job:
        job.wait_until(lambda: any(map(is_probe, job.processes())), "the two ranks ran")
        job.signal(number)
        finished = job.finish()
    assert finished.status == 128 + number
    assert "Traceback" not in finished.output
    assert not list(tmp_path.glob("chaosdoctor-*"))


def is_probe(pid: int) -> bool:
    """Whether this process is a rank of the doctor's."""
    try:
        return psutil.Process(pid).cmdline()[1:] == ["-m", "chaos_mpi.mpi.probe"]
    except psutil.Error:
        return False


# -- output and endings -----------------------------------------------------------------------------------


def test_output_is_tagged_on_request(tmp_path: Path) -> None:
    with start("scenarios.py", tmp_path, "forgets_to_close", ranks=2, options=["--tag-output"]) as job:
        finished = job.finish()
    assert finished.status == 0
    lines = [line for line in finished.output.splitlines() if line.endswith("came to the end")]
    assert sorted(lines) == ["[0] came to the end", "[1] came to the end"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(number: signal.Signals, tmp_path: Path) -> None:
    with started(tmp_path) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        job.signal(number)
        finished = job.finish()
    assert finished.status == 128 + number
    assert finished.output.splitlines()[-1] == f"chaosrun: interrupted by {number.name}; all ranks were ended"
    assert not list((tmp_path / "t").iterdir()), "something is left in the directory for temporary files"


def test_no_shared_memory_is_left(tmp_path: Path) -> None:
    with started(tmp_path) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        maps = [Path(part.path) for part in psutil.Process(job.pid(0)).memory_maps()]
        segments = [path for path in maps if path.name.startswith("sm_segment.")]
        if not segments:
            pytest.skip("the ranks do not use shared memory here")
        assert all(path.exists() for path in segments)
        job.kill(job.pid(1))
        job.signal(signal.SIGINT)
        job.finish()
    assert not [path for path in segments if path.exists()]
    assert not [path for path in segments if path.parent.exists()], "the directory is left"


def test_the_next_job_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    with started(tmp_path) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        (launcher,) = (tmp_path / "t").glob("chaosrun-*/launcher-*.json")
        left = [launcher.parent, Path((launcher.parent / "memory").read_text())]
        job.kill(int(launcher.stem.removeprefix("launcher-")))
        job.kill_all()
        assert all(path.exists() for path in left)
        environment = {"TMPDIR": str(tmp_path / "t")}
        assert tool("chaosrun", "-n", "1", sys.executable, "-c", "pass", environment=environment).returncode == 0
        assert not [path for path in left if path.exists()]


def test_all_ranks_crash(tmp_path: Path) -> None:
    rules: list[Rule] = [{"rank": rank, "at": "forward", "step": 3, "do": "raise"} for rank in range(3)]
    with started(tmp_path, rules) as job:
        finished = job.finish()
    assert finished.status == 1
    (line,) = [line for line in finished.output.splitlines() if line.startswith("chaosrun: ")]
    assert line == finished.output.splitlines()[-1]
    assert line.startswith("chaosrun: training did not finish: InjectedError: injected into rank ")


def test_a_killed_rank_is_no_failure(tmp_path: Path) -> None:
    problem = Problem(ranks=3)
    temporary = tmp_path / "t"
    temporary.mkdir()
    rules: list[Rule] = [{"rank": 1, "at": "forward", "step": 3, "do": "die"}]
    with start_training(tmp_path, problem, rules, environment={"TMPDIR": str(temporary)}) as job:
        finished = job.finish()
    assert not list(temporary.iterdir()), "something is left in the directory for temporary files"
    check_survival(finished, problem, {1})
    assert "chaosrun: " not in finished.output
    assert "mpirun" not in finished.output
    assert "NBC_Progress" not in finished.output


# -- chaosctl ---------------------------------------------------------------------------------------------


def test_ranks_are_added_and_removed(tmp_path: Path) -> None:
    first_newcomer = 100  # see fault_points.own_label
    with started(tmp_path, [{"rank": first_newcomer, "at": "start", "do": "die"}]) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        added = ctl(tmp_path, "add")
        assert added.returncode == 0, added.stderr
        begun, again, takes_part = added.stdout.splitlines()
        assert begun.endswith("starts a rank")
        assert "starts a rank (attempt 2; the one before: " in again
        assert takes_part.endswith("takes part")
        state = json.loads(ctl(tmp_path, "status", "--json").stdout)
        assert len(state["members"]) == 4
        removed = ctl(tmp_path, "remove", state["members"][1])
        assert removed.returncode == 0, removed.stderr
        assert removed.stdout == f"{state['members'][1]} left\n"
        by_rank = ctl(tmp_path, "remove", "0")
        assert by_rank.stdout == f"{state['members'][0]} left\n"
        unknown = ctl(tmp_path, "remove", "nobody")
        assert unknown.returncode == 1
        assert "nobody is not a member" in unknown.stderr
        state = json.loads(ctl(tmp_path, "status", "--json").stdout)
        assert len(state["members"]) == 2
        sockets = list((tmp_path / "t").glob("chaosrun-*/control-*.sock"))
        assert sockets
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in sockets)
        job.kill_all()
    assert ctl(tmp_path, "status").returncode == 1


def test_a_full_job_refuses_more(tmp_path: Path) -> None:
    with started(tmp_path, options=["--max-ranks", "3", "--min-ranks", "3"]) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        assert "max_ranks is 3" in ctl(tmp_path, "add").stderr
        assert "min_ranks is 3" in ctl(tmp_path, "remove", "1").stderr
        job.kill_all()


def test_sigterm_makes_a_rank_leave(tmp_path: Path) -> None:
    with start_training(tmp_path, Problem(ranks=3, epochs=60, pause_s=0.005)) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        os.kill(job.pid(1), signal.SIGTERM)
        finished = job.finish()
    assert finished.status == 0
    assert not finished.events("failure_detected")
    (left,) = [e for e in finished.events("session_ended") if e["outcome"] == "left"]
    assert left["member"] == finished.member(1)


def test_nothing_runs(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for command in (["status"], ["add"], ["remove", "0"]):
        done = ctl(tmp_path, *command)
        assert done.returncode == 1
        assert "no job of yours is running" in done.stderr
    assert ctl(tmp_path, "timeline", str(HERE / "missing.jsonl")).returncode == 2
