"""How chaosrun waits for the end of ``mpirun``: another program is in its place, and the ranks are records only."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos_mpi.agent.processes import start_time
from chaos_mpi.cli import process
from chaos_mpi.cli.process import MpirunJob


@pytest.fixture
def other() -> Iterator[dict[str, Any]]:
    """The number of a process that lives, and when it was started."""
    with subprocess.Popen(["sleep", "60"]) as living:
        yield {"pid": living.pid, "started": start_time(living.pid)}
        living.kill()


def note(directory: Path, kind: str, pid: int, **fields: Any) -> None:
    (directory / f"{kind}-{pid}.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("kinds", [("member",), ("starting", "connected")])
@pytest.mark.parametrize("is_rank", [True, False])
def test_a_number_that_another_process_has_now_is_no_rank(
    kinds: tuple[str, ...], is_rank: bool, tmp_path: Path, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for mpirun ends by itself if it is waited for."""
    monkeypatch.setattr(process, "LEFT_ALONE_S", 0.1)
    for kind in kinds:
        note(tmp_path, kind, other["pid"], started=other["started"] - (0 if is_rank else 1))
    job = MpirunJob(["sleep", "3"], {}, tmp_path, ranks=1, tagged=False, drop_noise=False)
    assert job.wait() == (0 if is_rank else -signal.SIGKILL)
