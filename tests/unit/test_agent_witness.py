"""The process of a witness: it belongs to the one that has started it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos_mpi.agent.exchange import posted
from chaos_mpi.agent.guard import Settings
from chaos_mpi.agent.processes import start_time
from chaos_mpi.cli import witness
from chaos_mpi.monitor.cluster import Timing

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0
SETTINGS = Settings("", False, Timing(), "127.0.0.0/8", detours=False)
#: Has a witness for a job in the directory of its first argument, until it is killed.
OWNER = """
import sys, time
from pathlib import Path
from chaos_mpi.agent.guard import Settings
from chaos_mpi.cli import witness
from chaos_mpi.monitor.cluster import Timing
with witness.running(Path(sys.argv[1]), Settings("", False, Timing(), "127.0.0.0/8", detours=False)):
    time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which processes that are started here are to use."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def wait(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_it_is_there_as_long_as_it_is_wanted(tmp_path: Path) -> None:
    with witness.running(tmp_path, SETTINGS) as name:
        wait(lambda: list(posted(tmp_path)))
        (entry,) = posted(tmp_path)
        assert entry.contact.member == name
        assert (entry.contact.host, entry.first_size) == ("", None)
        assert entry.is_there
    assert not entry.is_there


def test_it_ends_with_its_owner_whatever_kills_that(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)]) as owner:
        try:
            wait(lambda: list(posted(tmp_path)))
            (entry,) = posted(tmp_path)
        finally:
            owner.send_signal(signal.SIGKILL)
    wait(lambda: not start_time(entry.pid))


def test_one_that_cannot_take_part_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with witness.running(tmp_path, Settings("", False, Timing(), "no-such-interface")) as name:
        pid = int(name.rpartition(":")[2])
        wait(lambda: not start_time(pid))
    said = capfd.readouterr().err
    assert "chaosrun: this host has no vote in the job: no address of" in said
    assert not list(posted(tmp_path))
