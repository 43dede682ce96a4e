"""Scaling policies: how large the job is to be, given the machines that there are. Pure.

Every member evaluates the policy by itself on the same agreed inputs, so all reach the same decision. To add a policy,
write a class with the one method of :class:`ScalePolicy` and name it in :data:`POLICIES`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from chaos_mpi.membership import HostList, Limits, host_of

#: A host on which so many joins were given up is left alone until the list of hosts changes.
MAX_FAILED = 3
#: So is one whose slots were filled so often, since ranks that die again and again would go on doing so.
STARTS_PER_SLOT = 10


@dataclass(frozen=True, slots=True)
class ScaleInputs:
    """What a decision is made of; the same at every member.

    Attributes:
        members: ids of the members (``host:pid``), in rank order.
        joining: the machines of newcomers on their way; empty text for any machine.
        hosts: the machines that there are.
        limits: how small and how large the job may get.
    """

    members: tuple[str, ...]
    joining: tuple[str, ...]
    hosts: HostList
    limits: Limits


@dataclass(frozen=True, slots=True)
class Decision:
    """What the job is to do about its size.

    Attributes:
        joins: the machine of each rank that is to be started.
        leaves: members that are to go.
        exhausted: machines with free slots on which nothing is started any more, because it was in vain.
    """

    joins: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    exhausted: tuple[str, ...] = ()

    @property
    def changes_something(self) -> bool:
        """Whether a rank is to come or to go."""
        return bool(self.joins or self.leaves)


class ScalePolicy(Protocol):
    """A rule for the size of the job."""

    def decide(self, inputs: ScaleInputs) -> Decision:
        """What to do now; depends on nothing but ``inputs``, and is nothing once it is done."""


class Manual:
    """The size changes on request only."""

    def decide(self, inputs: ScaleInputs) -> Decision:
        """Nothing."""
        return Decision()


class Available:
    """As many ranks as there are slots, within the limits.

    Ranks are started where slots are free, hosts in the order of the list. Where there are more ranks than slots, the
    highest go: first those on hosts that have none, then the others.
    """

    def decide(self, inputs: ScaleInputs) -> Decision:
        """The ranks to start and those to let go."""
        slots = dict(inputs.hosts.entries)
        leaves = self._leaves(inputs, slots)
        joins, exhausted = self._joins(inputs, slots, staying=len(inputs.members) - len(leaves))
        return Decision(joins, leaves, exhausted)

    def _leaves(self, inputs: ScaleInputs, slots: dict[str, int]) -> tuple[str, ...]:
        may_go = max(0, len(inputs.members) - max(1, inputs.limits.min_ranks))
        there = Counter(host_of(member) for member in inputs.members)
        surplus: list[str] = []
        for member in reversed(inputs.members):
            host = host_of(member)
            if there[host] > slots.get(host, 0):
                there[host] -= 1
                surplus.append(member)
        surplus.sort(key=lambda member: slots.get(host_of(member), 0) > 0)  # stable: the highest ranks stay first
        going = set(surplus[:may_go])
        return tuple(member for member in inputs.members if member in going)

    def _joins(
        self, inputs: ScaleInputs, slots: dict[str, int], staying: int
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        taken = Counter(host_of(member) for member in inputs.members) + Counter(inputs.joining)
        anywhere = taken.pop("", 0)
        limit = inputs.limits.max_ranks
        room = sum(slots.values()) if limit is None else max(0, limit - staying - len(inputs.joining))
        started, failed = dict(inputs.hosts.started), dict(inputs.hosts.failed)
        joins: list[str] = []
        exhausted: list[str] = []
        for host, there in slots.items():
            free = max(0, there - taken[host])
            by_others = min(free, anywhere)
            anywhere -= by_others
            wanted = min(free - by_others, room - len(joins))
            allowed = max(0, STARTS_PER_SLOT * there - started.get(host, 0))
            if failed.get(host, 0) >= MAX_FAILED:
                allowed = 0
            joins += [host] * min(wanted, allowed)
            if wanted > allowed:
                exhausted.append(host)
        return tuple(joins), tuple(exhausted)


POLICIES: dict[str, type[Available] | type[Manual]] = {"available": Available, "manual": Manual}


def make_policy(name: str) -> ScalePolicy:
    """The policy of this name, one of :data:`POLICIES`."""
    return POLICIES[name]()
