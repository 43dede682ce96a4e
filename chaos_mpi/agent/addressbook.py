"""Whom an agent knows, how they are reached, and for how long those that are out can still be spoken to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.losses import Losses
from chaos_mpi.agent.network import Network
from chaos_mpi.agent.talk import CONTACTS, WHO
from chaos_mpi.monitor.cluster import ClusterView

#: How long a member that has ended and is out can still be spoken to.
_FAREWELL_S = 5.0
#: The same for one that may be paused, and does not know that it is out.
_FAREWELL_PAUSED_S = 600.0


class AddressBook:
    """The contacts of one agent.

    Args:
        me: how this agent is reached.
        network: is told of each of them.
        losses: is told when they were first heard of.
    """

    def __init__(self, me: Contact, network: Network, losses: Losses) -> None:
        self._me, self._network, self._losses = me, network, losses
        self._contacts = {me.member: me}
        self._asked_s = 0.0
        self._forget_s: dict[str, float] = {}
        self._forgotten: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._contacts)

    @property
    def contacts(self) -> Mapping[str, Contact]:
        """All of them, by member."""
        return MappingProxyType(self._contacts)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The addresses of all other hosts that are known."""
        here = set(self._me.addresses)
        return tuple(sorted({a for contact in self._contacts.values() for a in contact.addresses} - here))

    def know(self, contacts: Iterable[Contact], out: Collection[str], now_s: float) -> None:
        """Take note of these, other than of members that are out. What is known already stays.

        Those that were forgotten are not known again: a name is never used twice, and a proxy tells its agent again and
        again of all that the job has ever had.
        """
        out = self._forgotten.union(out)
        for contact in contacts:
            if contact.member not in self._contacts and contact.member not in out:
                self._network.know(contact)
                self._contacts[contact.member] = contact
                self._losses.heard(contact.member, now_s)

    def ask_for_missing(self, view: ClusterView, ended: Collection[str], now_s: float, every_s: float) -> None:
        """Ask all members for those unknown: a newcomer may be admitted before this agent is told how to reach it."""
        unknown = [node.name for node in view.members if node.name not in self._contacts and node.name not in ended]
        if unknown and now_s - self._asked_s >= every_s:
            self._asked_s = now_s
            for node in view.members:
                self._network.send(node.name, {"kind": WHO, "members": unknown})

    def answer(self, sender: str, members: Iterable[str]) -> None:
        """Tell the sender how to reach these members, as far as it is known."""
        known = [self._contacts[name].to_json() for name in members if name in self._contacts]
        self._network.send(sender, {"kind": CONTACTS, "contacts": known})

    def part_with(self, removed: Iterable[str], ended: Collection[str], now_s: float) -> None:
        """These are members no more; they are spoken to a little longer, for the news: much longer if only paused."""
        for member in removed:
            self._forget_s[member] = now_s + (_FAREWELL_S if member in ended else _FAREWELL_PAUSED_S)

    def forget_those_out(
        self, view: ClusterView, ended: Collection[str], disowned: Collection[str], now_s: float
    ) -> None:
        """Forget those whose time is over. It begins for those as well that never became members, or of whose removal
        this agent was only told.

        Args:
            view: the present one.
            ended: whose ranks have ended by themselves.
            disowned: whose ranks are dead to MPI.
            now_s: the time.
        """
        members = {node.name for node in view.members}
        out = {node.name for node in view.removed}.union(ended, disowned) - members
        self.part_with(out & self._contacts.keys() - self._forget_s.keys(), ended, now_s)
        for name in [name for name, at_s in self._forget_s.items() if at_s <= now_s]:
            del self._forget_s[name]
            if name in members:  # it was admitted when it had ended already, and has a vote until it is out
                continue
            self._contacts.pop(name, None)
            self._forgotten.add(name)
            self._losses.forget(name)
            self._network.forget(name)
