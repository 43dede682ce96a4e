"""Links between hosts that are cut: healed by a detour, else one end is given up. Skipped without root or ssh."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from host_jobs import ENDLESS, Bed, Job, Start, chaosctl, check_survivors, members, pid_of, train, wait

HOSTS = "edge1,edge2,edge3"
FOUR = "edge1,edge2,edge3,edge4"


def events(job: Job, name: str) -> dict[str, list[dict[str, Any]]]:
    """All events of a name, by host."""
    hosts = {member: host for host, member in members(job).items()}
    found: dict[str, list[dict[str, Any]]] = {host: [] for host in hosts.values()}
    for path in sorted(job.folder.glob("events-*.jsonl")):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == name:
                found[hosts[event["member"]]].append(event)
    return found


def link_states(job: Job) -> dict[str, list[tuple[str, str, str, str]]]:
    """What each rank has heard of links."""
    return {
        host: [(event["a"], event["b"], event["state"], event["via"]) for event in of_host]
        for host, of_host in events(job, "link_changed").items()
    }


def all_have_heard(job: Job, *news: tuple[str, str, str, str]) -> Callable[[], bool]:
    return lambda: all(heard[-len(news) :] == list(news) for heard in link_states(job).values())


def detours(bed: Bed, host: str) -> list[str]:
    """The routes of a host to single others."""
    command = ["ip", "-n", bed[0].namespace(host), "route", "show", "proto", "203"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def forwards(bed: Bed, host: str) -> bool:
    command = bed[0].command(host, ["cat", "/proc/sys/net/ipv4/ip_forward"])
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "1"


def longest_pause_s(job: Job) -> float:
    """Between two steps, at the member that waited least."""
    times = [[event["mono"] for event in steps] for steps in events(job, "step").values()]
    return min(max(later - earlier for earlier, later in itertools.pairwise(of_host)) for of_host in times)


def logs(job: Job) -> str:
    """What the ranks have printed when the launcher did not take it."""
    return "\n".join(path.read_text() for path in (job.folder.parent / "logs").rglob("*.log"))


def test_a_cut_link_is_healed_by_a_detour_until_it_is_back(launched: Start, ssh_bed: Bed) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    ssh_bed[0].cut("edge1", "edge2")
    job.wait_until(
        all_have_heard(job, ("edge1", "edge2", "cut", ""), ("edge1", "edge2", "detour", "edge3")), "the detour"
    )
    train(job, 20)
    assert len(detours(ssh_bed, "edge1")) == len(detours(ssh_bed, "edge2")) == 1
    assert forwards(ssh_bed, "edge3")
    ssh_bed[0].restore("edge1", "edge2")
    job.wait_until(all_have_heard(job, ("edge1", "edge2", "up", "")), "the link to be up")
    job.wait_until(lambda: not forwards(ssh_bed, "edge3"), "the end of the detour")
    train(job, 20)
    assert not detours(ssh_bed, "edge1") and not detours(ssh_bed, "edge2")
    check_survivors(job, "edge1", "edge2", "edge3")
    assert not any(events(job, "failure_detected").values())
    print(f"training stood still for {longest_pause_s(job):.3f} s")


@pytest.mark.hosts(4)
def test_a_detour_whose_host_vanishes_is_replaced(launched: Start, ssh_bed: Bed) -> None:
    job = launched(replace(ENDLESS, ranks=4), FOUR)
    train(job)
    ssh_bed[0].cut("edge1", "edge2")
    job.wait_until(all_have_heard(job, ("edge1", "edge2", "detour", "edge3")), "the detour")
    train(job)
    ssh_bed[0].power_off("edge3")
    train(job, 20)
    assert link_states(job)["edge1"][-1] == ("edge1", "edge2", "detour", "edge4")
    check_survivors(job, "edge1", "edge2", "edge4")
    wait(lambda: not detours(ssh_bed, "edge1") and not detours(ssh_bed, "edge2"), "the end of the routes")
    wait(lambda: not forwards(ssh_bed, "edge4"), "the end of forwarding")


@pytest.mark.hosts(4)
def test_one_end_of_a_cut_link_is_given_up_where_there_is_no_detour(launched: Start, ssh_bed: Bed) -> None:
    before = detours(ssh_bed, "edge1"), forwards(ssh_bed, "edge3")  # jobs that were killed may have left theirs
    job = launched(replace(ENDLESS, ranks=4), FOUR, "--no-detours")
    train(job)
    lost = pid_of(job, "edge2")
    ssh_bed[0].cut("edge1", "edge2")
    train(job, 20)
    wait(lambda: lost not in ssh_bed[0].pids("edge2"), "the end of the rank that is given up")
    check_survivors(job, "edge1", "edge3", "edge4")
    assert "edge2: the others went on without" in logs(job)
    assert ("edge1", "edge2", "cut", "") in link_states(job)["edge3"]
    assert [e["reason"] for e in events(job, "detour_failed")["edge3"]] == ["edge1 may not set routes"]
    assert (detours(ssh_bed, "edge1"), forwards(ssh_bed, "edge3")) == before


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv (util-linux), which takes rights away")
def test_one_end_is_given_up_where_routes_may_not_be_set(ssh_bed: Bed, launched: Start, remote_python: str) -> None:
    wrapper = Path(remote_python)
    rights = "setpriv --bounding-set -net_admin --inh-caps -net_admin"
    wrapper.write_text(wrapper.read_text().replace("exec ", f"exec {rights} "))
    job = launched(ENDLESS, HOSTS)
    train(job)
    lost = pid_of(job, "edge2")
    ssh_bed[0].cut("edge1", "edge2")
    train(job, 20)
    wait(lambda: lost not in ssh_bed[0].pids("edge2"), "the end of the rank that is given up")
    check_survivors(job, "edge1", "edge3")
    reasons = [event["reason"] for event in events(job, "detour_failed")["edge3"]]
    assert reasons and set(reasons) <= {"edge3 cannot pass it on", "edge1 may not set routes"}, reasons
    # Which host finds out first that it has no rights is a matter of milliseconds.
    lines = ("edge3 cannot pass on what others send round a cut link", "edge1 cannot go round the cut link to edge2")
    assert any(line in job.output() for line in lines), job.output()
    assert "edge2: the others went on without" in logs(job)


def test_a_link_is_not_used_by_order(launched: Start, ssh_bed: Bed) -> None:
    job = launched(ENDLESS, HOSTS)
    train(job)
    refused = chaosctl(job, "link", "down", "edge1", "edge9")
    assert (refused.returncode, "there is no host edge9 in the job" in refused.stderr) == (1, True), refused
    assert chaosctl(job, "link", "down", "edge2", "edge1").returncode == 0
    job.wait_until(all_have_heard(job, ("edge1", "edge2", "detour", "edge3")), "the detour")
    train(job, 20)
    assert len(detours(ssh_bed, "edge1")) == len(detours(ssh_bed, "edge2")) == 1
    job.wait_until(lambda: "ms" in chaosctl(job, "link").stdout, "round-trip times")
    shown = chaosctl(job, "link").stdout.splitlines()
    assert [line.partition(",")[0] for line in shown] == [
        "edge1 - edge2: detour over edge3", "edge1 - edge3: up", "edge2 - edge3: up",
    ], shown  # fmt: skip
    assert "link edge1 - edge2: detour over edge3" in chaosctl(job, "status").stdout
    assert chaosctl(job, "link", "up", "edge1", "edge2").returncode == 0
    job.wait_until(all_have_heard(job, ("edge1", "edge2", "up", "")), "the link to be used again")
    check_survivors(job, "edge1", "edge2", "edge3")
    assert not any(events(job, "failure_detected").values())
