"""What a rank is told of the witness (:mod:`chaos_mpi.agent.witness`): whether the agent beside the rank hears it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.membership import host_of
from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.reachability import Diagnosis, pair

#: States: not heard, but still one of those who vote; heard (again); voted out, for good; or without need, because a
#: rank on its host votes.
SILENT, UP, OUT, REPLACED = "silent", "up", "out", "replaced"


class Watching(Protocol):
    """What is known of the other agents: :class:`chaos_mpi.agent.watch.Watch`."""

    me: str

    @property
    def witness(self) -> str | None: ...

    @property
    def view(self) -> ClusterView | None: ...

    def contact(self, member: str) -> Contact | None: ...

    def diagnosis(self, limit_s: float) -> Diagnosis | None: ...


class Voice:
    """How the witness of a job fares, as one agent sees it.

    Args:
        watch: knows the others.
        timing: limits.
        tell: is called with ``witness`` (its name), ``host`` and ``state`` when that is another one.
    """

    def __init__(self, watch: Watching, timing: Timing, tell: Callable[[dict[str, str]], None]) -> None:
        self._watch, self._timing, self._tell = watch, timing, tell
        self._name, self._state = "", UP
        self._contact: Contact | None = None

    async def follow(self) -> None:
        """Look again and again; does not return."""
        while True:
            self.look()
            await asyncio.sleep(self._timing.beat_s)

    def look(self) -> None:
        """Tell if there is news."""
        self._name = self._watch.witness or self._name
        if not self._name:
            return
        # Nobody remembers where it was once it is out.
        self._contact = self._watch.contact(self._name) or self._contact
        state = self._seen()
        if state != self._state:
            self._state = state
            self._tell({"witness": self._name, "host": host_of(self._name), "state": state})

    def _seen(self) -> str:
        witness, diagnosis = Node(self._name), self._watch.diagnosis(self._timing.limit_s)
        if diagnosis is None or self._state == REPLACED:
            return self._state
        if self._watch.witness is not None and witness in diagnosis.alive:
            return SILENT if pair(Node(self._watch.me), witness) in diagnosis.cut else UP
        if self._has_rank_there():
            return REPLACED
        return OUT if self._watch.witness is None else SILENT

    def _has_rank_there(self) -> bool:
        view, there = self._watch.view, set(self._contact.addresses) if self._contact is not None else None
        contacts = (self._watch.contact(node.name) for node in view.members if node.name != self._name) if view else ()
        return any(contact is not None and set(contact.addresses) == there for contact in contacts)
