"""Which hosts are wholly lost, so that connections with them may be severed. Pure: the time is told.

Several ranks can share a host, and another may be on its way in there. A host is given up when a member on it fell
silent and was removed, and nobody is left there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from chaos_mpi.agent.contacts import Contact

#: How long it is looked for whether a lost member's host is lost as well, seconds. Later its connections are over.
PENDING_S = 60.0


class Removal(NamedTuple):
    """Members that a new view leaves out.

    Attributes:
        members: their names; none where only a host is found to be lost.
        hosts: those of their hosts on which nobody is left, as ssh knows them.
        addresses: of these hosts.
    """

    members: tuple[str, ...]
    hosts: tuple[str, ...]
    addresses: tuple[str, ...]


class Losses:
    """What one agent knows of lost hosts.

    Args:
        fresh_s: a newcomer that was not heard for so long counts as lost.
    """

    def __init__(self, fresh_s: float) -> None:
        self._fresh_s = fresh_s
        self._heard_s: dict[str, float] = {}
        self._lost: dict[str, tuple[Contact, float]] = {}

    def heard(self, member: str, now_s: float) -> None:
        """Something came of this agent, or the first news of it."""
        self._heard_s[member] = now_s

    def lose(self, contact: Contact, now_s: float) -> None:
        """This one was removed, and had not ended by itself."""
        self._lost[contact.member] = (contact, now_s)

    def forget(self, member: str) -> None:
        """Nothing more will come of this agent."""
        self._heard_s.pop(member, None)

    def given_up(
        self, contacts: Mapping[str, Contact], present: Collection[str], out: Collection[str], now_s: float
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The hosts that are lost since the last call, by name, and the addresses that only they had.

        Args:
            contacts: all agents that are known.
            present: those that take part.
            out: those that do no more.
            now_s: the time.
        """
        if not self._lost:
            return (), ()
        left = [
            contact
            for name, contact in contacts.items()
            if name in present or (name not in out and now_s - self._heard_s.get(name, now_s) < self._fresh_s)
        ]
        hosts, addresses = gone_hosts([contact for contact, _ in self._lost.values()], left)
        self._lost = {
            name: (contact, at_s)
            for name, (contact, at_s) in self._lost.items()
            if contact.host not in hosts and now_s - at_s < PENDING_S
        }
        return hosts, addresses


def gone_hosts(lost: Iterable[Contact], left: Iterable[Contact]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The hosts of lost agents on which none is left, and the addresses that only they had.

    A host that has another name among those that are left is not gone: it shares all its addresses with that.
    """
    lost, left = list(lost), list(left)
    kept = {address for contact in left for address in contact.addresses}
    staying = {contact.host for contact in left}
    gone = {
        contact.host for contact in lost if contact.host not in staying and not kept.issuperset(contact.addresses)
    }  # fmt: skip
    addresses = {address for contact in lost if contact.host in gone for address in contact.addresses} - kept
    return tuple(sorted(gone)), tuple(sorted(addresses))
