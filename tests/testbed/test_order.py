"""The order of the members follows the links: what is slow carries little. Skipped without root or ssh."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_jobs import Bed, chaosctl, events, there
from jobs import start

FOUR = "edge1,edge2,edge3,edge4"
#: A million parameters; enough steps for the links to be measured twice when one is slow, and for some more.
SCRIPT = ("../../launch/examples/train_lm.py", "--params", "1M", "--batch-size", "1", "--block-size", "16")


@pytest.mark.hosts(4)
def test_a_slow_link_is_left_out_of_the_allreduce(ssh_bed: Bed, tmp_path: Path, remote_python: str) -> None:
    """Between the first two ranks, where all of the gradients go, until the members are in another order."""
    (folder := tmp_path / "job").mkdir()
    how = there(ssh_bed, tmp_path, remote_python, "--hosts", FOUR)
    with start(SCRIPT[0], folder, *SCRIPT[1:], "--steps", "80", **how) as job:
        job.wait_until(lambda: len(events(job, "step")) >= 12, "steps of all ranks")
        ssh_bed[0].set_pair_rate("edge1", "edge2", 20.0)
        job.wait_until(lambda: len(events(job, "view_committed")) >= 4, "another order")
        committed = events(job, "view_committed")
        assert {event["cause"] for event in committed} == {"order"}
        assert len({tuple(event["members"]) for event in committed}) == 1
        order = [member.partition(":")[0] for member in committed[0]["members"]]
        # Of four, the first exchanges nothing with the last, nor the second with the third.
        assert order[0] == "edge1"
        assert order[3] == "edge2"
        assert len(events(job, "stalled")) == 4
        (shown,) = [line for line in chaosctl(job, "link").stdout.splitlines() if line.startswith("edge1 - edge2:")]
        assert "MB/s" in shown
        finished = job.finish()
    assert "finished after 80 steps, replicas bitwise identical" in finished.output
