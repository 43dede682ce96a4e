"""The machines that there are, as all members have agreed on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self


class HostSlots(NamedTuple):
    """A machine, and how many ranks it has room for."""

    host: str
    slots: int


#: A number for each of some machines, by name.
Counts = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class HostList:
    """The machines that ranks may run on.

    Attributes:
        entries: each machine once, in the order in which they are filled.
        started: how many joins a scaling policy has started on each machine since the entries last changed.
        failed: how many joins on each machine were given up since then.
    """

    entries: tuple[HostSlots, ...] = ()
    started: Counts = ()
    failed: Counts = ()

    def with_started(self, hosts: Iterable[str]) -> Self:
        """The same after one more join was started on each of these."""
        return replace(self, started=_counted(self.started, hosts))

    def with_failed(self, hosts: Iterable[str]) -> Self:
        """The same after one more join was given up on each of these."""
        return replace(self, failed=_counted(self.failed, hosts))

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return {name: [list(pair) for pair in getattr(self, name)] for name in ("entries", "started", "failed")}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        started, failed = (tuple((host, number) for host, number in fields[name]) for name in ("started", "failed"))
        return cls(as_entries(fields["entries"]), started, failed)


def as_entries(pairs: Iterable[Sequence[Any]]) -> tuple[HostSlots, ...]:
    """Entries from pairs of host and slots, as JSON gives them."""
    return tuple(HostSlots(str(host), int(slots)) for host, slots in pairs)


def newest(agreed: HostList | None, observed: Iterable[tuple[HostSlots, ...]]) -> HostList | None:
    """The list from here on: the first that was observed since, of the lowest rank that proposed one.

    No clock has a say: observations that are made one after the other are also agreed on one after the other.
    """
    for entries in observed:
        return agreed if agreed is not None and agreed.entries == entries else HostList(entries)
    return agreed


def host_of(member: str) -> str:
    """The machine in a member id (``host:pid``)."""
    return member.rpartition(":")[0]


def on_host(members: Iterable[str], host: str) -> list[str]:
    """Those of these members that are on one machine, in their order."""
    return [member for member in members if host_of(member) == host]


def _counted(counts: Counts, hosts: Iterable[str]) -> Counts:
    new = Counter(dict(counts))
    new.update(hosts)
    return tuple(sorted(new.items()))
