"""One decision by a majority: single-decree Paxos (Lamport, "Paxos Made Simple", 2001), without disks.

Nothing is written to disk: a node that lost its memory comes back as another one and has no vote in
decisions that its former life may have taken part in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from chaos_mpi.monitor.cluster import ClusterView, Node
from chaos_mpi.monitor.messages import Accept, Accepted, Ballot, Prepare, Promise, Refused, Vote

#: Lower than any that is used.
NO_BALLOT = Ballot(0, Node("", 0))


@dataclass(slots=True)
class Acceptor:
    """How one node takes part in the decision on one epoch.

    Attributes:
        epoch: that is decided on.
        promised: no lower ballot gets its vote.
        vote: its last one.
        asked: what it was last asked to vote for and, for reasons of its own, has not yet voted for.
    """

    epoch: int
    promised: Ballot = NO_BALLOT
    vote: Vote | None = None
    asked: Vote | None = None

    def prepare(self, ballot: Ballot) -> Promise | Refused:
        """Answer a :class:`Prepare`."""
        if ballot < self.promised:
            return Refused(self.epoch, ballot, self.promised)
        self.promised = ballot
        return Promise(self.epoch, ballot, self.vote)

    def ask(self, vote: Vote) -> Refused | None:
        """Take note of an :class:`Accept`; whether to vote is up to the caller of :meth:`accept`."""
        if vote.ballot < self.promised:
            return Refused(self.epoch, vote.ballot, self.promised)
        self.promised = vote.ballot
        self.asked = vote
        return None

    def accept(self) -> Accepted | None:
        """Vote for what was asked for, unless another ballot got a promise since."""
        if self.asked is None or self.asked.ballot < self.promised:
            return None
        self.vote = self.asked
        return Accepted(self.epoch, self.vote.ballot)


@dataclass(slots=True)
class Proposer:
    """One attempt to get a decision.

    Attributes:
        view: that is to be followed by another.
        even_split: see :meth:`ClusterView.is_quorum`.
        ballot: of this attempt.
        wanted: the members to propose, unless others may have been chosen already.
        started_s: when it began.
    """

    view: ClusterView
    even_split: str
    ballot: Ballot
    wanted: tuple[Node, ...]
    started_s: float
    _promises: dict[Node, Vote | None] = field(default_factory=dict)
    _proposal: Vote | None = None
    _accepted: set[Node] = field(default_factory=set)

    def promised(self, node: Node, promise: Promise) -> bool:
        """A promise came; whether it is the one from which on there is a proposal."""
        if promise.ballot != self.ballot or self._proposal is not None:
            return False
        self._promises[node] = promise.vote
        if not self.view.is_quorum(self._promises, self.even_split):
            return False
        self._proposal = Vote(self.ballot, choice(self._promises, self.wanted))
        return True

    def accepted(self, node: Node, accepted: Accepted) -> ClusterView | None:
        """A vote came; the new view once it has been chosen."""
        if accepted.ballot != self.ballot or self._proposal is None:
            return None
        self._accepted.add(node)
        if not self.view.is_quorum(self._accepted, self.even_split):
            return None
        return self.view.next(self._proposal.members)

    def outstanding(self) -> tuple[Prepare | Accept, list[Node]]:
        """What is to be sent, again if need be, and to whom."""
        epoch = self.view.epoch + 1
        if self._proposal is None:
            return Prepare(epoch, self.ballot), [n for n in self.view.members if n not in self._promises]
        return Accept(epoch, self._proposal), [n for n in self.view.members if n not in self._accepted]


def choice(promises: Mapping[Node, Vote | None], wanted: tuple[Node, ...]) -> tuple[Node, ...]:
    """The value that is safe to propose: that of the highest vote among the promises, else the wanted one."""
    votes = [vote for vote in promises.values() if vote is not None]
    return max(votes, key=lambda vote: vote.ballot).members if votes else wanted
