"""What people and monitoring see of a running job, on a real one that loses ranks and gains one."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from jobs import Job, clean_environment, start_training
from problem import Problem

from chaos_mpi.cli.status import look

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120, method="signal")]

#: Until it is told to stop.
ENDLESS = Problem(ranks=2, epochs=10_000, pause_s=0.01)


def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """A chaosctl command for the job in ``folder``, and its environment."""
    environment = {**clean_environment(), "TMPDIR": str(folder / "t"), "COLUMNS": "200"}
    return [sys.executable, "-m", "chaos_mpi.cli.chaosctl", *arguments], environment


def ctl(folder: Path, *arguments: str) -> str:
    """What chaosctl prints."""
    line, environment = command(folder, *arguments)
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(url: str) -> dict[str, float]:
    """The metrics of a job by name, and by the member or the cause that they are of."""
    with urllib.request.urlopen(url, timeout=20) as response:
        text = response.read().decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        " ".join([sample.name, *(sample.labels[of] for of in ("member", "cause") if of in sample.labels)]): sample.value
        for sample in found
    }


def metrics_after(job: Job, url: str, recoveries: int) -> dict[str, float]:
    """The metrics once they tell of so many recoveries: a scrape soon after another is answered as that one was."""

    def told() -> bool:
        now = metrics(url)
        return now["chaos_mpi_recoveries_total"] == recoveries and "chaos_mpi_stalled_seconds_total failure" in now

    job.wait_until(told, f"the metrics told of recovery {recoveries}")
    return metrics(url)


def await_members(job: Job, directory: Path, members: list[str]) -> None:
    """Wait until these are the members, and all of them answer."""

    def settled() -> bool:
        seen = look(directory)
        return seen is not None and seen["members"] == members and all(r["process"] for r in seen["ranks"])

    job.wait_until(settled, f"{members} were the members")


def test_a_job_that_loses_ranks_and_gains_one_is_shown_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    environment = {"TMPDIR": str(tmp_path / "t")}
    options = ["--metrics-port", "0"]
    with start_training(tmp_path, ENDLESS, options=options, environment=environment, limit_s=100) as job:
        job.wait_until(lambda: job.steps_finished() > 2, "the first steps")
        (directory,) = (path for path in (tmp_path / "t").glob("chaosrun-*") if path.is_dir())
        first, second = (look(directory) or {})["members"]
        url = next(line for line in job.output().splitlines() if "metrics at" in line).split()[-1]
        job.wait_until(lambda: (look(directory) or {})["steps_per_s"] is not None, "the speed was known")

        before = metrics(url)
        assert (before["chaos_mpi_members"], before["chaos_mpi_epoch"], before["chaos_mpi_deaths_total"]) == (2, 0, 0)
        assert before["chaos_mpi_steps_per_second"] > 0
        assert before[f"chaos_mpi_member_up {first}"] == before[f"chaos_mpi_member_up {second}"] == 1
        assert before[f"chaos_mpi_member_resident_memory_bytes {second}"] > 1e7
        state = json.loads(ctl(tmp_path, "status", "--json"))
        assert [rank["member"] for rank in state["ranks"]] == state["members"] == [first, second]
        assert [rank["step"] > 0 for rank in state["ranks"]] == [True, True]
        assert [event["event"] for event in state["events"]] == ["session_started"] * 2

        line, following = command(tmp_path, "log", "-f")
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=following) as follower:
            job.kill(job.pid(1))
            await_members(job, directory, [first])
            after = metrics_after(job, url, 1)
            assert (after["chaos_mpi_members"], after["chaos_mpi_epoch"]) == (1, 1)
            assert (after["chaos_mpi_recoveries_total"], after["chaos_mpi_deaths_total"]) == (1, 1)
            assert after["chaos_mpi_stalled_seconds_total failure"] > 0
            assert f"chaos_mpi_member_up {second}" not in after
            assert after["chaos_mpi_step"] >= before["chaos_mpi_step"]

            newcomer = ctl(tmp_path, "add").splitlines()[-1].removesuffix(" takes part")
            await_members(job, directory, [first, newcomer])
            picture = ctl(tmp_path, "top", "--once")
            assert "2 members" in picture
            assert "deaths 1, joins 1, leaves 0" in picture
            pids = [member.rpartition(":")[2] for member in (first, newcomer)]
            assert [row.split()[0] for row in picture.splitlines() for pid in pids if f" {pid} " in row] == ["0", "1"]

            # The one that is left has seen the first death only in what it was told.
            job.kill(job.pid(0))
            await_members(job, directory, [newcomer])
            last = metrics_after(job, url, 2)
            assert (last["chaos_mpi_recoveries_total"], last["chaos_mpi_deaths_total"]) == (2, 2)
            assert last["chaos_mpi_joins_total"] == 1
            for name in after:
                if name.endswith("_total") or "stalled" in name:
                    assert last[name] >= after[name], name
            log = ctl(tmp_path, "log")
            assert f"{first} died; 1 rank is left" in log
            assert f"{newcomer} contributes" in log
            assert ctl(tmp_path, "log", "-n", "1") in log
            assert ctl(tmp_path, "log", "--member", "0") == log, "it is the only one that is left"

            (tmp_path / "stop").touch()
            assert job.finish().status == 0
            told, _ = follower.communicate(timeout=30)
    texts = [entry.partition("  step ")[2].strip().partition("  ")[2] for entry in told.splitlines()]
    assert texts[0] == "training started with 2 ranks"
    for words in (f"{second} died; 1 rank is left", f"{newcomer} joined; 2 ranks train on", f"{first} died"):
        assert sum(text.startswith(words) for text in texts) == 1, told
    assert any(text.startswith("finished") for text in texts), told
    assert told.splitlines()[-1] == "the job has ended"
