"""Hosts that vanish while the job changes, come back, or are slow, and ranks that are started again. Skipped without
root or ssh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace

import pytest
from host_jobs import (
    ENDLESS,
    Bed,
    Job,
    Rule,
    Start,
    asked,
    chaosctl,
    check_survivors,
    events,
    launcher_pid,
    members,
    pid_of,
    reach,
    stop,
    train,
    wait,
)

HOSTS = "edge1,edge2,edge3"
#: State that takes about two seconds over links of this rate.
LARGE = replace(ENDLESS, ballast_bytes=40 << 20)
RATE_MBIT = 150
#: Where a newcomer, the first one, begins to fetch the state, by join policy.
FETCHES = {"overlap": "newcomer:fetch_planned", "blocking": "newcomer:fetch"}
NEWCOMER = 100


def join_slowly(launched: Start, bed: Bed, policy: str) -> Job:
    """A job that is joined by edge4, which has just begun to fetch the state."""
    rules: list[Rule] = [{"rank": NEWCOMER, "at": FETCHES[policy]}]
    job = launched(LARGE, HOSTS, "--join-policy", policy, rules=rules)
    train(job)
    for host in bed[0].hosts:
        bed[0].set_host_rate(host, RATE_MBIT)
    with asked(job, "add", "--host", "edge4"):
        reach(job, f"{FETCHES[policy]}.{NEWCOMER}")
    assert not events(job, "shards_received"), "the state is still on its way"
    return job


@pytest.mark.hosts(4)
@pytest.mark.parametrize("policy", FETCHES)
def test_a_host_vanishes_that_a_newcomer_gets_the_state_from(launched: Start, ssh_bed: Bed, policy: str) -> None:
    job = join_slowly(launched, ssh_bed, policy)
    ssh_bed[0].power_off("edge2")
    job.wait_until(lambda: bool(events(job, "join_active")), "the newcomer takes part")
    train(job, 20)
    check_survivors(job, "edge1", "edge3", "edge4")


@pytest.mark.hosts(4)
@pytest.mark.parametrize("policy", FETCHES)
def test_the_host_of_a_newcomer_vanishes(launched: Start, ssh_bed: Bed, policy: str) -> None:
    job = join_slowly(launched, ssh_bed, policy)
    ssh_bed[0].power_off("edge4")
    train(job, 20)
    check_survivors(job, *HOSTS.split(","))


@pytest.mark.hosts(5)
@pytest.mark.parametrize("phase", ["agree", "exchange", "quorum", "commit"])
def test_a_host_vanishes_while_another_one_is_recovered_from(launched: Start, ssh_bed: Bed, phase: str) -> None:
    five = [f"edge{number}" for number in range(1, 6)]
    rules: list[Rule] = [{"rank": 0, "at": f"phase:{phase}", "wait": ["both.gone"]}]
    job = launched(replace(ENDLESS, ranks=5), ",".join(five), rules=rules)
    train(job)
    ssh_bed[0].power_off("edge2")
    reach(job, f"phase:{phase}.0")
    ssh_bed[0].power_off("edge4")
    (job.folder / "mark-both.gone").touch()
    train(job, 20)
    check_survivors(job, "edge1", "edge3", "edge5")


def test_a_host_is_rebooted(launched: Start, ssh_bed: Bed) -> None:
    bed, servers = ssh_bed
    job = launched(ENDLESS, HOSTS)
    train(job)
    before = members(job)["edge2"]
    bed.power_off("edge2")
    train(job, 20)
    bed.power_on("edge2")
    servers.restart("edge2")
    added = chaosctl(job, "add", "--host", "edge2")
    assert "takes part" in added.stdout, added
    assert members(job)["edge2"] != before
    train(job, 20)
    check_survivors(job, *HOSTS.split(","))


def test_a_host_with_a_slow_link_joins(launched: Start, ssh_bed: Bed) -> None:
    job = launched(replace(ENDLESS, ballast_bytes=1 << 20), "edge1,edge2", "-n", "2")
    train(job)
    ssh_bed[0].set_host_rate("edge3", 5)
    added = chaosctl(job, "add", "--host", "edge3")
    assert "takes part" in added.stdout, added
    train(job, 20)
    assert members(job).keys() == {"edge1", "edge2", "edge3"}
    check_survivors(job, *HOSTS.split(","))


def test_what_is_left_can_be_asked_after_launcher_and_host_are_gone(
    launched: Start, ssh_bed: Bed, remote_python: str
) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    of = members(job)
    os.kill(launcher_pid(job, "prterun"), signal.SIGKILL)
    ssh_bed[0].power_off("edge2")
    before = job.steps_finished()
    wait(lambda: job.steps_finished() > before + 20, "steps without the host")
    command = [remote_python, "-m", "chaos_mpi.cli.chaosctl", "status", "--json", "--job"]
    for host in ("edge1", "edge3"):
        (home,) = (job.folder.parent / "tmp").glob(f"chaosrun-*-{host}")
        there = ssh_bed[0].command(host, [*command, str(home)])
        told = json.loads(subprocess.run(there, capture_output=True, timeout=30, check=True).stdout)
        assert told["members"] == [of["edge1"], of["edge3"]]
        assert [rank["member"] for rank in told["ranks"] if rank["state"] != "elsewhere"] == [of[host]]
    check_survivors(job, "edge1", "edge3")


def test_a_newcomer_ends_before_mpi_knows_of_it(launched: Start) -> None:
    """On another host: its proxy tells of it."""
    job = launched(replace(ENDLESS, ranks=2), "edge1,edge2", rules=[{"rank": NEWCOMER, "at": "start", "do": "die"}])
    train(job)
    assert "takes part" in chaosctl(job, "add", "--host", "edge3").stdout
    assert [event["attempt"] for event in events(job, "join_spawned")] == [1, 2]
    train(job, 20)
    check_survivors(job, *HOSTS.split(","))


def test_newcomers_that_all_end_are_given_up(launched: Start) -> None:
    rules: list[Rule] = [{"rank": number, "at": "start", "do": "raise"} for number in (100, 200, 300)]
    job = launched(replace(ENDLESS, ranks=2), "edge1,edge2", rules=rules)
    train(job)
    told = chaosctl(job, "add", "--host", "edge3")
    reason = "given up after 3 attempts: its process ended (exit status 1) before it was connected"
    assert reason in told.stdout + told.stderr
    train(job, 20)
    failed = events(job, "join_failed")
    assert {(event["member"], event["host"], reason in event["reason"]) for event in failed} == {
        (member, "edge3", True) for member in members(job).values()
    }
    stop(job)
    assert job.finish().status == 0, "they were none of the job"


def test_a_rank_that_is_killed_is_started_again(launched: Start) -> None:
    job = launched(ENDLESS, HOSTS, "--restarts", "1")
    train(job)
    before = members(job)["edge2"]
    os.kill(pid_of(job, "edge2"), signal.SIGKILL)
    job.wait_until(lambda: bool(events(job, "join_active")), "a new rank takes part")
    assert members(job)["edge2"] != before
    train(job, 20)
    os.kill(pid_of(job, "edge2"), signal.SIGKILL)
    job.wait_until(lambda: "is not started again" in job.output(), "the limit")
    train(job, 20)
    assert "edge2: its rank crashed (SIGKILL) and is started again (1 of 1 this hour)" in job.output()
    check_survivors(job, "edge1", "edge3")
