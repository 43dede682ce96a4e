"""Newcomers that catch up while this member trains on (join policy ``overlap``), seen from the member.

Three times the members do something for them at a step boundary: they connect them, they fix the *cut*, from which on
they record what they do, and at last they stop, go on together with them, and forget the records. In between a thread
serves the newcomers; see :mod:`chaos_mpi.replication.recording`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chaos_mpi.elastic import admission
from chaos_mpi.elastic.admission import LiveState
from chaos_mpi.elastic.catchup import planned
from chaos_mpi.elastic.learning_rate import StepHooks
from chaos_mpi.elastic.transitions import Meet
from chaos_mpi.membership import Join, Proposal
from chaos_mpi.mpi.channel import Channel
from chaos_mpi.replication.layout import Range
from chaos_mpi.replication.recording import RecordingSource
from chaos_mpi.replication.steps import Cut, can_follow
from chaos_mpi.sharding.held import widened

if TYPE_CHECKING:
    import torch

    from chaos_mpi.elastic.session import Session
    from chaos_mpi.elastic.transitions import Admit
    from chaos_mpi.membership import View
    from chaos_mpi.mpi.world import World

#: With the policy ``auto``, what is smaller is moved faster than it takes to stop three times.
OVERLAP_FROM_BYTES = 16 << 20
#: How long the members wait for the processes of those that have left to end, before they start newcomers anew.
LEAVERS_LIMIT_S = 2.0
_POLL_S = 0.002


def overlaps(policy: str, joins: Sequence[Join], state_bytes: int, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether the members train on while these newcomers get the state; the same at all members.

    An attempt that failed is repeated in the simpler way.
    """
    if policy == "blocking" or any(join.attempt > 1 for join in joins) or not can_follow(optimizers):
        return False
    return policy == "overlap" or state_bytes >= OVERLAP_FROM_BYTES


