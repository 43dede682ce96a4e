"""Who hears whom, and what follows from it: is a silent node dead, or only a link to it?

Each node tells, in its heartbeats, whom it has not heard lately. Rows carry a version number of their origin and an age
that everybody who passes one on adds to; so no clocks are compared, and a row that comes late or by a detour
never replaces a newer one. A node is alive as long as somebody who is alive has heard it within the limit (the idea of
the indirect probes of SWIM: Das, Gupta and Motivala, DSN 2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from chaos_mpi.monitor.cluster import Node, Timing
from chaos_mpi.monitor.messages import Row

#: Two nodes, in order.
Pair = tuple[Node, Node]


def pair(one: Node, other: Node) -> Pair:
    """Two nodes, in order."""
    return (one, other) if one < other else (other, one)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one node thinks of the members.

    Attributes:
        alive: heard within the limit by somebody who is alive; the node itself is.
        dead: the other members.
        cut: pairs of nodes that are alive of which one does not hear the other.
        uncertain: alive so far, but heard by nobody lately.
    """

    alive: frozenset[Node]
    dead: frozenset[Node]
    cut: frozenset[Pair]
    uncertain: frozenset[Node]


def diagnose(
    me: Node, members: Iterable[Node], silence_s: Mapping[Node, Mapping[Node, float]], limit_s: float, late_s: float
) -> Diagnosis:
    """Tell dead nodes from cut links.

    Args:
        me: who judges.
        members: whom to judge.
        silence_s: for each observer that something is known of, for each member, how long ago the observer heard it.
        limit_s: silence of a node or a link that is down.
        late_s: silence that is more than the time between two heartbeats.
    """
    everybody = frozenset(members)
    alive, fresh = {me}, [me]
    while fresh:
        heard = {node for node, silent in silence_s.get(fresh.pop(), {}).items() if silent < limit_s}
        fresh += sorted(heard & everybody - alive)
        alive |= heard & everybody
    cut = {
        pair(observer, node)
        for observer in alive
        for node, silent in silence_s.get(observer, {}).items()
        if silent >= limit_s and node in alive
    }
    recent = {node for observer in alive for node, silent in silence_s.get(observer, {}).items() if silent < late_s} | {
        me
    }
    living = frozenset(alive)
    return Diagnosis(living, everybody - living, frozenset(cut), living - recent)


@dataclass(slots=True)
class Hearing:
    """What one node hears, and what others say that they hear. The time is told.

    Args:
        me: this node.
        members: all nodes, this one too.
        timing: limits.
        now_s: the time; all count as heard now.
    """

    me: Node
    members: tuple[Node, ...]
    timing: Timing
    now_s: float
    _heard_s: dict[Node, float] = field(init=False, default_factory=dict)
    _stamps_s: dict[Node, float] = field(init=False, default_factory=dict)
    _rows: dict[Node, tuple[Row, float]] = field(init=False, default_factory=dict)
    _version: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.listen_again(self.now_s)

    def listen_again(self, now_s: float) -> None:
        """Count everybody as heard now: after a pause of this node, silence says nothing about others."""
        before = self._heard_s  # later than now, perhaps
        self._heard_s = {node: max(now_s, before.get(node, now_s)) for node in self.members if node != self.me}
        self._rows.clear()

    def change_members(self, members: tuple[Node, ...], now_s: float) -> None:
        """Go on with other members; newcomers count as heard now."""
        self.members = members
        self._heard_s = {node: self._heard_s.get(node, now_s) for node in members if node != self.me}
        for known in (self._rows, self._stamps_s):
            for node in [node for node in known if node not in members]:
                del known[node]

    def heard(self, node: Node, stamp_s: float, rows: Iterable[Row], now_s: float) -> None:
        """A heartbeat of a member came. One that is older than another that came before counts for nothing."""
        for row in rows:
            self._merge(row, now_s)
        if node in self._heard_s and stamp_s > self._stamps_s.get(node, -float("inf")):
            self._stamps_s[node] = stamp_s
            self._heard_s[node] = now_s

    def _merge(self, row: Row, now_s: float) -> None:
        known = self._rows.get(row.origin)
        if row.origin in self._heard_s and (known is None or row.version > known[0].version):
            self._rows[row.origin] = (row, now_s)

    def silence_s(self, now_s: float) -> dict[Node, dict[Node, float]]:
        """For each observer, how long ago it heard each member, as far as this node can know."""
        known: dict[Node, dict[Node, float]] = {
            self.me: {node: now_s - heard_s for node, heard_s in self._heard_s.items()}
        }
        for observer, (row, came_s) in self._rows.items():
            age_s = row.age_s + now_s - came_s
            late = dict(row.late)
            known[observer] = {node: age_s + late.get(node, 0.0) for node in self.members if node != observer}
        return known

    def diagnosis(self, now_s: float, limit_s: float | None = None) -> Diagnosis:
        """What this node thinks of the members, when a silence of ``limit_s`` counts (by default as in the timing)."""
        limit_s = self.timing.limit_s if limit_s is None else limit_s
        return diagnose(self.me, self.members, self.silence_s(now_s), limit_s, self.timing.late_s)

    def next_change_s(self) -> float:
        """When the next member will be silent for the limit, if nothing is heard of it."""
        limit_s = self.timing.limit_s
        return min((heard_s + limit_s for heard_s in self._heard_s.values()), default=float("inf"))

    def rows_to_send(self, now_s: float) -> tuple[Row, ...]:
        """This node's row, and those of others that somebody may not hear from themselves."""
        self._version += 1
        late_s = self.timing.late_s
        late = tuple((n, now_s - at_s) for n, at_s in sorted(self._heard_s.items()) if now_s - at_s >= late_s)
        missed = {node for row, _ in self._rows.values() for node, _ in row.late}
        missed |= {node for node, _ in late}
        others = tuple(
            row._replace(age_s=row.age_s + now_s - came_s)
            for origin, (row, came_s) in sorted(self._rows.items())
            if origin in missed and row.age_s + now_s - came_s < self.timing.limit_s
        )
        return (Row(self.me, self._version, 0.0, late), *others)
