"""Hosts that vanish without a word, pause, or lose each other. Skipped without root or ssh."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from dataclasses import replace

import pytest
from host_jobs import (
    ENDLESS,
    Bed,
    Job,
    Start,
    chaosctl,
    check_survivors,
    launcher_pid,
    pid_of,
    train,
    wait,
)

HOSTS = "edge1,edge2,edge3"
FIVE = "edge1,edge2,edge3,edge4,edge5"


def stall_s(job: Job) -> list[float]:
    """How long each member stood still for a failure."""
    found = []
    for path in sorted(job.folder.glob("events-*.jsonl")):
        events = map(json.loads, path.read_text().splitlines())
        found += [event["seconds"] for event in events if event["event"] == "stalled" and event["cause"] == "failure"]
    return found


def test_a_host_vanishes(launched: Start, ssh_bed: Bed) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    ssh_bed[0].power_off("edge2")
    train(job, 20)
    check_survivors(job, "edge1", "edge3")
    print("stalls:", stall_s(job))


def test_the_host_of_a_rank_that_joined_vanishes(launched: Start, ssh_bed: Bed) -> None:
    job = launched(ENDLESS, "edge1,edge2", "-n", "2")
    train(job)
    assert "takes part" in chaosctl(job, "add", "--host", "edge3").stdout
    train(job)
    ssh_bed[0].power_off("edge3")
    train(job, 20)
    check_survivors(job, "edge1", "edge2")


def test_a_host_vanishes_after_the_launcher(launched: Start, ssh_bed: Bed) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    os.kill(launcher_pid(job, "prterun"), signal.SIGKILL)
    before = job.steps_finished()
    wait(lambda: job.steps_finished() > before + 10, "steps without the launcher")
    ssh_bed[0].power_off("edge2")
    before = job.steps_finished()
    wait(lambda: job.steps_finished() > before + 20, "steps without the host")
    check_survivors(job, "edge1", "edge3")


@pytest.mark.hosts(5)
def test_two_hosts_vanish_at_once(launched: Start, ssh_bed: Bed) -> None:
    job = launched(replace(ENDLESS, ranks=5), FIVE)
    train(job)
    ssh_bed[0].power_off("edge2")
    ssh_bed[0].power_off("edge4")
    train(job, 20)
    check_survivors(job, "edge1", "edge3", "edge5")


@pytest.mark.parametrize("pause_s", [0.1, 5.0])
def test_a_host_pauses(launched: Start, ssh_bed: Bed, pause_s: float) -> None:
    """It is waited for, or left behind for good."""
    bed, _ = ssh_bed
    job = launched(ENDLESS, HOSTS)
    train(job)
    paused = bed.pids("edge2")
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(pause_s)
    for pid in paused:
        os.kill(pid, signal.SIGCONT)
    train(job, 20)
    alone = pause_s > 1
    if alone:
        wait(lambda: not [pid for pid in bed.pids("edge2") if pid == pid_of(job, "edge2")], "the end of the lost rank")
    check_survivors(job, *(["edge1", "edge3"] if alone else ["edge1", "edge2", "edge3"]))


@pytest.mark.hosts(5)
def test_the_majority_goes_on(launched: Start, ssh_bed: Bed) -> None:
    bed, _ = ssh_bed
    job = launched(replace(ENDLESS, ranks=5), FIVE)
    train(job)
    minority = {host: pid_of(job, host) for host in ("edge1", "edge4")}
    for cut_off in minority:
        for other in ("edge2", "edge3", "edge5"):
            bed.cut(cut_off, other)
    train(job, 20)
    wait(lambda: not any(pid in bed.pids(host) for host, pid in minority.items()), "the end of the minority")
    # The majority has cut it off from the launcher as well, so what it has to say is in the logs of its hosts.
    said = [path.read_text() for path in (job.folder.parent / "logs").rglob("*.log")]
    assert sum("trains on without it" in text for text in said) == len(minority), said
    check_survivors(job, "edge2", "edge3", "edge5")


@pytest.mark.parametrize("lost", ["edge1", "edge2"])
def test_one_of_two_hosts_vanishes(launched: Start, ssh_bed: Bed, lost: str) -> None:
    """It cannot be told from a cut link, so that one of the two, always the same, must not go on."""
    # Otherwise it takes ssh two minutes to find out, and the launcher to know that nobody is left.
    impatient = shlex.join([*ssh_bed[1].command[1:], "-oServerAliveInterval=1", "-oServerAliveCountMax=3"])
    job = launched(replace(ENDLESS, ranks=2), "edge1,edge2", "--ssh-args", impatient)
    train(job)
    ssh_bed[0].power_off(lost)
    if lost == "edge2":
        train(job, 20)
        check_survivors(job, "edge1")
        return
    finished = job.finish()
    assert finished.status == 3, finished.status
    assert "was cut off from the majority" in finished.output
    (state,) = (job.folder / "chaos-state").glob("*.safetensors")
    assert str(state) in finished.output
