"""Of which processes a job's private directory is, and whether any of them still lives.

Files there that are named ``<kind>-<pid>.json`` were written by the process with that number, and most say when that
was started. Those of the launcher and of supervisors also say where it is: several machines, or containers, may share
their directory for temporary files, and what is no process here may be one there.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from chaos_mpi.agent.processes import is_running, start_time

#: Files of these kinds say where their process is.
OWNERS = ("launcher", "supervisor")
#: Tells machines of one name apart, as many have that nobody has named; outlasts a restart (machine-id(5)).
MACHINE_ID = Path("/etc/machine-id")


def started() -> dict[str, Any]:
    """What tells this process from a later one with its number."""
    return {"started": start_time(os.getpid()), "namespace": namespace()}


def namespace() -> int:
    """Which processes go by the numbers that this one knows them by: in a container they may have others."""
    return os.stat("/proc/self/ns/pid").st_ino


def here() -> dict[str, Any]:
    """Where processes are known by the numbers that they have for this one."""
    try:
        machine = MACHINE_ID.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # there is none in many containers
        machine = ""
    return {"host": socket.gethostname(), "machine": machine, "namespace": namespace()}


def may_live(path: Path) -> bool:
    """Whether the process that has written a file in the directory of a job may still run; it is, or was, here."""
    number = path.stem.rpartition("-")[2]
    if not number.isdigit():
        return False
    fields = _fields(path)
    # The registry of proxies has the start as the last one of a list.
    began = fields.get("started") if isinstance(fields, dict) else fields[-1] if isinstance(fields, list) else None
    return runs(int(number), began)


def runs(pid: int, began: object) -> bool:
    """Whether the process that has written a file here still runs: another one may have got its number since.

    Args:
        pid: its number.
        began: when it was started, as the file says; the number alone counts where it does not.
    """
    return is_running(pid, began) if isinstance(began, int) else start_time(pid) != 0


def has_owner(directory: Path) -> bool:
    """Whether the launcher, or a supervisor, of a job's directory may still run; it is, or was, here."""
    return any(may_live(path) for kind in OWNERS for path in directory.glob(f"{kind}-*.json"))


def is_left_over(directory: Path) -> bool:
    """Whether all processes of a job's directory were here, and are gone. False if it is not certain."""
    owners = [path for kind in OWNERS for path in directory.glob(f"{kind}-*.json")]
    where = here()
    if not owners or any(not _says(_fields(path), where) for path in owners):
        return False
    return not any(may_live(path) for path in directory.glob("*-*.json"))


def _fields(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _says(fields: Any, where: dict[str, Any]) -> bool:
    return isinstance(fields, dict) and fields.items() >= where.items()
