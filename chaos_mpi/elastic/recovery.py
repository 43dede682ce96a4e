"""From a broken communicator to the next view: the driver around the pure decision.

The survivors revoke, shrink, tell each other where they are (:mod:`chaos_mpi.membership.progress`), hand over a
finished result where someone lacks it, and commit the new view by agreement. A failure on the way: the same
again, on the communicator that broke last. Calls on a broken communicator come in one fixed order everywhere
(agree, shrink, agree), because members that entered them in different orders would wait for each other for ever.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from chaos_mpi.errors import ChaosError, CutOffError, PeerFailedError, RecoveryError
from chaos_mpi.membership import Decision, Report, View, decide
from chaos_mpi.mpi.world import World

log = logging.getLogger("chaos_mpi.elastic")

#: So often survivors meet again after a failure that cost nobody, before they give up.
_MOST_FRUITLESS = 20


@dataclass(frozen=True, slots=True)
class Position:
    """This member's place, to be told to the others.

    Attributes:
        report: see :class:`chaos_mpi.membership.Report`.
        contributors: of the last finished operation.
        samplers: one report of each attached sampler.
        adoptable: buffers of the last finished operation, to hand to a member that is behind.
        in_flight: buffers of the operation in flight, to adopt its result into.
    """

    report: Report
    contributors: tuple[str, ...]
    samplers: list[dict[str, Any]]
    adoptable: Callable[[], list[torch.Tensor]]
    in_flight: Callable[[], list[torch.Tensor]]


@dataclass(slots=True)
class Regrouped:
    """The outcome of a recovery.

    Attributes:
        world: the new communicator.
        view: the committed view.
        decision: where everyone goes on.
        contributors: who contributed to operation ``decision.finished``.
        samplers: the sampler reports of the survivors, in rank order.
        lost: members of the old view that are gone.
        closing: whether any of the survivors has nothing left to do.
        milliseconds: time spent in each part.
    """

    world: World
    view: View
    decision: Decision
    contributors: tuple[str, ...]
    samplers: list[list[dict[str, Any]]]
    lost: tuple[str, ...]
    closing: bool
    milliseconds: dict[str, float] = field(default_factory=dict)


class Regrouping:
    """Brings the survivors of a broken communicator together in a new view.

    Args:
        limit_s: longest wait for the other survivors, seconds.
        set_phase: told what is being done, for messages and for tests that kill at a given moment.
        why_not_without: why this member must not go on without others, or nothing; waits until that is certain.
    """

    def __init__(
        self,
        limit_s: float,
        set_phase: Callable[[str], None],
        why_not_without: Callable[[tuple[str, ...]], str] = lambda lost: "",
    ) -> None:
        self._limit_s = limit_s
        self._why_not_without = why_not_without
        self._set_phase = set_phase
        self._retired: list[World] = []

    def run(
        self, world: World, view: View, position: Callable[[], Position], *, closing: bool, met: bool = False
    ) -> Regrouped | None:
        """Regroup. Returns None when every living member is closing: nothing is left to recover for.

        Args:
            world: the broken communicator.
            view: the view it belongs to.
            position: this member's place.
            closing: whether this member has nothing left to do.
            met: the first agreement has been made already.

        Raises:
            ChaosError: the survivors cannot go on; the same error at each of them.
            CutOffError: this member must not: others, who have the majority, go on without it.
            WaitTimeoutError: a survivor did not arrive in time.
        """
        spent = {"shrink_ms": 0.0, "exchange_ms": 0.0}
        members = view.members
        fruitless = 0
        while True:
            begun = time.perf_counter()
            self._await_word(tuple(members[rank] for rank in world.failed_ranks()))
            spent["exchange_ms"] += (time.perf_counter() - begun) * 1e3
            begun = time.perf_counter()
            self._set_phase("agree")
            if not met and world.agree(closing, self._limit_s, lambda: "the survivors to meet after a failure"):
                return None
            met = False
            self._set_phase("shrink")
            smaller = world.shrink(self._limit_s, lambda: "the survivors to shrink the communicator")
            self._retired.append(world)
            before, members = members, tuple(members[rank] for rank in smaller.ranks_in(world))
            fruitless = fruitless + 1 if members == before else 0
            if fruitless > _MOST_FRUITLESS:
                raise RecoveryError(
                    f"the survivors met {fruitless} times and could not go on, although nobody died meanwhile: what "
                    "MPI says is in the log at level debug"
                )
            world = smaller
            spent["shrink_ms"] += (time.perf_counter() - begun) * 1e3
            begun = time.perf_counter()
            outcome = self._exchange(world, view, position, closing)
            if isinstance(outcome, Regrouped) and outcome.lost:
                # Those that cannot be reached may think the same of this side.
                self._set_phase("quorum")
                if reason := self._why_not_without(outcome.lost):
                    raise CutOffError(reason, lowest=world.rank == 0)
            self._set_phase("commit")
            committed = world.agree(outcome is not None, self._limit_s, lambda: "the survivors to commit the view")
            spent["exchange_ms"] += (time.perf_counter() - begun) * 1e3
            if not committed:
                world.revoke()
                continue
            if isinstance(outcome, ChaosError):
                raise outcome
            assert outcome is not None
            outcome.milliseconds = spent
            return outcome

    def _await_word(self, failed: tuple[str, ...]) -> None:
        """Meet nobody while it is uncertain whether these are out.

        If it is this member that is out, the others part with it one by one. Who is lost to it already would be taken
        for dead by those whom it met now.
        """
        if failed:
            self._set_phase("quorum")
            self._why_not_without(failed)  # asked again below, where all that are left decide together

    def retire(self, world: World) -> None:
        """Keep a communicator that is not used any more until it can be given back."""
        self._retired.append(world)

    def free_retired(self) -> None:
        """Give back the communicators that are not used any more, once nothing can still use them."""
        for world in self._retired:
            world.free()
        self._retired.clear()

    def _exchange(
        self, world: World, view: View, position: Callable[[], Position], closing: bool
    ) -> Regrouped | ChaosError | None:
        self._set_phase("exchange")
        mine = position()
        message = {
            "report": mine.report.to_json(),
            "contributors": mine.contributors,
            "samplers": mine.samplers,
            "closing": closing,
        }
        try:
            rows = world.all_gather(json.dumps(message).encode(), lambda: "the survivors' reports", self._limit_s)
            messages = [json.loads(row) for row in rows]
            reports = [Report.from_json(m["report"]) for m in messages]
            try:
                decision = decide(reports)
            except ChaosError as error:
                return error
            contributors: tuple[str, ...] = ()
            if decision.source is not None:
                self._set_phase("adopt")
                buffers = mine.in_flight() if world.rank in decision.behind else mine.adoptable()
                world.broadcast(buffers, decision.source, lambda: "the last finished result", self._limit_s)
                contributors = tuple(messages[decision.source]["contributors"])
        except PeerFailedError as error:
            log.debug("another member failed during the recovery (%s); starting it again", error)
            return None
        following = view.next(r.member for r in reports)
        samplers = [m["samplers"] for m in messages]
        lost, anyone_closes = view.gone(following.members), any(m["closing"] for m in messages)
        return Regrouped(world, following, decision, contributors, samplers, lost, anyone_closes)
