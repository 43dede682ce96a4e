"""How many ranks a job starts with when a list of hosts says what there is."""

from __future__ import annotations

import os
from pathlib import Path

from chaos_mpi.autoscale.discovery import read_hosts, usable_hosts
from chaos_mpi.errors import ConfigError


def slots_here(source: Path, *, for_ssh: bool = False) -> int:
    """The slots that the list gives to this machine.

    Args:
        source: a file with lines ``host:slots``, or a program that prints them.
        for_ssh: whether the job is one on several hosts, to which ssh leads.

    Raises:
        ConfigError: there is no such file or its list cannot be used.
    """
    if not os.path.exists(source):  # and no error where it may not be looked at
        raise ConfigError(f"there is no file {source}")
    usable, _ = usable_hosts(read_hosts(source, for_ssh=for_ssh))
    return sum(slots for _, slots in usable)


def initial_ranks(source: Path, min_ranks: int | None, max_ranks: int | None) -> int:
    """How many ranks to start with: as many as there are slots, within the limits.

    Raises:
        ConfigError: the list cannot be used, or there are too few slots.
    """
    slots = slots_here(source)
    least = min_ranks if min_ranks is not None else 1
    if slots < least:
        raise ConfigError(f"{source} has {slots} slots on this machine; {least} are needed to start")
    return slots if max_ranks is None else min(slots, max_ranks)
