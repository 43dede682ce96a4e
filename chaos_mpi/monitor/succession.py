"""Which view should follow, in one node's opinion, and when it is this node's turn to propose it. The time is told."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.cuts import mutually_reachable
from chaos_mpi.monitor.reachability import Diagnosis, Pair


@dataclass(slots=True)
class Succession:
    """What one node holds about the view that should follow the present one.

    Args:
        me: this node.
        view: the present one.
        timing: limits.

    Attributes:
        leaving: members that want to be left out, and vote until they are.
    """

    me: Node
    view: ClusterView
    timing: Timing
    leaving: set[Node] = field(init=False, default_factory=set)
    _joiners_s: dict[Node, float] = field(init=False, default_factory=dict)
    _cut_since_s: dict[Pair, float] = field(init=False, default_factory=dict)
    _needed_s: float | None = field(init=False, default=None)
    _rival_s: float | None = field(init=False, default=None)

    @property
    def needed(self) -> bool:
        """Whether another view is needed, as far as is known."""
        return self._needed_s is not None

    def change_view(self, view: ClusterView) -> None:
        """Another view has been agreed on."""
        self.view = view
        self._needed_s = self._rival_s = None
        self.leaving.intersection_update(view.members)
        self._joiners_s = {node: at_s for node, at_s in self._joiners_s.items() if self._may_join(node)}

    def paused(self) -> None:
        """This node was stopped for a while: what it thought is out of date."""
        self._needed_s = None
        self._cut_since_s.clear()
        self._joiners_s.clear()

    def asked_to_join(self, node: Node, now_s: float) -> bool:
        """A node wants to become a member; whether it may."""
        if self._may_join(node):
            self._joiners_s[node] = now_s
            return True
        return False

    def _may_join(self, node: Node) -> bool:
        """Also where a former life of it is still a member, which will be found dead."""
        former = next((member for member in self.view.members if member.name == node.name), None)
        return self.view.admits(node) if former is None else node.incarnation > former.incarnation

    def saw_rival(self, now_s: float) -> None:
        """Somebody else is trying, or an attempt of this node came to nothing."""
        self._rival_s = now_s

    def wanted(self, diagnosis: Diagnosis, present: Collection[Node], now_s: float) -> tuple[Node, ...]:
        """The members that should follow, in order: those that are alive, stay, and are not cut off for long, and
        newcomers.

        Args:
            diagnosis: what this node thinks of the members.
            present: the members that have taken on the present view, this node too.
            now_s: the time.
        """
        self._cut_since_s = {ends: self._cut_since_s.get(ends, now_s) for ends in diagnosis.cut}
        hopeless = [ends for ends, since_s in self._cut_since_s.items() if now_s - since_s >= self.timing.heal_s]
        stay = mutually_reachable(diagnosis.alive - self.leaving, hopeless, self.view.witness)
        return tuple(sorted((*stay, *self._admitted(stay, present, now_s))))

    def _admitted(self, stay: Collection[Node], present: Collection[Node], now_s: float) -> list[Node]:
        """Newcomers, no more than could all die at once without taking the quorum with them; one if all are present."""
        names = {node.name for node in stay}
        # Of two lives of a machine that both ask, the later.
        asking = sorted(n for n, at_s in self._joiners_s.items() if now_s - at_s < self.timing.limit_s)
        joiners = sorted({n.name: n for n in asking if n.name not in names}.values())
        firm = set(stay).intersection(present)
        while joiners and not self.view.next((*stay, *joiners)).is_quorum(firm, self.timing.even_split):
            if len(joiners) == 1 and firm.issuperset(stay):
                break
            joiners.pop()
        return joiners

    def is_turn(self, wanted: Iterable[Node], diagnosis: Diagnosis, pending: bool, now_s: float) -> bool:
        """Whether this node is to begin an attempt now. To be asked whenever something may have changed.

        The lowest member that stays tries at once, the others the later the higher they are; all later than
        that when an attempt was seen lately.

        Args:
            wanted: what :meth:`wanted` has returned.
            diagnosis: what it was given.
            pending: somebody's attempt is unfinished, so there must be a decision even if the members stay as they are.
            now_s: the time.
        """
        wanted = tuple(wanted)
        staying = [node for node in self.view.members if node in wanted]
        voting = self.leaving.intersection(diagnosis.alive).union(staying)
        possible = self.view.is_quorum(voting, self.timing.even_split) and self.me in staying
        if not possible or not (pending or wanted != self.view.members):
            self._needed_s = None
            return False
        if self._needed_s is None:
            self._needed_s = now_s
        # Nodes that fail together are noticed up to a heartbeat apart: better one change for all of them.
        if diagnosis.uncertain and now_s - self._needed_s < self.timing.limit_s / 4:
            return False
        wait_s = staying.index(self.me) * self.timing.late_s
        if now_s - self._needed_s < wait_s:
            return False
        return self._rival_s is None or now_s - self._rival_s >= self.timing.limit_s + wait_s + self.timing.late_s
