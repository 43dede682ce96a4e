"""The size of a job follows the machines that there are, as a file or a script says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fault_points import Rule
from jobs import Finished, Job, start_training
from problem import Problem
from test_membership_changes import FIRST, SECOND, check_changes, until_ready

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]

OFTEN = ("--discovery-interval", "0.1")


def write_hosts(path: Path, text: str) -> Path:
    """Write a list of hosts, whole."""
    new = path.with_name("new-hosts")
    new.write_text(text)
    return new.replace(path)


def hold(rank: int, step: int, mark: str) -> Rule:
    """``rank`` stops at the end of a step until the test has left the mark."""
    return {"rank": rank, "at": "boundary", "step": step, "wait": [mark]}


def release(job: Job, mark: str) -> None:
    """Let a rank that waits for ``mark`` go on."""
    (job.folder / f"mark-{mark}").touch()
