"""How members settle at a step boundary what some of them want, and carry it out.

Proposals wait in an inbox (:mod:`chaos_mpi.elastic.requests`). Every gradient step carries one more number in its sum:
how many members have something to propose. While it is zero nothing else happens; otherwise all negotiate at the next
boundary.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn

from chaos_mpi.autoscale.settling import with_failed
from chaos_mpi.elastic import admission
from chaos_mpi.elastic.admission import LiveState
from chaos_mpi.elastic.alike import tensors_of_rank_0
from chaos_mpi.elastic.autoscaler import Autoscaler
from chaos_mpi.elastic.overlap import Overlap, overlaps
from chaos_mpi.elastic.requests import Requests, put_now
from chaos_mpi.elastic.sponsor import Sponsorship
from chaos_mpi.elastic.transitions import Admit, Arrange, Leave
from chaos_mpi.errors import CheckpointError
from chaos_mpi.membership import (
    MOVES,
    Agenda,
    Join,
    Limits,
    Outcome,
    Proposal,
    View,
    cut_is_due,
    negotiate,
    orphaned,
    restart,
    with_stayers,
)

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session

log = logging.getLogger("chaos_mpi.elastic")

#: Room for the report of one sampler, as JSON.
_REPORT_BYTES = 320


class Negotiator:
    """Joins and leaves of one session.

    Args:
        session: this member's part in the job.
        limits: how small and how large the job may get.

    Attributes:
        requests: what this member wants.
        agenda: what all have agreed on and not yet done.
        due: whether some member had something to propose in the last finished step.
    """

    def __init__(self, session: Session, limits: Limits) -> None:
        self.agenda = Agenda()
        self.due = False
        self.limits = limits
        self.requests = Requests(session, limits)
        self._session = session
        self._sponsorships: dict[str, Sponsorship] = {}
        self._asked_at: dict[str, float] = {}  # when joins were asked for, on this machine's monotonic clock
        self._overlap: Overlap | None = None
        self._autoscaler = Autoscaler(session, limits, lambda: self.agenda, self.requests.propose)

    def launch_ended(self, mark: str, how: str) -> None:
        """The process of a newcomer has ended; from any thread. This member may have had it started."""
        for sponsorship in list(self._sponsorships.values()):
            sponsorship.process_ended(mark, how)

    def wants_to_talk(self) -> bool:
        """Whether this member has something to propose."""
        agenda, view = self.agenda, self._session.view
        agreed = orphaned(agenda, view) or cut_is_due(agenda, view) or self._autoscaler.wants_a_change()
        return bool(self.requests) or agreed

    # -- at a boundary ---------------------------------------------------------------------------------

    def settle(self) -> None:
        """Negotiate if any member wants to, and carry out what follows. Called by all at the same boundary.

        Raises:
            SystemExit: this member leaves, or the job moves to another launcher.
            StopRequestedError: the job was told to end.
        """
        self._autoscaler.at_boundary()
        if not self.due:
            return
        self.due = False
        mine = self.requests.waiting()
        arrived = time.perf_counter()
        # What a change of the view needs to know of the samplers comes along, so that a leave needs no other round.
        word = [[put_now(p).to_json() for p in mine], self._session.sampler_reports()]
        words, contributors = self._session.gather_with_contributors(word)
        begun = time.perf_counter()  # until here a member has waited for slower ones, as it does in every step
        view = View(0, contributors)
        proposals = [[Proposal.from_json(p) for p in row] for row, _ in words]
        hosts = {join.id: join.host for join in self.agenda.joins}
        hosts |= {p.id: p.host for row in proposals for p in row if p.kind == "join"}
        for proposal in itertools.chain.from_iterable(proposals):
            if proposal.kind in ("join", "restart"):
                self._asked_at.setdefault(proposal.id, time.monotonic() - proposal.waited_s)
        outcome = negotiate(self.agenda, view, proposals, self.limits)
        outcome = self._autoscaler.settle(outcome, view)
        self.agenda = outcome.agenda
        self.requests.forget(mine)
        if outcome.stop:
            self.close()
            self._session.stop_together(outcome.stop)
        if outcome.move is not None:
            self._move(outcome.move)
        if outcome.leave:
            self._session.hand_over(outcome.leave)
            told = {member: reports for member, (_, reports) in zip(contributors, words, strict=True)}
            stayers = self._part(outcome.leave, told, (arrived, begun, time.perf_counter()))
            outcome = with_stayers(outcome, stayers, itertools.chain.from_iterable(proposals))
        self._tell(outcome, hosts)
        if self._session.member in outcome.leave:
            self._depart()
        if outcome.order:
            self._arrange(outcome.order)
        if outcome.cut and self._overlap is not None:
            self._overlap.cut(begun, tensors_of_rank_0(self._session))
        if outcome.activate:
            self._activate(outcome.activate, begun)
        if outcome.admit:
            self._admit(outcome.admit, begun)
        for join in outcome.start:
            self._sponsor(join)
        self.due = self.agenda.has_waiting

    def take_over(self, agenda: Agenda) -> None:
        """This newcomer is a member from here on, with the agenda of all."""
        self.agenda = agenda
        self.due = agenda.has_waiting

    def close(self) -> None:
        """The job is over: newcomers that are still on their way are sent home."""
        self._autoscaler.close()
        for sponsorship in self._sponsorships.values():
            sponsorship.give_up("the job ended")
        self._sponsorships.clear()
        self.requests.close()
        if self._overlap is not None:
            self._overlap.abandon()
            self._overlap = None

    # -- carrying out ----------------------------------------------------------------------------------

    def _part(self, leaving: tuple[str, ...], told: dict[str, Any], times: tuple[float, ...]) -> set[str]:
        """Go on without those that leave. Returns those of them that have to stay.

        Args:
            leaving: they.
            told: see :class:`~chaos_mpi.elastic.transitions.Leave`.
            times: see :func:`_leave_parts`.
        """
        session = self._session
        operation = Leave(
            leaving, self.limits.min_ranks, told, session.sampler_reports, self._width(), session.settings.timeout_s
        )
        session.execute(operation)
        assert operation.view is not None
        gone = operation.going
        stayers = set(leaving).intersection(operation.view.members).difference(gone)
        if not gone:
            return stayers
        times = (*times, operation.changed_at, time.perf_counter())
        if session.member in gone:
            session.emit("leave_committed", members=list(gone), **_leave_parts(times))
            return stayers
        assert operation.world is not None
        staying = [m for m in operation.view.members if m not in gone]
        reports = [r for m, r in zip(operation.view.members, operation.reports, strict=True) if m not in gone]
        session.change_view(operation.world, staying, reports, cause="leave")
        if self._overlap is not None:
            self._overlap.without(gone)
        session.emit("leave_committed", members=list(gone), **_leave_parts((*times, time.perf_counter())))
        if session.rank == 0:
            who = "1 rank trains" if session.size == 1 else f"{session.size} ranks train"
            log.warning("step %d: %s left; %s on", session.step, ", ".join(gone), who)
        return stayers

    def _depart(self) -> NoReturn:
        if self._overlap is not None:
            self._overlap.leave()
        for sponsorship in self._sponsorships.values():  # others start them again
            sponsorship.give_up("its sponsor leaves")
        self._autoscaler.close()
        self._session.depart()

    def _move(self, move: Proposal) -> None:
        """Keep the state, and end; returns, and all train on, if no host can keep it."""
        session = self._session
        if reason := session.keep_state(move.name):
            if session.rank == 0:
                log.warning("the job cannot move to another launcher: %s", reason)
            self.requests.answer(move.id, "refused", {"reason": reason})
            return
        self.requests.refuse_all(f"{MOVES}; ask again when it is there", but=move.id)
        self.requests.answer(move.id, "moved", {"step": session.step})
        self.close()
        session.move_away()

    def _arrange(self, order: tuple[str, ...]) -> None:
        session = self._session
        begun = time.perf_counter()
        operation = Arrange(order, session.sampler_reports, self._width(), session.settings.timeout_s)
        session.execute(operation)
        if operation.world is None:
            return
        session.change_view(operation.world, order, operation.reports, cause="order")
        session.emit("stalled", seconds=round(time.perf_counter() - begun, 6), cause="order")
        if session.rank == 0:
            log.warning(
                "step %d: the ranks are in another order now, in which slow links carry less: %s",
                session.step, ", ".join(order),
            )  # fmt: skip

    def _admit(self, joins: tuple[Join, ...], begun: float) -> None:
        session = self._session
        mine = {join.id: self._sponsorships.pop(join.id) for join in joins if join.id in self._sponsorships}
        for join in joins:
            if join.id in mine and join.sponsor != session.member:  # it was to leave, and another one took over
                mine.pop(join.id).give_up("another member has it started")
        for sponsorship in mine.values():
            sponsorship.call_in()
        ready = all(join.id in mine and mine[join.id].is_there() for join in joins if join.sponsor == session.member)
        ready = ready and self._can_hand_over()
        others = tensors_of_rank_0(session)  # before newcomers are connected: a death now costs nothing
        bridges = {id_: s.bridge for id_, s in mine.items() if s.bridge is not None}

        def call(view: View) -> None:
            for index, join in enumerate(joins):
                if (bridge := bridges.get(join.id)) is not None:
                    later = [view.rank_of(other.sponsor) for other in joins[index + 1 :]]
                    timing = {"launch_s": mine[join.id].launch_s, "waited_s": time.monotonic() - mine[join.id].ready_at}
                    admission.invite(bridge, later, timing, self._waited_s(join, timing))

        operation = Admit(
            joins, bridges, call, ready, session.sampler_reports, self._width(), session.settings.timeout_s
        )
        session.execute(operation)
        assert operation.view is not None
        state = LiveState.of(session, others) if operation.world is not None else None
        # With optimizers that differ, a newcomer cannot repeat the steps of any other member.
        policy = "blocking" if session.optimizers_differ else session.settings.join_policy
        optimizers = session.optimizers()
        if state is not None and overlaps(policy, joins, state.layout.total_bytes, optimizers):
            self._overlap = Overlap(session, operation, joins, state, begun, self.requests.propose)
            self.agenda = replace(self.agenda, replicating=joins)
        elif state is not None and admission.replicate(session, operation, joins, state, begun):
            self._welcome(joins)
        else:
            for sponsorship in mine.values():
                sponsorship.give_up("it could not be taken in")
            self._start_again(joins, operation.view)

    def _can_hand_over(self) -> bool:
        try:
            self._session.pack_for_newcomers()
        except CheckpointError as error:
            log.error("no rank can join, because the state cannot be sent: %s (%s)", error, self._session.member)
            return False
        return True

    def _activate(self, joins: tuple[Join, ...], begun: float) -> None:
        overlap, self._overlap = self._overlap, None
        assert overlap is not None
        of_rank_0 = tensors_of_rank_0(self._session)
        lost = overlap.stop(self._width())
        if lost is None:
            self._start_again(joins, self._session.view)
            return
        again = self._renew(lost, self._session.view)  # now, as the others are told the agenda
        others = tuple(join for join in joins if join not in lost)
        if overlap.activate(begun, of_rank_0):
            self._welcome(others)
        else:
            again += self._renew(others, self._session.view)
        for join in again:
            self._sponsor(join)

    def _welcome(self, joins: tuple[Join, ...]) -> None:
        for join in joins:
            self.requests.answer(join.id, "active", {"member": join.newcomer})

    def _start_again(self, joins: tuple[Join, ...], view: View) -> None:
        for join in self._renew(joins, view):
            self._sponsor(join)

    def _renew(self, joins: tuple[Join, ...], view: View) -> tuple[Join, ...]:
        """Put joins that failed on the agenda again, but for those that have failed too often; returns them."""
        agenda, again, given_up = restart(self.agenda, view, joins)
        self.agenda = with_failed(agenda, given_up)
        for join in given_up:
            reason = f"it failed {join.attempt} times"
            self._session.emit("join_failed", id=join.id, host=join.host, reason=reason)
            self.requests.answer(join.id, "refused", {"reason": reason})
        for join in again:
            self.requests.answer(join.id, "starting", _start_of(join))
        return again

    def _sponsor(self, join: Join) -> None:
        session = self._session
        if session.rank == 0:
            attempt = f", attempt {join.attempt}; the one before: {join.failure}" if join.attempt > 1 else ""
            log.warning("step %d: a rank is being started by %s (%s%s)", session.step, join.sponsor, join.id, attempt)
        if join.sponsor != session.member:
            return
        session.emit("join_spawned", id=join.id, host=join.host, attempt=join.attempt)
        sponsorship = Sponsorship(join, session.requirements(), session.settings.join_timeout_s, self.requests.propose)
        if (before := self._sponsorships.pop(join.id, None)) is not None:
            before.give_up("another attempt is made")
        self._sponsorships[join.id] = sponsorship
        sponsorship.start()

    # -- small parts -----------------------------------------------------------------------------------

    def _waited_s(self, join: Join, timing: Mapping[str, float]) -> float:
        """How long ago a join was asked for, seconds; to one who did not hear of it then, the present attempt."""
        asked_at = self._asked_at.get(join.id)
        return sum(timing.values()) if asked_at is None else time.monotonic() - asked_at

    def _tell(self, outcome: Outcome, hosts: Mapping[str, str]) -> None:
        """Tell who asked, and the event log; ``hosts`` are those of all joins."""
        for crash in outcome.crashes:
            self._session.emit("rank_crashed", **asdict(crash))
            if self._session.rank == 0:
                log.warning("%s", crash)
        for id_, reason in outcome.refused.items():
            if id_ in hosts:
                self._session.emit("join_failed", id=id_, host=hosts[id_], reason=reason)
            if self._session.rank == 0:
                log.warning("the wish to %s (%s) is refused: %s", id_.partition("-")[0], id_, reason)
            self.requests.answer(id_, "refused", {"reason": reason})
        for join in outcome.start:
            self.requests.answer(join.id, "starting", _start_of(join))
        self.requests.answer_left(self.agenda.settled, outcome.leave)

    def _width(self) -> int:
        # The same at all members: a report is six counters, and they all have equally many samplers.
        return 64 + _REPORT_BYTES * len(self._session.samplers)


def _start_of(join: Join) -> dict[str, Any]:
    return {"sponsor": join.sponsor, "attempt": join.attempt, "failure": join.failure}


def _leave_parts(times: Sequence[float]) -> dict[str, float]:
    """What a leave has cost this member, for the event log, milliseconds.

    Args:
        times: when it came to the boundary, knew what all want, knew what follows, had the new communicator, knew that
            all have it, and, if it stays, had taken on the new view; on the performance counter.
    """
    names = ("gather_ms", "negotiate_ms", "communicator_ms", "commit_ms", "adopt_ms")
    parts = {name: round((b - a) * 1e3, 3) for name, (a, b) in zip(names, itertools.pairwise(times), strict=False)}
    return {"milliseconds": round((times[4] - times[1]) * 1e3, 3), **parts}
