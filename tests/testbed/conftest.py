"""What tests over ssh need: a bed of three hosts with an ssh server in each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.testbed import sshd, testbed
from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed

sys.path.insert(0, str(Path(__file__).parent))

from host_jobs import Bed, Job, Problem, Start, start_on_hosts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ssh_reason() -> str | None:
    """Why there can be no ssh to hosts of a bed here; None: there can."""
    return testbed.why_not() or sshd.why_not()


@pytest.fixture
def remote_python(tmp_path: Path) -> str:
    """What ``--remote-python`` names in a host: this Python, this package, and where temporary files go."""
    script, temporary = tmp_path / "python", tmp_path / "tmp"
    temporary.mkdir()
    script.write_text(
        f'#!/bin/sh\nTMPDIR={temporary} PYTHONPATH={ROOT}:{ROOT}/tests/faults exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def launcher_directory(tmp_path: Path) -> Path:
    """A directory that is empty in the hosts, whatever is in it here."""
    made = tmp_path / "launcher"
    made.mkdir()
    return made


@pytest.fixture
def ssh_bed(
    ssh_reason: str | None, tmp_path: Path, launcher_directory: Path, request: pytest.FixtureRequest
) -> Iterator[Bed]:
    """Hosts edge1, edge2 and so on, and how to get to them: three, or as many as the marker ``hosts`` says."""
    marker = request.node.get_closest_marker("hosts")
    number = marker.args[0] if marker is not None else 3
    if ssh_reason is not None:
        pytest.skip(f"no ssh to hosts of a test bed can be had here: {ssh_reason}")
    keys = tmp_path / "keys"
    keys.mkdir()
    with (
        TestBed([f"edge{i}" for i in range(1, number + 1)], rate_mbit=None) as bed,
        SshServers(bed, keys, ("/dev/shm", str(launcher_directory))) as servers,
    ):
        yield bed, servers


@pytest.fixture
def launched(ssh_bed: Bed, tmp_path: Path, remote_python: str) -> Iterator[Start]:
    """Starts a job on hosts of the bed."""
    with contextlib.ExitStack() as stack:

        def make(problem: Problem, hosts: str, *options: str, **how: Any) -> Job:
            job = start_on_hosts(ssh_bed, tmp_path, remote_python, problem, "--hosts", hosts, *options, **how)
            return stack.enter_context(job)

        yield make
