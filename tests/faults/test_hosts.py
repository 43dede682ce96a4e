"""Jobs on several hosts, all of which are this machine: reached by the example for Slurm, with a stand-in for ``srun``.

That real hosts are reached by ssh, and what becomes of a job when they are lost, is tested on the network test bed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from checks import check_history, check_move
from fault_points import Rule
from jobs import HERE, PACKAGE_ROOT, Finished, Job, clean_environment, start_training
from problem import Problem, as_trained
from watched_jobs import wait_for

from chaos_mpi.elastic import kept

pytestmark = pytest.mark.faults

#: Checks its options as srun would, and runs the command here.
SRUN = f"""#!{sys.executable}
import argparse, os
given = argparse.ArgumentParser()
given.add_argument("--version", action="version", version="slurm 24.11.0")  # mpirun asks for it
for name in ("nodes", "ntasks", "nodelist", "kill-on-bad-exit", "mpi"):
    given.add_argument("--" + name, required=True)
for name in ("overlap", "unbuffered", "quiet"):
    given.add_argument("--" + name, action="store_true", required=True)
given.add_argument("command", nargs=argparse.REMAINDER)
command = given.parse_args().command
os.execvp(command[0], command)
"""


def programs(folder: Path) -> tuple[str, Path]:
    """A PATH with the stand-in for srun, and the program that uses it in the place of ssh."""
    made = folder / "programs"
    made.mkdir()
    (made / "srun").write_text(SRUN)
    (made / "srun").chmod(0o755)
    return f"{made}:{os.environ['PATH']}", HERE.parents[1] / "launch" / "slurm" / "run_on"


def start(folder: Path, problem: Problem, hosts: str, *more: str, rules: Sequence[Rule] = ()) -> Job:
    """Ranks that crash are not started again unless ``more`` says so."""
    _, run_on = programs(folder)
    options = [
        "--hosts",
        hosts,
        "--ssh-program",
        str(run_on),
        "--network",
        "lo",
        "--restarts",
        "0",
        "--heartbeat-limit",
        "2",
    ]
    options += ["--log-dir", str(folder / "logs"), *more]
    return start_training(folder / "job", problem, rules, options=options, environment=variables(folder))


def variables(folder: Path) -> dict[str, str]:
    """As within an allocation of other nodes, where mpirun is to start nothing by itself."""
    slurm = {"SLURM_JOBID": "7", "SLURM_JOB_ID": "7", "SLURM_NODELIST": "far1,far2", "SLURM_NNODES": "2"}
    slurm |= {"SLURM_JOB_NODELIST": "far1,far2", "SLURM_TASKS_PER_NODE": "1(x2)"}
    return {"PATH": f"{folder / 'programs'}:{os.environ['PATH']}", "TMPDIR": str(folder), **slurm}


def chaosctl(folder: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **variables(folder), "PYTHONPATH": str(PACKAGE_ROOT), **more}
    return subprocess.Popen(
        [sys.executable, "-m", "chaos_mpi.cli.chaosctl", *arguments], env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def members(job: Job) -> dict[str, str]:
    """Member ids by host, the newest."""
    return {event["host"]: event["member"] for event in so_far(job).events("session_started")}


def so_far(job: Job) -> Finished:
    return Finished(0, "", job.folder, 0.0)


def wait_for_agents(job: Job) -> None:
    """The last ones go when they have agreed that they are the last."""
    limit = time.monotonic() + 30
    while job.processes() or list(job.folder.parent.glob("chaosrun-*")):
        assert time.monotonic() < limit, "something is left of the job"
        time.sleep(0.05)


def test_a_job_on_hosts(tmp_path: Path) -> None:
    problem = Problem(ranks=3)
    with start(tmp_path, problem, "node1:2,node2") as job:
        finished = job.finish()
    assert set(members(job)) == {"node1", "node2"}
    check_history(finished, problem, set(finished.results()))
    assert len(finished.results()) == 3
    assert not list(tmp_path.glob("chaosrun-*"))


def test_a_host_is_added_and_one_is_lost(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=10**6, pause_s=0.02)
    with start(tmp_path, problem, "node1,node2") as job:
        job.wait_until(lambda: job.steps_finished() > 3, "training began")
        told, _ = chaosctl(tmp_path, "add", "--host", "node3").communicate(timeout=50)
        of = members(job)
        assert f"{of['node3']} takes part" in told
        job.kill(int(of["node1"].rpartition(":")[2]))
        before = job.steps_finished()
        job.wait_until(lambda: job.steps_finished() > before + 5, "it went on")
        (job.folder / "stop").touch()
        finished = job.finish()
    assert set(finished.results()) == {of["node2"], of["node3"]}
    assert len({result["digest"] for result in finished.results().values()}) == 1
    assert finished.status == 0
    assert not list(tmp_path.glob("chaosrun-*"))


def test_a_script_that_starts_python_without_becoming_it(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f'#!/bin/sh\n{sys.executable} -c "import chaos_mpi; chaos_mpi.init()"; exit $?\n')
    script.chmod(0o755)
    command = [sys.executable, "-m", "chaos_mpi.cli.chaosrun", "--hosts", "node1", "--network", "lo"]
    path, run_on = programs(tmp_path)
    command += ["--ssh-program", str(run_on), str(script)]
    environment = {**clean_environment(), "PATH": path}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert "exec python train.py" in refused.stderr, refused
    assert refused.returncode != 0


def test_another_launcher_takes_over(tmp_path: Path) -> None:
    """The first one lives: what becomes of a job when it has been lost is tested on real hosts."""
    problem = Problem(ranks=2, epochs=10**6, pause_s=0.02)
    with start(tmp_path, problem, "node1,node2") as job:
        job.wait_until(lambda: job.steps_finished() > 3, "training began")
        first = set(members(job).values())
        began = time.time()
        launcher = chaosctl(tmp_path, "takeover", "--tag-output")
        assert job.finish_launcher() == 4
        assert "the job moved to another launcher" in job.output()
        environ = Path(f"/proc/{launcher.pid}/environ").read_bytes().split(b"\0")
        (name,) = [entry.partition(b"=")[2].decode() for entry in environ if entry.startswith(kept.VARIABLE.encode())]
        (job.folder / "stop").touch()
        output, _ = launcher.communicate(timeout=50)
        wait_for_agents(job)
    finished = Finished(launcher.returncode, output, job.folder, 0.0)
    second = set(members(job).values())
    assert not second & first
    check_history(finished, as_trained(problem, job.folder), second)
    check_move(finished.events(), first, began)
    assert not any(place.exists() for place in kept.places(name)), "the state is left in memory"


def test_a_takeover_whose_ranks_do_not_start_leaves_the_job_as_it_was(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=10**6, pause_s=0.02)
    with start(tmp_path, problem, "node1,node2") as job:
        job.wait_until(lambda: job.steps_finished() > 3, "training began")
        launcher = chaosctl(tmp_path, "takeover", CHAOS_MIN_RANKS="5")
        output, _ = launcher.communicate(timeout=50)
        assert "min_ranks is 5, but the job was started with 2 ranks" in output
        assert launcher.returncode == 3
        before = job.steps_finished()
        job.wait_until(lambda: job.steps_finished() > before + 5, "it went on")
        (job.folder / "stop").touch()
        job.finish_launcher()
        wait_for_agents(job)
        finished = job.finish()
    check_history(finished, as_trained(problem, job.folder), set(members(job).values()))


AGAIN = (
    "its rank crashed (by an error in the script) and is not started again: that was done 2 times within the hour, and "
    "--restarts is 2"
)


def test_a_rank_that_crashes_is_started_again_so_often(tmp_path: Path) -> None:
    problem = Problem(ranks=3, epochs=10**6, pause_s=0.02)
    # Rank 1, and each newcomer in the first step that it takes part in.
    rules: list[Rule] = [{"rank": 1, "at": "forward", "step": 6, "do": "die"}]
    rules += [{"rank": 100 * number, "at": "before optimizer", "do": "raise"} for number in (1, 2, 3)]
    with start(tmp_path, problem, "node1,node2,node3", "--restarts", "2", rules=rules) as job:
        job.wait_until(lambda: "is not started again" in job.output(), "the limit was reached")
        before = job.steps_finished()
        job.wait_until(lambda: job.steps_finished() > before + 5, "it went on")
        (job.folder / "stop").touch()
        finished = job.finish()
    told = [line.partition("node2: ")[2] for line in finished.output.splitlines() if "node2: its rank" in line]
    assert told == [
        "its rank crashed (SIGKILL) and is started again (1 of 2 this hour)",
        "its rank crashed (by an error in the script) and is started again (2 of 2 this hour)",
        AGAIN,
    ]
    last = finished.output.splitlines()[-1]
    assert last.startswith(
        "chaosrun: training finished, but 3 of 5 ranks (2 of them joined later) crashed on the way: "
    )
    of = members(job)
    assert set(finished.results()) == {of["node1"], of["node3"]}
    assert len(finished.events("join_requested")) == 0
    assert finished.status == 0
    assert not list(tmp_path.glob("chaosrun-*"))


def test_nothing_is_started_without_the_launcher(tmp_path: Path) -> None:
    problem = Problem(ranks=3, epochs=10**6, pause_s=0.02)
    with start(tmp_path, problem, "node1,node2,node3", "--restarts", "2", "--log-level", "info") as job:
        job.wait_until(lambda: job.steps_finished() > 3, "training began")
        of = members(job)
        (mpirun,) = [pid for pid in job.processes() if Path(f"/proc/{pid}/exe").resolve().name == "prterun"]
        os.kill(mpirun, signal.SIGKILL)
        before = job.steps_finished()
        wait_for("steps without mpirun", lambda: job.steps_finished() > before + 5)
        job.kill(int(of["node2"].rpartition(":")[2]))
        said = "mpirun, which starts ranks, is gone"
        wait_for(said, lambda: any(said in log.read_text() for log in (tmp_path / "logs").rglob("*.log")))
        after = job.steps_finished()
        wait_for("steps without the rank", lambda: job.steps_finished() > after + 5)
        (job.folder / "stop").touch()
        wait_for("the end of all", lambda: not job.processes())
    results = {path.name for path in job.folder.glob("result-*.json")}
    assert results == {f"result-{of[node]}.json" for node in ("node1", "node3")}


def test_the_next_job_keeps_what_ranks_without_a_launcher_need(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=10**6, pause_s=0.02)

    def another_job() -> None:
        command = [sys.executable, "-m", "chaos_mpi.cli.chaosrun", "-n", "1", sys.executable, "-c", "pass"]
        environment = clean_environment() | variables(tmp_path)
        subprocess.run(command, env=environment, timeout=60, check=True)

    with start(tmp_path, problem, "node1,node2") as job:
        job.wait_until(lambda: job.steps_finished() > 3, "training began")
        job.signal(signal.SIGKILL)
        before = job.steps_finished()
        wait_for("steps without the launcher", lambda: job.steps_finished() > before + 5)
        another_job()
        told, _ = chaosctl(tmp_path, "status").communicate(timeout=50)
        assert "2 members" in told.splitlines()[0]
        (job.folder / "stop").touch()
        wait_for("the end of all", lambda: not job.processes())
    assert len(so_far(job).results()) == 2
    assert len(list(tmp_path.glob("chaosrun-*"))) == 1, "the launcher's own directory, which it could not remove"
    another_job()
    assert not list(tmp_path.glob("chaosrun-*"))
