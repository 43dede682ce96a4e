"""Which hosts a job is to run on: ``--hosts`` and host files as Open MPI writes them. Pure.

See the Open MPI manual, "Scheduling processes across hosts". Where a host is named without a number of slots, it
gets one for each time that it is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from chaos_mpi.errors import ConfigError

_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_COUNT = re.compile(r"[0-9]{1,5}")


class Host(NamedTuple):
    """A host as ssh knows it, with or without ``user@``.

    Attributes:
        host: its name.
        slots: how many ranks are to start there.
        max_slots: how many may be there at most; None: no limit.
    """

    host: str
    slots: int
    max_slots: int | None = None


def parse_host_list(text: str, source: str = "--hosts") -> tuple[Host, ...]:
    """The hosts in a list such as ``edge1:1,edge2:2,edge3``.

    Args:
        text: the list.
        source: where it is from, for messages.

    Raises:
        ConfigError: it cannot be understood; says which entry.
    """
    found = []
    for entry in text.split(","):
        name, colon, slots = entry.strip().partition(":")
        where = f"{source}: {entry.strip()!r}"
        if not entry.strip():
            raise ConfigError(f"{source}: a host is missing in {text!r}")
        found.append(Host(host_name(name, where), _count(slots, "slots", where) if colon else 1))
    return _merged(found, source)


def parse_hostfile(text: str, source: str) -> tuple[Host, ...]:
    """The hosts in a host file: lines such as ``edge2 slots=2 max-slots=4``; ``#`` begins a comment.

    Args:
        text: the content of the file.
        source: its name, for messages.

    Raises:
        ConfigError: a line cannot be understood; names file and line.
    """
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        where = f"{source}, line {number}"
        name, *settings = re.sub(r"\s*=\s*", "=", entry).split()
        if ":" in name:
            raise ConfigError(f"{where}: in a host file it is 'HOST slots=N', not {name!r}")
        host = host_name(name, where)
        counts: dict[str, int] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            key = key.replace("-", "_")
            if key not in ("slots", "max_slots") or not equals:
                raise ConfigError(f"{where}: {setting!r} is not understood; there are slots=N and max-slots=N")
            if key in counts:
                raise ConfigError(f"{where}: {key} is given twice")
            counts[key] = _count(value, key, where)
        most = counts.get("max_slots")
        slots = counts.get("slots", 1)
        if most is not None and most < slots:
            raise ConfigError(f"{where}: max-slots={most} is less than the number of slots, {slots}")
        found.append(Host(host, slots, most))
    if not found:
        raise ConfigError(f"{source} names no host")
    return _merged(found, source)


def place(hosts: Sequence[Host], ranks: int | None = None) -> tuple[str, ...]:
    """The host of each rank: hosts are filled in their order.

    Args:
        hosts: what there is.
        ranks: how many ranks; default: one for each slot.

    Raises:
        ConfigError: there are fewer slots.
    """
    slots = [host.host for host in hosts for _ in range(host.slots)]
    wanted = len(slots) if ranks is None else ranks
    if wanted > len(slots):
        raise ConfigError(
            f"{wanted} ranks need as many slots, but {_listed(hosts)} have {len(slots)}: give a host more of them, "
            "as in edge1:2"
        )
    return tuple(slots[:wanted])


def host_name(name: str, where: str) -> str:
    """The name of a host for ssh, as it is given.

    Args:
        name: the name, with or without ``user@``.
        where: it is from, for messages.

    Raises:
        ConfigError: it cannot be one: agents would not take it for a part of a member's name, or ssh for an option.
    """
    if name.startswith(("^", "+")):
        raise ConfigError(f"{where}: {name[0]!r} in front of a host, which leaves hosts out or counts them, has no use")
    if not _HOST.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is not the name of a host")
    return name


def _merged(found: Iterable[Host], source: str) -> tuple[Host, ...]:
    """Each host once; slots of one that is named several times add up, as in Open MPI."""
    merged: dict[str, Host] = {}
    for host in found:
        before = merged.get(host.host)
        if before is None:
            merged[host.host] = host
            continue
        if before.max_slots != host.max_slots:
            raise ConfigError(f"{source}: {host.host} has max-slots in one place, and others or none in another")
        merged[host.host] = before._replace(slots=before.slots + host.slots)
        if host.max_slots is not None and merged[host.host].slots > host.max_slots:
            raise ConfigError(f"{source}: {host.host} has more slots than max-slots={host.max_slots}, taken together")
    return tuple(merged.values())


def _count(text: str, what: str, where: str) -> int:
    if not _COUNT.fullmatch(text) or int(text) == 0:
        raise ConfigError(f"{where}: {what} is a number from 1, not {text!r}")
    return int(text)


def _listed(hosts: Sequence[Host]) -> str:
    return ", ".join(f"{host.host}:{host.slots}" for host in hosts)
