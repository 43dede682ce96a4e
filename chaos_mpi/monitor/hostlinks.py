"""Links between hosts, as opposed to those between the agents of which a host may have several. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from chaos_mpi.membership import host_of
from chaos_mpi.monitor.reachability import Diagnosis

#: States of a link.
CUT, DOWN, DETOUR, UP = "cut", "down", "detour", "up"

#: The names of two hosts, in order.
Ends = tuple[str, str]


class LinkStatus(NamedTuple):
    """How a link is: ``cut``, ``down`` (not to be used, by order), ``detour`` (over ``via``), ``up``.

    ``no_detour`` says why there is none; it is empty where none is needed, and while there is hope.
    """

    ends: Ends
    state: str
    via: str = ""
    no_detour: str = ""


class Order(NamedTuple):
    """What somebody has said of a link: the latest one counts.

    Attributes:
        at_s: when, in Unix seconds by the clock of the host where it was said.
        by: the member that was told.
        down: whether the link is not to be used.
    """

    at_s: float
    by: str
    down: bool


@dataclass(frozen=True, slots=True)
class Sight:
    """The hosts as one agent sees them.

    Attributes:
        members: all that are alive.
        speakers: for each host with any of them, the lowest.
        cut: pairs of hosts of which one does not hear the other, while others hear both.
        witness: the host of the agent without a rank; empty where there is none. Links to it need no healing.
    """

    members: tuple[str, ...]
    speakers: Mapping[str, str]
    cut: frozenset[Ends]
    witness: str = ""

    @property
    def hosts(self) -> set[str]:
        """The hosts that ranks talk between."""
        return set(self.speakers) - {self.witness}


def ends_of(one: str, other: str) -> Ends:
    """Two hosts, in order."""
    return (one, other) if one < other else (other, one)


def sight_of(diagnosis: Diagnosis, witness: str | None = None) -> Sight:
    """From what is thought of the members, of which one may have no rank, what is thought of their hosts."""
    members = tuple(sorted(node.name for node in diagnosis.alive))
    speakers: dict[str, str] = {}
    for member in members:
        speakers.setdefault(host_of(member), member)
    # Of a node that dies the others notice it one after the other; it is no link that is cut.
    hosts = (
        (host_of(one.name), host_of(other.name))
        for one, other in diagnosis.cut
        if diagnosis.uncertain.isdisjoint((one, other))
    )
    cut = frozenset(ends_of(*pair) for pair in hosts if pair[0] != pair[1])
    return Sight(members, speakers, cut, host_of(witness) if witness is not None else "")


def to_json(links: Iterable[LinkStatus]) -> list[dict[str, str]]:
    """As ranks are told of them."""
    return [
        {"a": link.ends[0], "b": link.ends[1], "state": link.state, "via": link.via, "no_detour": link.no_detour}
        for link in links
    ]
