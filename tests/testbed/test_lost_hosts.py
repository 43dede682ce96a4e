"""Hosts that vanish without a word, pause, or lose each other. Skipped without root or ssh."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
from dataclasses import replace

import psutil
import pytest
from host_jobs import (
    ENDLESS,
    Bed,
    Job,
    Start,
    chaosctl,
    check_survivors,
    events,
    launcher_pid,
    members,
    pid_of,
    train,
    wait,
    witness_pid,
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
    told = job.folder / "output.txt"
    job.wait_until(lambda: "lost, as nothing was heard from there" in told.read_text(), "a line about the lost host")
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


@pytest.mark.parametrize("outage_s", [2.0, 12.0])
def test_an_outage_of_the_whole_network_costs_nobody(launched: Start, ssh_bed: Bed, outage_s: float) -> None:
    bed, _ = ssh_bed
    job = launched(ENDLESS, HOSTS)
    train(job)
    links = list(itertools.combinations(HOSTS.split(","), 2))
    for link in links:
        bed.cut(*link)
    time.sleep(outage_s)
    for link in links:
        bed.restore(*link)
    train(job, 20)
    check_survivors(job, "edge1", "edge2", "edge3")


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it was there for a moment only
            os.kill(pid, number)


@pytest.mark.parametrize("pause_s", [0.1, 5.0])
def test_a_host_pauses(launched: Start, ssh_bed: Bed, pause_s: float) -> None:
    """It is waited for, or left behind for good."""
    bed, _ = ssh_bed
    job = launched(ENDLESS, HOSTS)
    train(job)
    paused = bed.pids("edge2")
    send(paused, signal.SIGSTOP)
    time.sleep(pause_s)
    send(paused, signal.SIGCONT)
    train(job, 20)
    alone = pause_s > 1
    if alone:
        wait(lambda: not [pid for pid in bed.pids("edge2") if pid == pid_of(job, "edge2")], "the end of the lost rank")
    check_survivors(job, *(["edge1", "edge3"] if alone else ["edge1", "edge2", "edge3"]))


def test_an_agent_pauses_while_its_rank_goes_on(launched: Start, ssh_bed: Bed) -> None:
    """Its host is left out. The rank lives, sees the others part with it one by one, and must not turn them against
    each other."""
    job = launched(ENDLESS, HOSTS)
    train(job)
    rank = psutil.Process(pid_of(job, "edge2"))
    agent = rank.parent()
    assert agent is not None
    assert agent.pid in ssh_bed[0].pids("edge2")
    agent.suspend()
    try:
        job.wait_until(lambda: len(events(job, "recovered")) >= 2, "the loss of the host")
        train(job, 20)
    finally:
        agent.resume()
    wait(lambda: rank.pid not in ssh_bed[0].pids("edge2"), "the end of the lost rank")
    check_survivors(job, "edge1", "edge3")


@pytest.mark.hosts(5)
def test_the_majority_goes_on(launched: Start, ssh_bed: Bed) -> None:
    bed, _ = ssh_bed
    job = launched(replace(ENDLESS, ranks=5), FIVE)
    train(job)
    minority = {host: pid_of(job, host) for host in ("edge1", "edge4")}
    os.kill(witness_pid(job), signal.SIGKILL)  # both sides would still meet over its host
    for cut_off in minority:
        for other in ("edge2", "edge3", "edge5"):
            bed.cut(cut_off, other)
    train(job, 20)
    wait(lambda: not any(pid in bed.pids(host) for host, pid in minority.items()), "the end of the minority")
    # The majority has cut it off from the launcher as well, so what it has to say is in the logs of its hosts.
    said = [path.read_text() for path in (job.folder.parent / "logs").rglob("*.log")]
    assert sum("trains on without it" in text for text in said) == len(minority), said
    check_survivors(job, "edge2", "edge3", "edge5")


def test_hosts_that_cannot_reach_each_other_do_not_both_begin(launched: Start, ssh_bed: Bed) -> None:
    """As where a firewall lets nothing through but ssh: MPI takes each for dead to the other."""
    bed = ssh_bed[0]
    for host, other in (("edge1", "edge2"), ("edge2", "edge1")):
        route = ["ip", "route", "add", "unreachable", bed.address(other)]
        subprocess.run(bed.command(host, route), check=True)
    # Agents wait 15 s for each other at the start, and then they vote, which the ranks have to have the patience for.
    job = launched(ENDLESS, "edge1,edge2", "-n", "2", "--timeout", "60")
    job.wait_until(lambda: bool(members(job)), "a half that goes on")
    train(job, 20)
    assert len(members(job)) == 1
    check_survivors(job, *members(job))
