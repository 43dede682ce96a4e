"""Which nodes make up the cluster, and when some of them may go on without the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

#: What happens when the last view falls apart into two halves of equal size.
EVEN_SPLITS = ("lowest", "none")


class Node(NamedTuple):
    """One life of one machine in the job. Ordered by name, then by incarnation.

    A node whose agent lost its memory (crash, reboot), or that was removed, comes back with a higher incarnation only:
    what it has promised in its former life it cannot keep.
    """

    name: str
    incarnation: int = 0

    def __str__(self) -> str:
        return f"{self.name}#{self.incarnation}" if self.incarnation else self.name


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The nodes that take part, as a quorum of the view before has agreed on them.

    Attributes:
        epoch: 0 for the view a job starts with, one more for each that was agreed on.
        members: in order; never two incarnations of a name.
        removed: for every name that is no member any more, its last incarnation, in order. It never comes back.
        witness: the member without a rank, if there is one; see :meth:`is_quorum`. It is there from the first view on,
            or not at all.
    """

    epoch: int
    members: tuple[Node, ...]
    removed: tuple[Node, ...] = ()
    witness: Node | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a cluster needs at least one node")
        if len({node.name for node in self.members}) != len(self.members):
            raise ValueError(f"a machine appears twice in {', '.join(map(str, self.members))}")
        if self.witness is not None and self.witness not in self.members:
            raise ValueError(f"the witness {self.witness} is none of {', '.join(map(str, self.members))}")
        object.__setattr__(self, "members", tuple(sorted(self.members)))

    def next(self, members: Iterable[Node]) -> ClusterView:
        """The view that follows with these members."""
        kept = tuple(sorted(members))
        names = {node.name for node in kept}
        last = {node.name: node for node in (*self.removed, *self.members)}
        removed = tuple(sorted(node for name, node in last.items() if name not in names))
        return ClusterView(self.epoch + 1, kept, removed, self.witness if self.witness in kept else None)

    def admits(self, node: Node) -> bool:
        """Whether this may become a member: no life of that machine is one, and it is a new life."""
        return all(node.name != member.name for member in self.members) and all(
            node.name != gone.name or node.incarnation > gone.incarnation for gone in self.removed
        )

    def is_quorum(self, nodes: Iterable[Node], even_split: str = "lowest") -> bool:
        """Whether these may decide what follows this view.

        More than half of the ranks may, or exactly half of them with the witness. It breaks ties, and has no say
        otherwise: were it counted as one more, its loss would weigh on those that are left. Any two quorums have a
        member in common, a rank if one of them has more than half, else the witness or the lowest.

        So with ranks A and B and the witness W, any two of the three may go on without the third. What follows then:

        - {B, W} has one rank, and B is more than half of it. So B goes on when W is lost as well, and whatever the rule
          for even splits is. It is safe: A is not in this view, and W alone, which has no rank, is no quorum of it.
        - {A, B} has no witness any more: from then on it is as in a job that never had one.
        - When W and one rank are lost at once, the other may not go on, the lowest neither: those two may have agreed
          to go on without it.

        Args:
            nodes: those who agree; others than members do not count.
            even_split: where there is no witness. ``lowest``: exactly half of the members is enough if the lowest of
                them is among these; ``none``: it takes more than half. The same on all nodes.
        """
        agreeing = set(nodes).intersection(self.members)
        ranks = [node for node in self.members if node != self.witness]
        excess = 2 * len(agreeing.intersection(ranks)) - len(ranks)
        if excess == 0:
            return self.witness in agreeing if self.witness else even_split == "lowest" and ranks[0] in agreeing
        return excess > 0

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return {
            "epoch": self.epoch,
            "members": [list(n) for n in self.members],
            "removed": [list(n) for n in self.removed],
            "witness": None if self.witness is None else list(self.witness),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        members, removed = (tuple(Node(*pair) for pair in fields[name]) for name in ("members", "removed"))
        witness = fields["witness"]
        return cls(fields["epoch"], members, removed, None if witness is None else Node(*witness))


@dataclass(frozen=True, slots=True)
class Timing:
    """The settings of detection and decision; the same on all nodes.

    Attributes:
        limit_s: a node that nobody has heard for so long is dead. To be several times the round-trip time.
        period_s: time between two heartbeats; None for a fifth of the limit.
        heal_s: how long a cut link may stay cut (a detour may heal it) before one end is removed.
        give_up_s: a node that is cut off from the quorum for so long stops: longer than a switch takes to start again.
        drift: by how much, relatively, the clocks of two nodes may differ in speed.
        even_split: see :meth:`ClusterView.is_quorum`.
    """

    limit_s: float = 0.5
    period_s: float | None = None
    heal_s: float = 3.0
    give_up_s: float = 30.0
    drift: float = 0.1
    even_split: str = "lowest"

    def __post_init__(self) -> None:
        if not 0 < self.limit_s < float("inf"):
            raise ValueError(f"limit_s is {self.limit_s}; it must be a positive number of seconds")
        if self.period_s is not None and not 0 < self.period_s <= self.limit_s / 3:
            raise ValueError(
                f"period_s is {self.period_s}; it must be positive and at most a third of limit_s ({self.limit_s}), "
                "or one late heartbeat would count as a death"
            )
        if self.heal_s < 0 or self.give_up_s < self.limit_s:
            raise ValueError(
                f"heal_s is {self.heal_s} and give_up_s is {self.give_up_s}; the first cannot be negative, and the "
                f"second must be at least limit_s ({self.limit_s})"
            )
        if not 0 <= self.drift < 0.5:
            raise ValueError(f"drift is {self.drift}; it must be from 0 to below 0.5")
        if self.even_split not in EVEN_SPLITS:
            raise ValueError(f"even_split is {self.even_split!r}; choose one of {', '.join(EVEN_SPLITS)}")

    @classmethod
    def of_limit(cls, limit_s: float, even_split: str) -> Self:
        """With this limit, and all else in proportion to it where it has to be.

        Raises:
            ValueError: it is no limit.
        """
        return cls(limit_s, give_up_s=max(cls().give_up_s, 4 * limit_s), even_split=even_split)

    @property
    def beat_s(self) -> float:
        """Time between two heartbeats."""
        return self.limit_s / 5 if self.period_s is None else self.period_s

    @property
    def late_s(self) -> float:
        """A node that was not heard for so long is reported as late."""
        return 2 * self.beat_s

    @property
    def licence_s(self) -> float:
        """How long a heartbeat that a quorum has heard entitles to act, counted from when it was sent."""
        return self.limit_s * (1 - self.drift)
