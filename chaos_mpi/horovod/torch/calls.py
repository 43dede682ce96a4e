"""Calls of one group of ranks: made in the background, one after the other, matched by name where orders differ."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from chaos_mpi.elastic.operations import GatherRows, Operation
from chaos_mpi.errors import MismatchError, ViewChangedError
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.negotiation import JOIN, Action, Row, decide, remaining
from chaos_mpi.horovod.torch.requests import Group, Request, Waiting

#: How long a rank whose script is busy waits for further calls before it says again what is pending.
_CYCLE_S = 0.002
#: What is not longer is told in one round.
_SHORT_BYTES = 2040


class Stepping(Protocol):
    """What runs an operation that begins before all of its input is there: the session."""

    def begin(self, step: Any) -> None: ...

    def settle(self, operation: Operation) -> None: ...


class CallQueue:
    """The calls of one group of ranks.

    Args:
        group: who takes part.
        submit: has something done in the background, in order.
        waiting: what the script waits for.
        limit_s: how long ranks wait for each other's calls, seconds.
        zeros: makes the operation with which a rank that has joined takes part.
    """

    def __init__(
        self,
        group: Group,
        submit: Callable[[Callable[[], object]], object],
        waiting: Waiting,
        limit_s: float,
        zeros: Callable[[Mapping[str, Any], str], Operation],
    ) -> None:
        self.group = group
        self._submit, self._waiting, self._limit_s, self._zeros = submit, waiting, limit_s, zeros
        self._lock = threading.Lock()
        self._pending: dict[str, Request] = {}
        self._numbers: dict[str, int] = {}
        self._numbered_since = 0
        self._begun: tuple[Request, Operation, Stepping] | None = None
        self._joined_since: dict[str, int] = {}
        #: Whether the ranks have come with different calls, and not all of them are made yet.
        self.negotiating = False
        #: Whether calls are made at once, because the interpreter ends and starts no thread any more.
        self.inline = False
        #: Refuses a call that cannot be made.
        self.check: Callable[[Request], None] = lambda _: None
        #: Whether it has the calls of all ranks.
        self.of_all = False
        #: Who came last to the last ``join``, and who before, and so on.
        self.last_to_join: tuple[str, ...] = ()
        #: How many ranks have come since the job was started. Those have made no calls, so all count anew.
        self.newcomers: Callable[[], int] = lambda: 0
        #: What ranks that had joined took part in with zeros, since all have joined last.
        self.with_zeros: list[Mapping[str, Any]] = []

    def name(self, kind: str, name: str | None) -> str:
        """The name of a call; one without gets a number."""
        if name is None:
            if (newcomers := self.newcomers()) != self._numbered_since:
                self._numbered_since = newcomers
                self._numbers.clear()
            self._numbers[kind] = self._numbers.get(kind, 0) + 1
            name = f"noname.{self._numbers[kind]}"
        return f"{kind}.{name}"

    def renumber(self) -> None:
        """All ranks are at the same place: count calls without a name anew."""
        self._numbers.clear()

    def put(self, request: Request) -> Request:
        """Make a call in the background.

        Raises:
            ValueError: one of this name is pending.
        """
        self.check(request)
        with self._lock:
            if request.name in self._pending:
                raise ValueError(
                    f"a call named '{request.name}' is pending; wait for it (synchronize) before another of that name, "
                    "or give them different names"
                )
            self._pending[request.name] = request
        try:
            # This call is pending already, since ranks that have not begun the same step may wait for it.
            self.settle()
            if self.inline:
                self._waiting.during(request, lambda: self._turn(request))
            else:
                self._submit(lambda: self._turn(request))
        except BaseException:
            self._forget(request)
            raise
        return request

    def drain(self) -> None:
        """Wait until nothing is pending. The errors are those of who waits for the calls."""
        self.settle()
        while True:
            with self._lock:
                last = next(reversed(self._pending.values()), None)
            if last is None:
                return
            try:
                self._waiting.during(last, last.wait)  # the script has not waited for it, and others find it done
            except (HorovodInternalError, ValueError):
                continue

    # -- an operation that begins before all of its input is there -----------------------------------

    def begin(self, request: Request, session: Stepping) -> Operation | None:
        """Begin a gradient step in backward; None if it has to wait for :meth:`put`, since calls are pending."""
        with self._lock:
            if self._pending or self.negotiating:
                return None
            self._pending[request.name] = request
        operation = request.make(self.group)
        session.begin(operation)
        self._begun = (request, operation, session)
        return operation

    def settle(self) -> None:
        """Finish the step that was begun, if there is one."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        request, operation, session = begun
        try:
            session.settle(operation)
        except MismatchError:
            self._negotiate(request)
        except ViewChangedError:  # of another call: the members are together again at the next
            try:
                self._make(request)
            except MismatchError:
                self._negotiate(request)
        except BaseException as error:
            self._forget(request)
            request.fail(error)
            raise
        else:
            self._forget(request)
            self._note_members(request, operation.contributors)
            request.complete(operation, self.group)

    # -- in the background ---------------------------------------------------------------------------

    def _turn(self, request: Request) -> None:
        if request.done:
            return  # its turn came early, since other ranks had it earlier
        try:
            self._make(request)
        except MismatchError:
            self._negotiate()

    def _make(self, request: Request) -> None:
        """Make the call to its end, anew for those that are left if it was for others and can be.

        Raises:
            MismatchError: the ranks are in different calls.
        """
        changed: ViewChangedError | None = None
        there: tuple[str, ...] = ()
        while not request.done:
            try:
                operation = request.make(self.group)
                self.group.execute(operation)
            except ViewChangedError as error:
                changed, there = error, operation.contributors
                if not request.anew:
                    self._forget(request)
                    self._note_members(request, there)
                    request.fail(error)
            except MismatchError:
                raise
            except BaseException as error:
                self._forget(request)
                if changed is not None:
                    self._note_members(request, there)
                request.fail(error if changed is None else changed)
            else:
                self._forget(request)
                if request.name == JOIN:
                    self._all_joined()
                self._note_members(request, operation.contributors)
                request.complete(operation, self.group)

    def _negotiate(self, step: Request | None = None) -> None:
        """The ranks are in different calls: make those that all have, until nothing is left.

        Args:
            step: what the script waits for, if it is the script that has come here. The rest is for the background.
        """
        began = time.monotonic()
        self.negotiating = True
        try:
            while True:
                if step is not None and step.done:
                    self._submit(self._negotiate)
                    return
                with self._lock:
                    mine = list(self._pending.values())
                blocked = step is not None or self._waiting.blocked
                tired = time.monotonic() - began > self._limit_s
                rows, members = self._tell(Row(tuple(request.asked for request in mine), blocked, tired))
                for row, member in zip(rows, members, strict=True):
                    if any(asked.name == JOIN for asked in row.pending):
                        self._joined_since.setdefault(member, len(self._joined_since))
                actions = decide(rows)
                for action in actions:
                    self._act(action, rows, members)
                    began = time.monotonic()
                if not remaining(rows, actions):
                    self.negotiating = False
                    return
                if not actions:
                    self._await_calls()
        except BaseException as error:
            self.negotiating = False
            with self._lock:
                mine = list(self._pending.values())
            for request in mine:
                self._forget(request)
                request.fail(error)

    def _tell(self, row: Row) -> tuple[list[Row], tuple[str, ...]]:
        payload = json.dumps(row.to_json()).encode()
        operation = GatherRows("pending calls", payload, _SHORT_BYTES)
        self.group.execute(operation)
        if (longest := operation.longest) > _SHORT_BYTES:  # all see the same lengths
            operation = GatherRows("pending calls", payload, longest)
            self.group.execute(operation)
        return [Row.from_json(fields) for fields in operation.decoded()], operation.contributors

    def _act(self, action: Action, rows: list[Row], members: tuple[str, ...]) -> None:
        request = self._pending.get(action.name)
        if action.name == JOIN and not action.refusal:
            since = [self._joined_since.get(member, 0) for member in members]
            order = sorted(range(len(members)), key=lambda rank: (since[rank], rank), reverse=True)
            if request is not None:
                self._forget(request)
                self._all_joined()
                self.last_to_join = tuple(members[rank] for rank in order)
                self._note_members(request, members)
                request.complete_join(order[0])
            return
        if action.refusal:
            if request is not None:
                self._forget(request)
                request.fail(HorovodInternalError(f"{request.asked.call}: {action.refusal}"))
            return
        if action.zeros is not None and any(all(a.name != action.name for a in row.pending) for row in rows):
            self.with_zeros.append(action.zeros)
        if request is None:
            assert action.zeros is not None
            asked = next(a for row in rows for a in row.pending if a.name == action.name)
            self.group.execute(self._zeros(action.zeros, asked.call))
            return
        try:
            self._make(request)
        except MismatchError as error:
            self._forget(request)
            request.fail(error)

    def _await_calls(self) -> None:
        """Not less than a cycle, so that calls which a script makes one after the other are pending together."""
        end = time.monotonic() + _CYCLE_S
        while time.monotonic() < end and not self._waiting.blocked:
            time.sleep(_CYCLE_S / 10)

    def _note_members(self, request: Request, members: tuple[str, ...]) -> None:
        if self.of_all:
            request.members, request.place = members, self._waiting.next_place()

    def _all_joined(self) -> None:
        # Ranks that had joined have not counted the calls of the others.
        self._numbers.clear()
        self._joined_since.clear()

    def _forget(self, request: Request) -> None:
        with self._lock:
            if self._pending.get(request.name) is request:
                del self._pending[request.name]
