"""Lists of hosts: how they are written, and which of them can be used. Pure.

A list has one ``host:slots`` a line; empty lines and what follows a ``#`` are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from chaos_mpi.agent.hosts import host_name
from chaos_mpi.errors import ConfigError
from chaos_mpi.membership import HostSlots


def parse_hosts(text: str, source: str, *, for_ssh: bool = False) -> tuple[HostSlots, ...]:
    """The hosts in ``text``, in its order.

    Args:
        text: the list.
        source: where it is from, for messages.
        for_ssh: whether ranks are to be started there by ssh; else this machine may have other names, ``fe80::1`` say.

    Raises:
        ConfigError: a line cannot be understood; names source and line.
    """
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        host, colon, slots = entry.rpartition(":")
        host, slots = host.strip(), slots.strip()
        where = f"{source}, line {number}"
        if not colon or not host or any(character.isspace() for character in host):
            raise ConfigError(f"{where}: {entry!r} is not of the form host:slots")
        if not (slots.isascii() and slots.isdecimal()):
            raise ConfigError(f"{where}: {slots!r} is not a number of slots (in {entry!r})")
        if for_ssh:
            host_name(host, where)
        if host in found:
            raise ConfigError(f"{where}: the host {host} is named a second time")
        found[host] = int(slots)
    return tuple(HostSlots(host, slots) for host, slots in found.items())


def split_usable(
    entries: Iterable[HostSlots], names: Collection[str], own_name: str
) -> tuple[tuple[HostSlots, ...], tuple[HostSlots, ...]]:
    """The hosts on which ranks can be started, and the others.

    Only this machine can be used. All its names count as one host, which is called as in member ids.

    Args:
        entries: a list of hosts.
        names: the names and addresses of this machine.
        own_name: the one that is in member ids.
    """
    entries = tuple(entries)
    here = [entry.slots for entry in entries if entry.host in names]
    usable = (HostSlots(own_name, sum(here)),) if here else ()
    return usable, tuple(entry for entry in entries if entry.host not in names)
