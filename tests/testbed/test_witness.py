"""Two hosts and a launch host that has a voice, and no rank. Skipped without root or ssh."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from dataclasses import replace

import pytest
from host_jobs import (
    ENDLESS,
    Bed,
    Job,
    Start,
    chaosctl,
    check_survivors,
    check_training,
    events,
    members,
    pid_of,
    stop,
    train,
    wait,
    witness_pid,
)

TWO = replace(ENDLESS, ranks=2)
HOSTS = "edge1,edge2"
#: Steps that take more than twice the limit for silence: the two have agreed then that the witness is gone.
MANY = 500


def steps(job: Job, number: int = 20) -> None:
    """Wait for so many more, whatever the launcher does."""
    before = job.steps_finished()
    wait(lambda: job.steps_finished() > before + number, f"{number} steps more")


def lose_launch_host(job: Job, bed: Bed) -> None:
    """Power off, as the hosts see it: not a word comes from there any more."""
    on_hosts = {pid for host in bed[0].hosts for pid in bed[0].pids(host)}
    subprocess.run(["ip", "link", "set", bed[0].prefix, "down"], check=True)
    for pid in set(job.processes()) - on_hosts:
        with contextlib.suppress(ProcessLookupError):  # some end when those before them are killed
            os.kill(pid, signal.SIGKILL)


@pytest.mark.hosts(2)
@pytest.mark.parametrize(("lost", "left"), [("edge1", "edge2"), ("edge2", "edge1")])
def test_either_of_two_hosts_may_vanish(launched: Start, ssh_bed: Bed, lost: str, left: str) -> None:
    job = launched(TWO, HOSTS)
    train(job)
    of = members(job)
    ssh_bed[0].power_off(lost)
    train(job, 20)
    stop(job)
    finished = job.finish()
    assert finished.status == 0
    assert "crashed" not in finished.output, "what is lost with its host has not crashed, as far as is known"
    check_training(finished, TWO, {of[left]})


@pytest.mark.hosts(2)
def test_the_launch_host_may_vanish(launched: Start, ssh_bed: Bed) -> None:
    """And is no voice any more: what becomes of one host without the other is as if it had never been one."""
    job = launched(TWO, HOSTS)
    train(job)
    lose_launch_host(job, ssh_bed)
    steps(job, MANY)
    ssh_bed[0].power_off("edge2")
    steps(job)
    check_survivors(job, "edge1")


@pytest.mark.hosts(2)
def test_without_a_witness_one_of_two_hosts_must_not_go_on(launched: Start, ssh_bed: Bed) -> None:
    """Always the same one: the loss of the other cannot be told from that of the link between them."""
    job = launched(TWO, HOSTS)
    train(job)
    job.signal(signal.SIGKILL)
    steps(job, MANY)
    ssh_bed[0].power_off("edge1")
    wait(lambda: not job.processes(), "the end of all processes")
    said = "".join(path.read_text() for path in (job.folder.parent / "logs").rglob("*.log"))
    assert "was cut off from the majority" in said, said
    (state,) = (job.folder / "chaos-state").glob("*.safetensors")
    assert str(state) in said


@pytest.mark.hosts(2)
def test_a_witness_that_is_lost_leaves_the_job_as_it_is(launched: Start, ssh_bed: Bed) -> None:
    job = launched(TWO, HOSTS)
    train(job)
    of = members(job)
    os.kill(witness_pid(job), signal.SIGKILL)
    train(job, MANY)
    assert members(job) == of
    told = {(event["member"], event["host"]) for event in events(job, "witness_changed") if event["state"] == "out"}
    assert told == {(member, socket.gethostname()) for member in of.values()}
    said = f"the witness on {socket.gethostname()} is not reachable, and has no vote any more"
    assert said in chaosctl(job, "status").stdout
    assert chaosctl(job, "log").stdout.count("is given up, and has no vote any more") == 1
    stop(job)
    finished = job.finish()
    assert finished.status == 0
    check_training(finished, TWO, set(of.values()))


@pytest.mark.hosts(2)
def test_of_two_hosts_that_lose_each_other_one_goes_on(launched: Start, ssh_bed: Bed) -> None:
    job = launched(TWO, HOSTS, "--no-detours")
    train(job)
    other = pid_of(job, "edge2")
    ssh_bed[0].cut("edge1", "edge2")
    wait(lambda: other not in ssh_bed[0].pids("edge2"), "the end of one of them")
    train(job, 20)
    check_survivors(job, "edge1")


@pytest.mark.hosts(2)
def test_the_launch_host_passes_on_what_cannot_go_between_two_hosts(launched: Start, ssh_bed: Bed) -> None:
    """Which leaves both in the job."""
    job = launched(TWO, HOSTS)
    train(job)
    of = members(job)
    ssh_bed[0].cut("edge1", "edge2")
    job.wait_until(lambda: [e["via"] for e in events(job, "link_changed")].count(socket.gethostname()) == 2, "a detour")
    train(job, 50)
    stop(job)
    finished = job.finish()
    assert finished.status == 0
    check_training(finished, TWO, set(of.values()))


@pytest.mark.hosts(2)
def test_a_rank_on_the_launch_host_takes_the_place_of_the_witness(launched: Start, ssh_bed: Bed) -> None:
    job = launched(TWO, HOSTS)
    train(job)
    witness = witness_pid(job)
    assert "takes part" in chaosctl(job, "add", "--host", "localhost").stdout
    wait(lambda: witness not in job.processes(), "the end of the witness")
    train(job, 20)

    def latest() -> list[str]:
        # On a busy machine a member may hear nothing of the witness for a while, and say so, before.
        return sorted({event["member"]: event["state"] for event in events(job, "witness_changed")}.values())

    job.wait_until(lambda: latest() == ["replaced"] * 3, "news of the witness at all of them")
    assert "witness" not in chaosctl(job, "status").stdout
    stop(job)
    finished = job.finish()
    assert finished.status == 0
    check_training(finished, TWO, set(members(job).values()))
