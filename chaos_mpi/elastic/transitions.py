"""Changes of the communicator that members make on purpose: operations of the common sequence, like any other.

A transition succeeds at every member or at none. When a member dies on the way, the survivors regroup as they
do in any operation, and begin it again with who is left.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from chaos_mpi.elastic.operations import Operation
from chaos_mpi.errors import PeerFailedError
from chaos_mpi.membership import Join, View, those_that_go
from chaos_mpi.mpi import growth
from chaos_mpi.mpi.growth import Bridge
from chaos_mpi.mpi.world import Pending, World


class Transition(Operation):
    """Gathers a report of every member, changes the communicator, and commits both by agreement.

    Args:
        label: what it is.
        report: this member's report, JSON values.
        width: bytes that every member's report fits into.
        limit_s: longest wait for the others.

    Attributes:
        reports: of all members of the view it was committed in, in rank order.
        view: that view.
        world: the new communicator, or None.
    """

    checks_label = False  # that all come to it together follows from what they have agreed on

    def __init__(self, label: str, report: Callable[[], Any], width: int, limit_s: float) -> None:
        super().__init__(label)
        self._report, self._width, self._limit_s = report, width, limit_s
        self._rows = torch.empty((0, width), dtype=torch.uint8, device="cpu")
        self.reports: list[Any] = []
        self.view: View | None = None
        self.world: World | None = None

    @abstractmethod
    def act(self, world: World, view: View) -> World | None:
        """Make the new communicator; called by all members together."""

    def launch(self, world: World, view: View) -> None:
        self._old, self.view = world, view
        super().launch(world, view)

    def start(self, pending: Pending, view: View, rank: int) -> None:
        payload = json.dumps(self._report()).encode()
        self._rows = torch.zeros((view.size, self._width), dtype=torch.uint8, device="cpu")
        self._rows[rank, : len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        pending.reduce(self._rows, "bor")

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        super().wait(what, limit_s)
        # From here on everyone has entered this operation. Who saw it fail is on the way to a recovery, which begins
        # with the same agreement as this one, and says no.
        assert self.view is not None
        self.reports = [json.loads(bytes(row.numpy().tobytes()).rstrip(b"\0")) for row in self._rows]
        self.world = None
        try:
            self.world = self.act(self._old, self.view)
            succeeded = True
        except PeerFailedError:
            # Others may be waiting, inside their call, for what this member was to send them.
            self._old.revoke()
            succeeded = False
        if not self._old.agree(succeeded, limit_s, what):
            if self.world is not None and self.world is not self._old:
                self.world.revoke()  # a newcomer may be in it, and wait for this member
            raise PeerFailedError("a member failed while the communicator was changed", met=True)

    def results(self) -> list[torch.Tensor]:
        return []  # it is finished everywhere at once, so nobody ever adopts it

    def renew_buffers(self) -> None:
        self._rows = torch.empty_like(self._rows)


class Meet(Transition):
    """All come together at this place, and none has gone on before all know everyone's report."""

    def act(self, world: World, view: View) -> World | None:
        return world


class Leave(Transition):
    """Members go; the others get a communicator without them.

    Args:
        leaving: they.
        min_ranks: how many have to stay.
        told: what all members have reported already, in the same view, so that they need not do it once more. If
            somebody has died since, they do.

    Attributes:
        going: those of them that do, once it is done; see :func:`~chaos_mpi.membership.those_that_go`.
        changed_at: when the new communicator was there, on the performance counter.
    """

    def __init__(
        self,
        leaving: Sequence[str],
        min_ranks: int,
        told: Mapping[str, Any],
        report: Callable[[], Any],
        width: int,
        limit_s: float,
    ) -> None:
        super().__init__(f"leave of {', '.join(leaving)}", report, width, limit_s)
        self._min_ranks = min_ranks
        self._leaving = frozenset(leaving)
        self.going: tuple[str, ...] = ()
        self.changed_at = 0.0
        self._told = told

    def start(self, pending: Pending, view: View, rank: int) -> None:
        if tuple(self._told) != view.members:
            self._told = {}
            super().start(pending, view, rank)

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        super().wait(what, limit_s)
        if self._told:
            self.reports = list(self._told.values())

    def act(self, world: World, view: View) -> World | None:
        self.going = those_that_go(self._leaving, view, self._min_ranks)
        going = [view.rank_of(member) for member in self.going]
        # Without any they died before they could go.
        smaller = growth.part(world, going, self._limit_s) if going else world
        self.changed_at = time.perf_counter()
        return smaller


class Arrange(Transition):
    """The members get a communicator in which they are in another order; if somebody has died since, they do not.

    Args:
        order: all of them.
    """

    def __init__(self, order: Sequence[str], report: Callable[[], Any], width: int, limit_s: float) -> None:
        super().__init__("another order of the members", report, width, limit_s)
        self._order = order

    def act(self, world: World, view: View) -> World | None:
        if sorted(self._order) != sorted(view.members):
            return None
        return growth.arrange(world, [view.rank_of(member) for member in self._order], self._limit_s)


class Admit(Transition):
    """Newcomers are called in, and connected with all members, in a communicator in which they come last.

    It is tried once. A newcomer for which it failed is in no known state, so it is started anew instead. A member that
    has tried may be the only one, for others can have seen a failure before; so all say whether they have.

    Args:
        joins: the newcomers, in the order of their ranks.
        bridges: those that this member sponsors, by join id.
        call: calls them in, given the view whose members take them in.
        ready: whether all of them are there.
    """

    def __init__(
        self,
        joins: Sequence[Join],
        bridges: dict[str, Bridge],
        call: Callable[[View], None],
        ready: bool,
        report: Callable[[], Any],
        width: int,
        limit_s: float,
    ) -> None:
        def told() -> Any:
            return {"ready": self._ready, "samplers": report()}

        super().__init__(f"admission of {', '.join(join.newcomer for join in joins)}", told, width + 32, limit_s)
        self._joins, self._bridges, self._call, self._ready = joins, bridges, call, ready

    def act(self, world: World, view: View) -> World | None:
        ready = all(report["ready"] for report in self.reports)
        self.reports = [report["samplers"] for report in self.reports]
        if not ready or not all(join.sponsor in view.members for join in self._joins):
            return None
        self._ready = False
        self._call(view)
        grown = world
        for join in self._joins:
            try:
                grown = growth.grow(grown, self._bridges.get(join.id), view.rank_of(join.sponsor), self._limit_s)
            except PeerFailedError:
                grown.revoke()  # for the newcomers that are in it already
                raise
        return grown
