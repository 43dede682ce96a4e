"""The scaling policy at work in one session: it is fed with observed hosts, and has its say in each negotiation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from chaos_mpi.autoscale import Decision, make_policy
from chaos_mpi.autoscale.discovery import Discovery
from chaos_mpi.autoscale.settling import decide, settle
from chaos_mpi.membership import Agenda, HostSlots, Limits, Outcome, Proposal, View

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session

log = logging.getLogger("chaos_mpi.elastic")


class Autoscaler:
    """Observes hosts while this member is rank 0, and applies the policy to what all have agreed on.

    Args:
        session: this member's part in the job.
        limits: how small and how large the job may get.
        agenda: what all have agreed on by now.
        propose: puts a proposal before all members; called from a thread.
    """

    def __init__(
        self,
        session: Session,
        limits: Limits,
        agenda: Callable[[], Agenda],
        propose: Callable[[Proposal], None],
    ) -> None:
        self._session, self._limits, self._agenda, self._propose = session, limits, agenda, propose
        self._policy = make_policy(session.settings.policy_name)
        self._discovery: Discovery | None = None
        self._decided: tuple[Agenda, View, Decision] | None = None
        self._proposed: tuple[HostSlots, ...] | None = None
        self._exhausted: tuple[str, ...] = ()

    def at_boundary(self) -> None:
        """A step is finished. Hosts are looked for from the first one on: before, this may be a newcomer on its way."""
        session = self._session
        if self._discovery is not None or session.settings.policy_name == "manual":
            return
        path = session.settings.hosts_from
        assert path is not None
        if not session.has_state and session.rank == 0:
            log.warning(
                "the script has no TrainingState, which a new rank would start from: the hosts in %s are not used", path
            )
        self._discovery = Discovery(
            path, session.settings.discovery_interval_s, self._observe, self._is_my_turn, session.host
        )

    def wants_a_change(self) -> bool:
        """Whether the policy would do something about the present view, so that the members should negotiate."""
        agenda, view = self._agenda(), self._session.view
        if self._decided is None or self._decided[0] is not agenda or self._decided[1] is not view:
            self._decided = agenda, view, decide(self._policy, agenda, view, self._limits)
        return self._decided[2].changes_something

    def settle(self, outcome: Outcome, view: View) -> Outcome:
        """The outcome of a negotiation among ``view``, with what the policy adds to it."""
        session, agenda = self._session, self._agenda()
        outcome, decision = settle(self._policy, agenda, outcome, view, self._limits)
        before, after = agenda.hosts, outcome.agenda.hosts
        if after is not None and (before is None or after.entries != before.entries):
            session.emit("hosts_changed", hosts=dict(after.entries))
        if decision.changes_something:
            session.emit("scaled", joins=list(decision.joins), leaves=list(decision.leaves))
        if decision.exhausted != self._exhausted:
            self._exhausted = decision.exhausted
            if decision.exhausted and session.rank == 0:
                log.warning(
                    "%s: ranks that were started there failed or died again and again; none is started until the list "
                    "of hosts changes", ", ".join(decision.exhausted),
                )  # fmt: skip
        return outcome

    def close(self) -> None:
        """Look for hosts no more."""
        if self._discovery is not None:
            self._discovery.close()

    def _is_my_turn(self) -> bool:
        session = self._session
        return session.has_state and session.members[0] == session.member

    def _observe(self, entries: tuple[HostSlots, ...]) -> None:
        hosts = self._agenda().hosts
        agreed = hosts is not None and hosts.entries == entries
        # What is agreed on already is proposed if it is to replace another list that waits to be.
        if not agreed or self._proposed not in (None, entries):
            self._proposed = entries
            self._propose(Proposal("hosts", "hosts", hosts=entries))
