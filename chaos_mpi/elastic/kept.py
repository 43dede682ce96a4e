"""Where the training state waits on each host while the job moves to another launcher: in memory that outlives ranks.

Every host has a copy of its own, so the state goes over no network. Without torch: the launcher names the place.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from chaos_mpi.agent.home import refuse_foreign
from chaos_mpi.errors import ChaosError, CheckpointError, ConfigError
from chaos_mpi.membership import host_of
from chaos_mpi.mpi.launch import SHM_DIRECTORY

log = logging.getLogger("chaos_mpi.elastic")

#: Tells a rank the name under which the state that it is to go on from is kept.
VARIABLE = "CHAOS_RESUME_FROM"
#: Tells launcher and ranks that the state is to come from a job that still runs: its private directory, where that is.
OLD_JOB = "CHAOS_TAKEOVER"
#: Room for what is not tensors, and for what else the machine does meanwhile, bytes.
SPARE_BYTES = 64 << 20
_NAME = re.compile(r"chaos-state-[0-9a-f]{16}")


def new_name() -> str:
    """A name that nobody can guess."""
    return f"chaos-state-{secrets.token_hex(8)}"


def places(name: str) -> list[Path]:
    """The directories that the state may be in on this host: shared memory first, then that for temporary files.

    Raises:
        ConfigError: :func:`new_name` has not made the name, which becomes part of a path.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a name under which a state can be kept")
    return [SHM_DIRECTORY / name, Path(tempfile.gettempdir()) / name]


def keepers(members: Iterable[str]) -> tuple[str, ...]:
    """One member of each host, the first, which keeps the state for all ranks there. Pure."""
    first: dict[str, str] = {}
    for member in members:
        first.setdefault(host_of(member), member)
    return tuple(first.values())


def keep(name: str, size_bytes: int, save: Callable[[Path], None]) -> Path:
    """Have the state saved on this host, in a directory that only its owner can enter.

    Args:
        name: of the state.
        size_bytes: of it.
        save: writes it into a directory.

    Returns:
        The directory.

    Raises:
        CheckpointError: no place can hold it; says why.
    """
    problems = []
    for place in places(name):
        try:
            _refuse_small(place.parent, size_bytes)
            place.mkdir(mode=0o700, exist_ok=True)
            refuse_foreign(place)
            save(place)
        except (ChaosError, OSError) as error:
            problems.append(f"{place.parent}: {error}")
            continue
        if problems:
            log.warning("the state is kept in %s, because it cannot be in %s", place, "; ".join(problems))
        return place
    raise CheckpointError(f"the state cannot be kept ({'; '.join(problems)})")


def found(name: str) -> list[Path]:
    """Directories on this host that hold the state, or should.

    Raises:
        EngineError: one was made by somebody else.
    """
    there = [place for place in places(name) if place.exists()]
    for place in there:
        refuse_foreign(place)
    return there


def remove(name: str) -> None:
    """Remove the state from this host."""
    for place in places(name):
        shutil.rmtree(place, ignore_errors=True)


def _refuse_small(directory: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if directory == SHM_DIRECTORY:  # it takes memory, and its size says nothing of how much there is
        free = min(free, psutil.virtual_memory().available)
    if free < size_bytes + SPARE_BYTES:
        raise CheckpointError(f"{free >> 20} MiB are free, and the state has {size_bytes >> 20} MiB")
