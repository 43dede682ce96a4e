"""The witness that ``chaosrun`` runs beside ``mpirun``: see :mod:`chaos_mpi.agent.witness`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from chaos_mpi.agent.guard import Settings
from chaos_mpi.agent.witness import MODULE, name_of

#: It ends when it is told, but puts routes back; one that has not by then is killed.
_END_LIMIT_S = 3.0


@contextlib.contextmanager
def running(directory: Path, settings: Settings) -> Iterator[str]:
    """Have a witness as long as this lasts; gives its name among the agents.

    It ends with this process as well, whatever ends that, and if it does not come up the job does without it.

    Args:
        directory: the job's private directory on this host.
        settings: how the job is watched.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE], stdin=subprocess.PIPE, start_new_session=True, text=True
    )
    assert process.stdin is not None
    try:
        with contextlib.suppress(OSError):  # it has ended already, and has said why
            print(json.dumps({"directory": str(directory), "settings": settings.to_json()}), file=process.stdin)
            process.stdin.flush()
        yield name_of(process.pid)
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
