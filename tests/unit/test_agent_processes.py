"""Processes by number, and when they were started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from chaos_mpi.agent.processes import is_running, start_time


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a) Z 1", b"k\xc3"])
def test_a_process_may_have_any_name(name: bytes) -> None:
    script = f"open('/proc/self/comm', 'wb').write({name!r}); print('up', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        before = start_time(process.pid)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert start_time(process.pid) == before != 0
        assert is_running(process.pid, before) and not is_running(process.pid, before - 1)
        process.kill()
    assert not is_running(process.pid, before)


def test_a_process_that_has_ended_and_was_not_waited_for_does_not_run() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert start_time(process.pid) == 0