class Overlap:
    """Newcomers that are connected, and catch up.

    Args:
        session: this member's part in the job.
        operation: what connected them.
        joins: they, in the order of their ranks.
        state: what it is now, so that they can make themselves ready; it will be another one at the cut.
        begun: when the members stopped for it, on the performance counter.
        propose: puts a proposal before all members.
    """

    def __init__(
        self,
        session: Session,
        operation: Admit,
        joins: Sequence[Join],
        state: LiveState,
        begun: float,
        propose: Callable[[Proposal], None],
    ) -> None:
        assert operation.world is not None
        assert operation.view is not None
        self._session, self._joins = session, joins
        self._wide: World = operation.world
        self._members = operation.view.members
        self._hooks: list[StepHooks] = []
        self._left: set[int] = set()
        self._lost: frozenset[int] = frozenset()
        self._stopped: tuple[View, list[Any]] | None = None  # with whom, and how far their samplers were
        self._recording_s = 0.0  # of all steps together, what recording has kept them
        invitation: dict[str, Any] = {
            "policy": "overlap",
            "layout": state.layout.to_json(),
            "members": list(self._members),
            "grow_s": time.perf_counter() - begun,
        }
        first = joins[0].id
        self._source = RecordingSource(
            Channel(self._wide), list(self._guests), state.layout, state.tensors, invitation,
            session.settings.guest_limit_s,
            ready=lambda: propose(Proposal("ready", first)),
            caught_up=lambda: propose(Proposal("caught_up", first)),
        )  # fmt: skip
        self._source.start()
        session.emit("stalled", seconds=round(time.perf_counter() - begun, 6), cause="join")

    def cut(self, begun: float, others: Mapping[str, torch.Tensor]) -> None:
        """Fix the state that the newcomers start from, and record from here on what they are to repeat.

        Args:
            begun: when the members stopped for it, on the performance counter.
            others: see :meth:`LiveState.of`.
        """
        session = self._session
        self._source.await_rates(session.settings.timeout_s)
        state = LiveState.of(session, others)
        sources = [rank for rank, member in enumerate(self._members) if member in session.members]
        names = {rank: self._members[rank] for rank in sources}
        ranges: list[Range] = []
        for rates in self._source.rates.values():
            # More than its share: links may turn out to be slower than they seemed.
            held = widened(planned(state.layout.total_bytes, names, rates).assignment)
            ranges += [held[session.member]] if session.member in held else []
        invitation = {
            "layout": state.layout.to_json(), "skeleton": state.skeleton,
            "sources": sources, "members": [self._members[rank] for rank in sources],
        }  # fmt: skip
        session.emit(
            "join_cut", newcomers=[join.newcomer for join in self._joins], state_bytes=state.layout.total_bytes
        )
        index = sources.index(self._members.index(session.member))
        self._source.cut(Cut(state.layout, state.tensors, merged(ranges), index, len(sources), invitation))
        for number, optimizer in enumerate(session.optimizers()):
            self._hooks.append(StepHooks(optimizer, self._recorder(number, optimizer), lambda: None))
        session.emit("stalled", seconds=round(time.perf_counter() - begun, 6), cause="join")

    def stop(self, width: int) -> tuple[Join, ...] | None:
        """Stop, and find out who is left.

        Args:
            width: bytes that the report of one member's samplers fits into.

        Returns:
            The joins of newcomers that have died; None if nothing can come of any; the same everywhere.
        """
        self._forget()
        self._await_leavers()
        limit_s = self._session.settings.timeout_s
        operation = Meet("activation of newcomers", self._report, width + 32 + 16 * len(self._joins), limit_s)
        self._session.execute(operation)
        if any(report["silent"] or report["present"] for report in operation.reports):
            # Who hangs may be anywhere, also in a call that all have to make together, and who has left makes none.
            self.abandon()
            return None
        lost = {rank for report in operation.reports for rank in report["lost"]}
        assert operation.view is not None
        self._stopped = operation.view, [report["samplers"] for report in operation.reports]
        self._lost = frozenset(lost)
        return tuple(join for rank, join in self._numbered() if rank in lost)

    def activate(self, begun: float, others: Mapping[str, torch.Tensor]) -> bool:
        """After :meth:`stop`: let the newcomers fetch what they lack, and go on together with them.

        Args:
            begun: when the members stopped for it, on the performance counter.
            others: see :meth:`LiveState.of`.

        Returns:
            Whether all members and newcomers are in one view now; the same everywhere.
        """
        session, limit_s, lost = self._session, self._session.settings.timeout_s, self._lost
        assert self._stopped is not None
        view, reports = self._stopped
        newcomers = [join.newcomer for rank, join in self._numbered() if rank not in lost]
        shrink = view.members != self._members or bool(lost)
        state = LiveState.of(session, others)
        invitation: dict[str, Any] = {
            "layout": state.layout.to_json(),
            "skeleton": state.skeleton,
            "sources": [self._members.index(member) for member in view.members],
            "members": list(view.members),
            "newcomers": newcomers,
            "reports": reports,
            "shrink": shrink,
            **session.situation(),
        }
        self._source.stop_training(state.layout, state.tensors, invitation, lost)
        ready = admission.serve(session, self._source, newcomers, lost)
        world = self._wide
        if ready and shrink:
            world = world.shrink(limit_s, lambda: "the members to go on without those that died")
            session.retire(self._wide)
        moved = f"{state.layout.total_bytes / 1e6:.1f} MB of state, while training went on"
        return admission.go_on_together(session, world, view, newcomers, reports, ready, moved, begun)

    def abandon(self) -> None:
        """Nothing comes of it: the job ends, or one of the newcomers hangs."""
        self._forget()
        self._source.abandon()
        self._wide.revoke()
        self._session.retire(self._wide)

    def without(self, gone: Sequence[str]) -> None:
        """These members have left; the newcomers would find out late."""
        ranks = [rank for rank, member in enumerate(self._members) if member in gone]
        self._left.update(ranks)
        self._source.tell_gone(ranks)

    def leave(self) -> None:
        """This member goes; the others may go on with the newcomers."""
        self._forget()
        self._source.abandon()

    def _numbered(self) -> list[tuple[int, Join]]:
        """The joins, with the ranks of their newcomers."""
        return list(zip(self._guests, self._joins, strict=True))

    @property
    def _guests(self) -> range:
        return range(len(self._members), self._wide.size)

    def _report(self) -> dict[str, Any]:
        lost, silent = self._source.lost, self._source.silent
        return {
            "samplers": self._session.sampler_reports(),
            "lost": sorted(lost - silent),
            "silent": bool(silent),
            "present": bool(self._present()),
        }

    def _present(self) -> set[int]:
        """Those that have left, and whose processes have not ended yet, as far as is known."""
        return self._left.difference(self._wide.failed_ranks())

    def _await_leavers(self) -> None:
        """They are in the communicator that is to be shrunk, which takes all processes that live."""
        limit = time.monotonic() + LEAVERS_LIMIT_S
        while self._present() and time.monotonic() < limit:
            time.sleep(_POLL_S)

    def _recorder(self, number: int, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def record() -> None:
            self._recording_s += self._source.record(number, optimizer)

        return record

    def _forget(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        if self._recording_s:
            self._session.emit("stalled", seconds=round(self._recording_s, 6), cause="join")
            self._recording_s = 0.0


def merged(ranges: Sequence[Range]) -> list[Range]:
    """The bytes that are in any of the ranges, which may overlap, in ascending order."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found
