"""``chaosrun`` and ``chaosctl`` with ranks on several hosts, over ssh. Skipped without root or ssh."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from host_jobs import (
    ENDLESS,
    Bed,
    Problem,
    Start,
    chaosctl,
    check_history,
    check_nothing_left,
    check_training,
    launcher_pid,
    members,
    pid_of,
    stop,
    train,
    wait,
)

HOSTS = "edge1,edge2,edge3"


def test_a_job_on_hosts(launched: Start) -> None:
    problem = Problem(ranks=3)
    job = launched(problem, HOSTS)
    finished = job.finish()
    check_history(finished, problem, set(members(job).values()))
    assert set(members(job)) == {"edge1", "edge2", "edge3"}
    check_nothing_left(job)


def test_a_rank_is_killed(launched: Start) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    os.kill(pid_of(job, "edge2"), signal.SIGKILL)
    train(job, 20)
    stop(job)
    finished = job.finish()
    of = members(job)
    check_training(finished, ENDLESS, {of["edge1"], of["edge3"]})
    assert [e["failed"] for e in finished.events("failure_detected") if e["failed"]]
    check_nothing_left(job)


def test_ranks_are_added_and_removed_from_the_launch_host(launched: Start) -> None:
    job = launched(ENDLESS, "edge1,edge2", "-n", "2")
    train(job)
    added = chaosctl(job, "add", "--host", "edge3")
    told = added.stdout.replace("no answer yet from edge3\n", "")  # which a busy machine may make it say
    assert re.fullmatch(r"\S+ starts a rank\nedge3:\d+ takes part\n", told), added
    of = members(job)
    removed = chaosctl(job, "remove", of["edge1"])
    assert removed.stdout == f"{of['edge1']} left\n", removed
    status = json.loads(chaosctl(job, "status", "--json").stdout)
    assert status["members"] == [of["edge2"], of["edge3"]]
    train(job)
    stop(job)
    check_training(job.finish(), ENDLESS, {of["edge2"], of["edge3"]})
    check_nothing_left(job)


def test_chaosctl_on_a_host_of_the_job(launched: Start, ssh_bed: Bed, remote_python: str) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    (home,) = (job.folder.parent / "tmp").glob("chaosrun-*-edge2")
    command = [remote_python, "-m", "chaos_mpi.cli.chaosctl", "status", "--json", "--job", str(home)]
    told = subprocess.run(ssh_bed[0].command("edge2", command), capture_output=True, text=True, timeout=30, check=False)
    ranks = {rank["member"]: rank for rank in json.loads(told.stdout)["ranks"]}
    assert set(ranks) == set(members(job).values()), told
    here = ranks[members(job)["edge2"]]
    assert (here["host"], here["pid"]) == ("edge2", pid_of(job, "edge2"))
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("killed", ["prterun", "chaosrun"])
def test_the_launcher_is_no_single_point_of_failure(launched: Start, killed: str) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    if killed == "chaosrun":
        job.signal(signal.SIGKILL)
    else:
        os.kill(launcher_pid(job, "prterun"), signal.SIGKILL)
    of = members(job)
    before = job.steps_finished()
    wait(lambda: job.steps_finished() >= before + 20, "steps without the launcher")
    os.kill(pid_of(job, "edge3"), signal.SIGKILL)
    before = job.steps_finished()
    wait(lambda: job.steps_finished() >= before + 20, "steps after another loss")
    stop(job)
    if killed == "prterun":
        finished = job.finish()
        assert finished.status == 4
        assert "the ranks train on without it" in finished.output
    wait(lambda: not job.processes(), "the end of all")
    results = {path.name: json.loads(path.read_text()) for path in job.folder.glob("result-*.json")}
    assert set(results) == {f"result-{of[host]}.json" for host in ("edge1", "edge2")}
    assert len({result["digest"] for result in results.values()}) == 1
    assert all(result["identical"] for result in results.values())


def test_the_connection_with_the_host_of_one_rank_is_lost(launched: Start) -> None:
    """To MPI that rank is dead; to its agent it is not, until that is told so."""
    job = launched(ENDLESS, HOSTS)
    train(job)
    (ssh,) = [
        pid for pid in job.processes()
        if (words := Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))[0] == b"ssh" and b"edge2" in words
    ]  # fmt: skip
    os.kill(ssh, signal.SIGKILL)
    train(job, 20)
    stop(job)
    finished = job.finish()
    of = members(job)
    check_training(finished, ENDLESS, {of["edge1"], of["edge3"]})
    assert "the connection to edge2 is lost" in finished.output
    wait(lambda: not job.processes(), "the end of all processes")
    check_nothing_left(job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_job_leaves_nothing(launched: Start, number: signal.Signals) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    job.signal(number)
    finished = job.finish()
    assert finished.status == 128 + number
    assert finished.output.splitlines()[-1] == f"chaosrun: interrupted by {number.name}; all ranks were ended"
    check_nothing_left(job)


def test_a_host_that_cannot_be_told_of_the_end_is_named(launched: Start, ssh_bed: Bed) -> None:
    job = launched(ENDLESS, HOSTS, "--heartbeat-limit", "5")  # the others are not to give it up before
    train(job, 20)  # and what the ranks have written down has come to the launcher
    paused = ssh_bed[0].pids("edge2")
    try:
        for pid in paused:
            with contextlib.suppress(ProcessLookupError):  # it was there for a moment only
                os.kill(pid, signal.SIGSTOP)
        job.signal(signal.SIGINT)
        assert job.finish_launcher() == 128 + signal.SIGINT
    finally:
        for pid in paused:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    stop(job)  # what the host was told may have been lost with its connection
    wait(lambda: not job.processes(), "the end of all processes")
    last = job.finish().output.splitlines()[-1]
    assert last.startswith(
        "chaosrun: interrupted by SIGINT; edge2 did not confirm it, and the ranks there may train on"
    )


def test_hosts_that_cannot_be_used_are_named(launched: Start, ssh_bed: Bed) -> None:
    ssh_bed[0].power_off("edge2")
    job = launched(ENDLESS, HOSTS, "--ssh-args", shlex.join([*ssh_bed[1].command[1:], "-oConnectTimeout=2"]))
    finished = job.finish()
    assert finished.status == 2
    assert re.search(r"^chaosrun: edge2: ssh cannot connect: .+", finished.output, re.MULTILINE), finished.output
    assert "edge1" not in finished.output
    check_nothing_left(job)
