"""Another launcher takes over a job on several hosts. Skipped without root or ssh."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

from host_jobs import (
    ENDLESS,
    Bed,
    Finished,
    Job,
    Start,
    check_move,
    check_nothing_left,
    check_training,
    clean_environment,
    members,
    stop,
    train,
    wait,
)

HOSTS = "edge1,edge2,edge3"
#: Two sets of ranks on one machine, and one of them starts: agents may be silent for a while.
PATIENT = ("--heartbeat-limit", "5")
LIMIT_S = 90


def on_host(bed: Bed, python: str, host: str, *arguments: str) -> subprocess.Popen[str]:
    """``chaosctl`` on a host, over ssh."""
    line = shlex.join([python, "-m", "chaos_mpi.cli.chaosctl", *arguments])
    return subprocess.Popen(
        [*bed[1].command, host, line], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def steps_from(job: Job, before: int, number: int = 20) -> None:
    wait(lambda: job.steps_finished() >= before + number, f"step {before + number}")


def events(job: Job, name: str) -> list[dict[str, Any]]:
    return Finished(0, "", job.folder, 0.0).events(name)


def finish(job: Job, launcher: subprocess.Popen[str]) -> Finished:
    """What becomes of the job under its new launcher."""
    output, _ = launcher.communicate(timeout=LIMIT_S)
    print(output)
    wait(lambda: not job.processes(), "the end of all processes")
    return Finished(launcher.returncode, output, job.folder, 0.0)


def another_job(job: Job) -> None:
    """On the launch host, for a moment."""
    command = [sys.executable, "-m", "chaos_mpi.cli.chaosrun", "-n", "1", sys.executable, "-c", "pass"]
    environment = {**clean_environment(), "TMPDIR": str(job.folder.parent / "tmp")}
    subprocess.run(command, env=environment, timeout=LIMIT_S, check=True)


def test_a_job_that_has_lost_its_launcher_is_taken_over(launched: Start, ssh_bed: Bed, remote_python: str) -> None:
    job = launched(ENDLESS, HOSTS, *PATIENT)
    train(job)
    job.signal(signal.SIGKILL)
    steps_from(job, job.steps_finished())
    first = members(job)
    began = time.time()
    launcher = on_host(ssh_bed, remote_python, "edge2", "takeover")
    wait(lambda: len(events(job, "resumed")) == len(first), "the new ranks to go on")
    steps_from(job, job.steps_finished())
    os.kill(int(members(job)["edge1"].rpartition(":")[2]), signal.SIGKILL)
    steps_from(job, job.steps_finished())
    adding = on_host(ssh_bed, remote_python, "edge3", "add", "--host", "edge1", "--job", str(newest_home(job, "edge3")))
    told, _ = adding.communicate(timeout=LIMIT_S)
    of = members(job)
    assert f"{of['edge1']} takes part" in told
    steps_from(job, job.steps_finished())
    stop(job)
    finished = finish(job, launcher)
    check_training(finished, ENDLESS, set(of.values()))
    check_move(finished.events(), set(first.values()), began)
    # What was left by the launcher that was killed only its own host can know to be of no use.
    wait(lambda: len(list((job.folder.parent / "tmp").iterdir())) == 1, "the end of what the hosts have left")
    another_job(job)
    check_nothing_left(job)


def newest_home(job: Job, host: str) -> str:
    """The directory of the job on a host: while the first launcher goes, there may be two."""
    homes = (job.folder.parent / "tmp").glob(f"chaosrun-*-{host}")
    return str(max(homes, key=lambda home: home.stat().st_mtime))


def test_a_launcher_that_lives_gives_the_job_up(launched: Start, ssh_bed: Bed, remote_python: str) -> None:
    """To one that takes another host in, which gets the state from the others."""
    job = launched(ENDLESS, "edge1,edge2", "-n", "2", *PATIENT)
    train(job)
    first = set(members(job).values())
    began = time.time()
    launcher = on_host(ssh_bed, remote_python, "edge2", "takeover", "--hosts", HOSTS)
    assert job.finish_launcher() == 4
    assert "the job moved to another launcher" in job.output()
    wait(lambda: len(events(job, "resumed")) == 3, "the new ranks to go on")
    steps_from(job, job.steps_finished())
    stop(job)
    finished = finish(job, launcher)
    of = members(job)
    assert f"sends the state to {of['edge3']}" in finished.output
    check_training(finished, ENDLESS, set(of.values()))
    check_move(finished.events(), first, began)
    check_nothing_left(job)


def test_of_two_launchers_one_gets_the_job(launched: Start, ssh_bed: Bed, remote_python: str) -> None:
    """And the other one gives no advice from which nothing could go on."""
    job = launched(ENDLESS, "edge1,edge2", "-n", "2", *PATIENT)
    train(job)
    began, first = time.time(), set(members(job).values())
    launchers = [on_host(ssh_bed, remote_python, host, "takeover") for host in ("edge1", "edge2")]
    wait(lambda: len(events(job, "resumed")) == 2, "the new ranks to go on")
    wait(lambda: any(launcher.poll() is not None for launcher in launchers), "the end of the other launcher")
    (loser,) = [launcher for launcher in launchers if launcher.poll() is not None]
    said, _ = loser.communicate(timeout=LIMIT_S)
    assert loser.returncode not in (0, None)
    assert "the job was not handed over" in said and "CHAOS_RESUME_FROM" not in said, said
    launchers.remove(loser)
    steps_from(job, job.steps_finished())
    stop(job)
    finished = finish(job, launchers[0])
    finals = {path.name.removeprefix("result-").removesuffix(".json") for path in job.folder.glob("result-*.json")}
    assert len(finals) == 2
    check_training(finished, ENDLESS, finals)
    check_move(finished.events(), first, began)
    check_nothing_left(job)


def test_a_takeover_that_cannot_be_leaves_the_job_as_it_was(launched: Start, ssh_bed: Bed, remote_python: str) -> None:
    job = launched(ENDLESS, HOSTS, *PATIENT)
    train(job)
    job.signal(signal.SIGKILL)
    refused = on_host(ssh_bed, remote_python, "edge2", "takeover", "--ssh-args", "-F /dev/null -oConnectTimeout=2")
    said, _ = refused.communicate(timeout=LIMIT_S)
    assert refused.returncode == 2, said
    assert "chaosrun: edge1: ssh cannot connect" in said
    steps_from(job, job.steps_finished())
    stop(job)
    of = set(members(job).values())
    wait(lambda: {f"result-{member}.json" for member in of} <= {path.name for path in job.folder.iterdir()}, "the end")
