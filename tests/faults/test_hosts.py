"""Jobs on several hosts, all of which are this machine: reached by the example for Slurm, with a stand-in for ``srun``.

That real hosts are reached by ssh, and what becomes of a job when they are lost, is tested on the network test bed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checks import check_history
from jobs import HERE, PACKAGE_ROOT, Job, clean_environment, start_training
from problem import Problem

pytestmark = pytest.mark.faults

#: Checks its options as srun would, and runs the command here.
SRUN = f"""#!{sys.executable}
import argparse, os
given = argparse.ArgumentParser()
for name in ("nodes", "ntasks", "nodelist", "kill-on-bad-exit"):
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


def start(folder: Path, problem: Problem, hosts: str) -> Job:
    path, run_on = programs(folder)
    options = ["--hosts", hosts, "--ssh-program", str(run_on), "--network", "lo"]
    environment = {"PATH": path, "TMPDIR": str(folder)}
    return start_training(folder / "job", problem, options=options, environment=environment)


def members(job: Job) -> dict[str, str]:
    """Member ids by host."""
    texts = [path.read_text().partition("\n")[0] for path in job.folder.glob("events-*.jsonl")]
    return {event["host"]: event["member"] for event in map(json.loads, filter(None, texts))}


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
        command = [sys.executable, "-m", "chaos_mpi.cli.chaosctl", "add", "--host", "node3"]
        environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(PACKAGE_ROOT)}
        environment["PATH"] = f"{tmp_path / 'programs'}:{environment['PATH']}"
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
        of = members(job)
        assert f"{of['node3']} takes part" in told.stdout, told
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
