"""The right to act as a member of a view, which ends by itself: leases (Gray and Cheriton, SOSP 1989) on heartbeats.

A node that hears another promises, by the echo that it sends back, not to vote for a view without that other until a
limit has passed. Who has such promises of a quorum knows, until the first of them runs out, that no view
without it has been agreed on. See :mod:`chaos_mpi.monitor.member` for why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from chaos_mpi.monitor.cluster import ClusterView, Node, Timing


@dataclass(slots=True)
class Licence:
    """What one node promised to others in a view, and what others promised to it.

    Args:
        me: this node.
        view: that it is a member of.
        timing: limits.
        now_s: when it took the view on; from here on every member counts as promised.
    """

    me: Node
    view: ClusterView
    timing: Timing
    now_s: float
    _promised_until_s: dict[Node, float] = field(init=False)
    _stamps_s: dict[Node, float] = field(init=False, default_factory=dict)
    _came_s: dict[Node, float] = field(init=False, default_factory=dict)
    _echoes_s: dict[Node, float] = field(init=False, default_factory=dict)
    _voted_s: float | None = field(init=False, default=None)
    _out: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        until_s = self.now_s + self.timing.limit_s
        self._promised_until_s = {node: until_s for node in self.view.members if node != self.me}

    def promise(self, node: Node, stamp_s: float, now_s: float) -> None:
        """Stand by a member whose heartbeat came; not after this node has voted, nor for a stamp that is not new."""
        if self._voted_s is None and stamp_s > self._stamps_s.get(node, -float("inf")):
            self._stamps_s[node] = stamp_s
            self._came_s[node] = now_s
            self._promised_until_s[node] = now_s + self.timing.limit_s

    @property
    def present(self) -> frozenset[Node]:
        """The members that were heard in this view, and this node."""
        return frozenset((self.me, *self._stamps_s))

    def echo_s(self, node: Node) -> float | None:
        """What to send back to a member: its newest stamp that this node stands by."""
        return self._stamps_s.get(node)

    def held_s(self, node: Node, now_s: float) -> float:
        """How long ago the stamp that is sent back came."""
        return now_s - self._came_s.get(node, now_s)

    def echoed(self, node: Node, echo_s: float) -> None:
        """A member stands by what was sent at that time."""
        self._echoes_s[node] = max(echo_s, self._echoes_s.get(node, -float("inf")))

    def free_s(self, without: Iterable[Node]) -> float:
        """From when on a view without these may get the vote of this node."""
        return max((self._promised_until_s.get(n, -float("inf")) for n in without), default=-float("inf"))

    def voted(self, members: Iterable[Node], now_s: float) -> None:
        """This node has voted for these members to follow: it renews nobody's licence in this view any more."""
        self._voted_s = now_s if self._voted_s is None else self._voted_s
        self._out = self.me not in set(members)

    def until_s(self, now_s: float) -> float:
        """When the right to act ends; in the past, or minus infinity, if it has ended."""
        if self._out:
            return -float("inf")
        stood_by = {**self._echoes_s, self.me: now_s if self._voted_s is None else self._voted_s}
        backers: set[Node] = set()
        for node, stamp_s in sorted(stood_by.items(), key=lambda item: -item[1]):
            backers.add(node)
            if self.view.is_quorum(backers, self.timing.even_split):
                return stamp_s + self.timing.licence_s
        return -float("inf")
