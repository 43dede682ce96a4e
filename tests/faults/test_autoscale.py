"""The size of a job follows the machines that there are, as a file or a script says."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_points import Rule
from jobs import Job, start_training
from problem import Problem
from test_membership_changes import FIRST, check_changes, rule, until_ready

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]


def options(source: Path) -> list[str]:
    """Those of chaosrun."""
    return ["--hosts-from", str(source), "--discovery-interval", "0.1"]


def write(path: Path, text: str) -> Path:
    """Write a list of hosts, whole."""
    new = path.with_name("hosts-new")
    new.write_text(text)
    return new.replace(path)


def until_observed(slots: int, step: int, rank: int = 0) -> list[Rule]:
    """``rank``, which looks for hosts, holds the others up after ``step`` until it has found so many slots."""
    return [
        rule(rank, f"members:observe {slots}"),
        rule(rank, "boundary", None, f"members:observe {slots}.{rank}", step=step),
    ]


def await_mark(job: Job, mark: str) -> None:
    """Wait until a process of the job has left a mark."""
    path = job.folder / f"mark-{mark}"
    job.wait_until(path.exists, f"{mark} was reached")


def test_the_file_names_more_slots(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=40)
    hosts = write(tmp_path / "hosts", "localhost:2\n")
    rules = [*until_observed(2, step=3), *until_observed(3, step=6), *until_ready(step=15)]
    with start_training(tmp_path, problem, rules, options=options(hosts)) as job:
        await_mark(job, "members:observe_2.0")
        write(hosts, "localhost:3\n")
        finished = job.finish()
        steps = check_changes(finished, problem, joined=[FIRST])
    assert len(steps[max(steps)]) == 3
    assert {tuple(e["hosts"].values()) for e in finished.events("hosts_changed")} == {(2,), (3,)}


def test_the_file_names_fewer_slots(tmp_path: Path) -> None:
    problem = Problem(ranks=3, epochs=6)
    hosts = write(tmp_path / "hosts", "localhost:3\n")
    rules = [*until_observed(3, step=3), *until_observed(2, step=6)]
    with start_training(tmp_path, problem, rules, options=options(hosts)) as job:
        await_mark(job, "members:observe_3.0")
        write(hosts, "localhost:2\n")
        finished = job.finish()
        check_changes(finished, problem, left={2})
    assert not finished.events("failure_detected")


def test_min_ranks_stay_when_all_slots_are_gone(tmp_path: Path) -> None:
    problem = Problem(ranks=3, epochs=6)
    hosts = write(tmp_path / "hosts", "localhost:3\n")
    rules = [*until_observed(3, step=3), *until_observed(0, step=6)]
    with start_training(tmp_path, problem, rules, options=[*options(hosts), "--min-ranks", "2"]) as job:
        await_mark(job, "members:observe_3.0")
        write(hosts, "elsewhere:3\n")
        finished = job.finish()
        check_changes(finished, problem, left={2})


def test_a_script_says_what_there_is(tmp_path: Path) -> None:
    problem = Problem(ranks=2, epochs=40)
    script = tmp_path / "discover"
    script.write_text("#!/bin/sh\necho localhost:3\necho elsewhere.example:5\n")
    script.chmod(0o755)
    rules = [*until_observed(3, step=3), *until_ready(step=12)]
    with start_training(tmp_path, problem, rules, options=options(script)) as job:
        finished = job.finish()
        check_changes(finished, problem, joined=[FIRST])
    warnings = [line for line in finished.output.splitlines() if "elsewhere.example" in line]
    assert len(warnings) == 1, warnings
    assert "elsewhere.example is another machine; its 5 slots" in warnings[0]


def test_rank_0_dies_and_the_next_one_looks_for_hosts(tmp_path: Path) -> None:
    problem = Problem(ranks=3, epochs=40)
    hosts = write(tmp_path / "hosts", "localhost:3\n")
    rules = [
        *until_observed(3, step=3), rule(0, "forward", "die", step=6),
        # Its slot is free, so that another one is started; and after that there are fewer.
        *until_ready(rank=1, step=15), rule(FIRST, "newcomer:enter_view"), *until_observed(2, step=60, rank=1),
    ]  # fmt: skip
    with start_training(tmp_path, problem, rules, options=options(hosts)) as job:
        await_mark(job, f"newcomer:enter_view.{FIRST}")
        write(hosts, "localhost:2\n")
        finished = job.finish()
        check_changes(finished, problem, dead={0}, joined=[FIRST], left={FIRST})
