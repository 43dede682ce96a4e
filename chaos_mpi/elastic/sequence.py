"""The common sequence of collective operations, and the recovery of the one under way when a member dies."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

from chaos_mpi.elastic.operations import Operation
from chaos_mpi.elastic.recovery import Position, Regrouped, Regrouping
from chaos_mpi.elastic.rounds import samplers_stand_still
from chaos_mpi.errors import (
    ChaosError,
    CutOffError,
    MismatchError,
    PeerFailedError,
    RecoveryError,
    ViewChangedError,
    WaitTimeoutError,
)
from chaos_mpi.membership import Report, View
from chaos_mpi.mpi.world import World

log = logging.getLogger("chaos_mpi.elastic")

#: Recoveries in a row, of one operation, that removed nobody: then MPI itself is broken, not a member.
_FRUITLESS_LIMIT = 5


class Listener(Protocol):
    """What the sequence tells its owner, and asks of it."""

    def emit(self, event: str, **fields: Any) -> None:
        """Write a line to the event log."""

    def operation_finished(self, operation: Operation) -> None:
        """The operation has its result; called before anything else happens."""

    def sampler_reports(self) -> list[dict[str, Any]]:
        """Where this member's samplers are."""

    def view_changed(self, regrouped: Regrouped, old: View, reports: list[list[dict[str, Any]]]) -> None:
        """A new view is committed; ``reports`` holds the samplers' reports of each survivor, in rank order."""

    def why_not_without(self, lost: tuple[str, ...]) -> str:
        """Why this member must not go on without these, or nothing; waits until that is certain."""

    def why_not_with(self, present: tuple[str, ...]) -> str:
        """The same for all but these, before there is a view."""

    def cut_off(self, error: CutOffError) -> NoReturn:
        """This member must not go on: end it."""

    def give_up(self, error: WaitTimeoutError) -> NoReturn:
        """A wait reached its limit: end the job."""


