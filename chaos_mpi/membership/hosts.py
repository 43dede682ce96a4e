"""The machines that there are, as all members have agreed on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self


class HostSlots(NamedTuple):
    """A machine, and how many ranks it has room for."""

    host: str
    slots: int


@dataclass(frozen=True, slots=True)
class HostList:
    """The machines that ranks may run on.

    Attributes:
        entries: each machine once, in the order in which they are filled.
        started: how many joins a scaling policy has started on each machine since the entries last changed.
    """

    entries: tuple[HostSlots, ...] = ()
    started: tuple[HostSlots, ...] = ()

    def with_started(self, hosts: Iterable[str]) -> Self:
        """The same after one more join was started on each of these."""
        counts = dict(self.started)
        for host in hosts:
            counts[host] = counts.get(host, 0) + 1
        return type(self)(self.entries, tuple(HostSlots(*item) for item in sorted(counts.items())))

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return {"entries": [list(entry) for entry in self.entries], "started": [list(entry) for entry in self.started]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        return cls(as_entries(fields["entries"]), as_entries(fields["started"]))


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
