"""What tests over ssh need: a bed of three hosts with an ssh server in each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.testbed import sshd, testbed
from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed

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
    script.write_text(f'#!/bin/sh\nTMPDIR={temporary} PYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def launcher_directory(tmp_path: Path) -> Path:
    """A directory that is empty in the hosts, whatever is in it here."""
    made = tmp_path / "launcher"
    made.mkdir()
    return made


@pytest.fixture
def ssh_bed(ssh_reason: str | None, tmp_path: Path, launcher_directory: Path) -> Iterator[tuple[TestBed, SshServers]]:
    """Three hosts, and how to get to them."""
    if ssh_reason is not None:
        pytest.skip(f"no ssh to hosts of a test bed can be had here: {ssh_reason}")
    keys = tmp_path / "keys"
    keys.mkdir()
    with (
        TestBed(["edge1", "edge2", "edge3"], rate_mbit=None) as bed,
        SshServers(bed, keys, ("/dev/shm", str(launcher_directory))) as servers,
    ):
        yield bed, servers