class OperationSequence:
    """Runs the operations of this member one after the other, on whatever communicator is left.

    Args:
        world: the first communicator.
        member: this process's id.
        timeout_s: longest wait for the other members, seconds.
        listener: see :class:`Listener`.

    Attributes:
        world: the present communicator.
        view: the present view.
        phase: what is being done: the label of an operation, a part of a recovery, or ``compute``.
    """

    def __init__(self, world: World, member: str, timeout_s: float, listener: Listener) -> None:
        self.world = world
        self.phase = "start"
        self._member = member
        self._timeout_s = timeout_s
        self._listener = listener
        self._finished = 0
        self._last: Operation | None = None
        self._in_flight: Operation | None = None
        self._last_label = ""  # of the last operation that the others finished before this member joined
        self._fruitless = 0
        #: Whether other threads, which may wait for messages, are not to attend: this one changes the membership.
        self._undisturbed = False
        self._attending = threading.RLock()
        self._regrouping = Regrouping(timeout_s, self._set_phase, listener.why_not_without)
        self.view = self._assemble()
        self.phase = "compute"

    @property
    def in_flight(self) -> Operation | None:
        """The operation that is entered and not finished."""
        return self._in_flight

    def execute(self, operation: Operation) -> None:
        """Run one operation to its end, whatever happens to other members."""
        self.enter(operation)
        self.settle(operation)

    def enter(self, operation: Operation) -> None:
        """Begin the next operation of the common sequence.

        Raises:
            ChaosError: another one is under way.
        """
        with self._attending:
            if self._in_flight is not None:
                raise ChaosError(
                    f"'{operation.phase}' was called while '{self._in_flight.phase}' is under way "
                    "(a collective call inside backward, or from another thread)"
                )
            self._in_flight = operation

    def settle(self, operation: Operation) -> None:
        """Wait until the operation is finished, recovering as often as members die.

        Raises:
            MismatchError, ViewChangedError: the members are in different calls, or this one cannot be made again after
                a death; the same at all of them, and all go on with the next call.
            TooFewRanksError: fewer than ``min_ranks`` members are left.
            WaitTimeoutError: the others did not arrive within the limit.
        """
        self.phase = operation.phase
        began = time.perf_counter()
        recovery: dict[str, float] = {}
        while not operation.contributors:
            try:
                if not operation.launched and operation.failure is None:
                    operation.launch(self.world, self.view)
                operation.wait(self._describe, self._timeout_s)
                self._mark_finished(operation, self.view.members)
            except PeerFailedError as failure:
                detected = time.perf_counter()
                recovery.setdefault("detect_ms", (detected - began) * 1e3)
                recovery.setdefault("_detected", detected)
                self._recover(operation, failure, recovery)
            except (MismatchError, ViewChangedError):
                self._leave(operation, self.view.members)
                self.phase = "compute"
                raise
            except WaitTimeoutError as error:
                self._listener.give_up(error)
        if recovery:
            self._report_recovery(recovery)
        self._fruitless = 0
        self.phase = "compute"

    def attend(self, *, wait: bool = True) -> None:
        """Between two operations of this member's: take part in a recovery that others have begun, if there is one.

        Args:
            wait: for another thread, if it is its turn; else it sees to this.
        """
        if not self._attending.acquire(blocking=wait):
            return
        try:
            if self._undisturbed and not wait:
                return
            if self._in_flight is None and self.world.is_broken():
                before = self.phase
                recovery = {"detect_ms": 0.0, "_detected": time.perf_counter()}
                self._recover(None, PeerFailedError("seen while this member was in another group's call"), recovery)
                self._report_recovery(recovery)
                self.phase = before
        finally:
            self._attending.release()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within it, no other thread takes part in a recovery: not even between two operations."""
        with self._attending:
            self._undisturbed = True
        try:
            yield
        finally:
            self._undisturbed = False

    def close(self) -> None:
        """Return once every living member has called it: from then on nobody needs a recovery."""
        while (regrouped := self._regroup(closing=True)) is not None:
            self._enter_view(regrouped)

    def free(self) -> None:
        """Give all communicators back. Only after :meth:`close`."""
        self._regrouping.free_retired()
        self.world.free()

    def agree(self, ok: bool) -> bool:
        """Whether every living member says so; the same at all. Only between two operations."""
        try:
            return self.world.agree(ok, self._timeout_s, self._describe)
        except WaitTimeoutError as error:
            self._listener.give_up(error)

    def adopt(self, world: World, view: View) -> None:
        """Go on in another communicator, which all members of ``view`` have agreed on."""
        if world is not self.world:
            self._regrouping.retire(self.world)
        self.world, self.view = world, view

    def retire(self, world: World) -> None:
        """Keep a communicator that is not used any more until :meth:`free`."""
        self._regrouping.retire(world)

    def place(self) -> dict[str, Any]:
        """Where this member is between two operations, in JSON values, for a newcomer's :meth:`take_place`."""
        return {"finished": self._finished, "label": self._last.label if self._last is not None else self._last_label}

    def take_place(self, world: World, view: View, place: dict[str, Any]) -> None:
        """Be a member of ``view`` from here on, at the same place as all others."""
        self.adopt(world, view)
        self._finished, self._last_label = int(place["finished"]), str(place["label"])
        self._last = None

    # -- recovery ------------------------------------------------------------------------------------

    def _recover(self, operation: Operation | None, failure: PeerFailedError, spent: dict[str, float]) -> None:
        failed = [self.view.members[r] for r in self.world.failed_ranks()]
        self._listener.emit("failure_detected", failed=failed, how=str(failure))
        begun = time.perf_counter()
        self.phase = "revoke"
        self.world.revoke()
        if operation is not None:
            operation.withdraw()
        spent["revoke_ms"] = spent.get("revoke_ms", 0.0) + (time.perf_counter() - begun) * 1e3
        with samplers_stand_still():  # the others reckon with where they are said to be
            regrouped = self._regroup(closing=False, met=failure.met)
            if regrouped is None:
                raise RecoveryError("the survivors agreed to close while this rank was in a collective call")
            for name, milliseconds in regrouped.milliseconds.items():
                spent[name] = spent.get(name, 0.0) + milliseconds
            spent["_regrouped"] = time.perf_counter()
            self._enter_view(regrouped)
        self._fruitless = 0 if regrouped.lost else self._fruitless + 1
        if self._fruitless >= _FRUITLESS_LIMIT:
            where = operation.phase if operation is not None else "a call in a group"
            raise RecoveryError(
                f"MPI failed {self._fruitless} times in a row in '{where}' although no member died "
                f"({self._member}, rank {self.world.rank}): {failure}."
            ) from failure

    def _regroup(self, *, closing: bool, met: bool = False) -> Regrouped | None:
        try:
            return self._regrouping.run(self.world, self.view, self._position, closing=closing, met=met)
        except WaitTimeoutError as error:
            self._listener.give_up(error)
        except CutOffError as error:
            self._listener.cut_off(error)

    def _enter_view(self, regrouped: Regrouped) -> None:
        old, decision = self.view, regrouped.decision
        self.world, self.view = regrouped.world, regrouped.view
        if self.world.rank in decision.behind and self._in_flight is not None:
            self._mark_finished(self._in_flight, regrouped.contributors)
        reports = regrouped.samplers
        if decision.behind and self._last is not None and self._last.is_gradient_step:
            # They adopt the finished step along with the samples that went into it.
            for i in decision.behind:
                reports[i] = [{**report, "done": report["taken"]} for report in reports[i]]
        self._listener.view_changed(regrouped, old, reports)

    def _position(self) -> Position:
        flight, last = self._in_flight, self._last
        report = Report(
            member=self._member,
            finished=self._finished,
            entered=self._finished + (flight is not None),
            label=flight.label if flight is not None else "",
            finished_label=last.label if last is not None else self._last_label,
            call=flight.phase if flight is not None else "",
            finished_call=last.phase if last is not None else "",
        )
        return Position(
            report=report,
            contributors=last.contributors if last is not None else (),
            samplers=self._listener.sampler_reports(),
            adoptable=lambda: last.results() if last is not None else [],
            in_flight=lambda: flight.results() if flight is not None else [],
        )

    def _leave(self, operation: Operation, contributors: tuple[str, ...]) -> None:
        operation.contributors = contributors
        self._finished += 1
        self._last, self._in_flight = operation, None

    def _mark_finished(self, operation: Operation, contributors: tuple[str, ...]) -> None:
        self._leave(operation, contributors)
        self._listener.operation_finished(operation)

    def _report_recovery(self, spent: dict[str, float]) -> None:
        now = time.perf_counter()
        detected, regrouped = spent.pop("_detected"), spent.pop("_regrouped")
        total_s = now - detected + spent["detect_ms"] / 1e3
        fields = {name: round(ms, 3) for name, ms in spent.items()}
        fields["redo_ms"] = round((now - regrouped) * 1e3, 3)
        self._listener.emit("recovered", **fields, total_ms=round(total_s * 1e3, 3))
        self._listener.emit("stalled", seconds=round(total_s, 6), cause="failure")

    def _assemble(self) -> View:
        """The first view: who is here. A rank that dies already now is left out."""
        limit, first = self._timeout_s, self.world.size
        while True:
            members: tuple[str, ...] = ()
            try:
                rows = self.world.all_gather(self._member.encode(), self._describe, limit)
                members = tuple(row.decode() for row in rows)
            except PeerFailedError as error:
                log.debug("a rank was lost while the job started: %s", error)
            # Those that cannot be reached may think the same of this side.
            if members and len(members) < first and (reason := self._listener.why_not_with(members)):
                raise CutOffError(
                    f"{first - len(members)} of {first} ranks could not be reached while the job started, and {reason} "
                    f"({self._member}). It stops; can the hosts reach each other, at all ports?"
                )
            if self.world.agree(bool(members), limit, self._describe):
                if self.world.rank == 0 and len(members) < first:
                    log.warning("%d of %d ranks died while the job started", first - len(members), first)
                return View(0, members)
            self.world.revoke()
            self.world = self.world.shrink(limit, self._describe)

    def _describe(self) -> str:
        return f"the other members in '{self.phase}'"

    def _set_phase(self, phase: str) -> None:
        self.phase = phase
