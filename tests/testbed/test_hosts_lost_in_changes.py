"""Hosts that vanish while the job changes, and ranks that are started again. Skipped without root or ssh."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
from host_jobs import (
    ENDLESS,
    Bed,
    Job,
    Rule,
    Start,
    asked,
    check_survivors,
    events,
    members,
    pid_of,
    reach,
    train,
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
@pytest.mark.parametrize("policy", ["overlap"])
def test_the_host_of_a_newcomer_vanishes(launched: Start, ssh_bed: Bed, policy: str) -> None:
    job = join_slowly(launched, ssh_bed, policy)
    ssh_bed[0].power_off("edge4")
    train(job, 20)
    check_survivors(job, *HOSTS.split(","))


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
