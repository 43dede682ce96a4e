"""One node's part in the agreement on who is in the cluster. Pure: messages and the time go in, messages come out.

Nodes hear each other's heartbeats and tell each other whom they do not hear (:mod:`chaos_mpi.monitor.reachability`).
When somebody is dead, cut off, or new, the lowest node that is alive proposes the next view, and the members of the
*last* view decide on it by Paxos (:mod:`chaos_mpi.monitor.ballots`), one decision for each epoch, as in the
view changes of Viewstamped Replication (Oki and Liskov, PODC 1988). Acting needs a licence
(:mod:`chaos_mpi.monitor.licence`).

**Never two sides.** Claim: a node that has a licence is a member of every view that was agreed on since its own. So
any two nodes with a licence are both members of the newest view: there is one side. Delay, loss and reordering of
messages, and pauses of any length, change nothing about it. Two assumptions are made. The clocks of two nodes run
equally fast within ``Timing.drift``, and go on while a node is paused (CLOCK_MONOTONIC does not while a machine is
suspended; CLOCK_BOOTTIME does). And no node forgets: an agent that starts again is a new incarnation.

1. For each epoch at most one view is chosen (Paxos; any two quorums of a view have a member in common), so the views
   form one chain.
2. Let X have a licence in view e at time t: a quorum S of e has echoed stamps of X from after t - licence. Let the
   view of e + 1, without X, be chosen by the votes of a quorum Q, the last one at time v. Some m is in both. If m is
   X, it has voted for its own removal, which ends its licence. Else m got the stamp after it was sent, and before its
   own vote, because who has voted promises nothing more in e. From then on it promised not to vote against X for
   limit. The licence is shorter than limit, and counts from the sending, so it ended before v. And as no m can renew
   it after its vote, X gets none in e after v.
3. Let e + 1, with X, be chosen at time c, and X not know of it. As in 2, m got the stamp before c, so the licence of X
   in e ends before c + limit. Every voter on e + 2 took on e + 1 after c, and counts as promised to all its members for
   limit from then on. So a view without X is chosen after that end only; likewise for all later epochs.
4. Removal is final: views remember the last incarnation of each machine that is gone, and admit later ones only.

What is begun with a licence may be finished without: a paused node can wake in the middle of an action. So what leaves
a node is to carry the epoch, and others drop what is of an older one; and a training step takes all members of its
view, so none can be finished without those who have moved on.

**It goes on.** When messages among the nodes that are left arrive well within the limit, and these are a quorum of the
last view, the lowest of them gets its proposal through: others wait longer before they try, and each attempt has a
higher ballot. Members that leave vote until they are out, so those that stay need not be a quorum by themselves. Nodes
that have been removed are told when they speak. Who has no licence for ``Timing.give_up_s`` stops.
A node that was stopped itself (SIGSTOP) sees the gap in its own time, and listens again before it judges others.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from chaos_mpi.monitor.ballots import NO_BALLOT, Acceptor, Proposer
from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.licence import Licence
from chaos_mpi.monitor.messages import (
    Accept,
    Accepted,
    Ballot,
    Beat,
    Decided,
    JoinRequest,
    Message,
    Prepare,
    Promise,
    Refused,
    Row,
    Sent,
)
from chaos_mpi.monitor.reachability import Diagnosis, Hearing
from chaos_mpi.monitor.succession import Succession
from chaos_mpi.monitor.topology import LinkEstimate

#: How far apart nodes connect again after an outage, at most: see the reconnect intervals of the agents' mesh.
RECONNECT_S = 2.5


class State(enum.Enum):
    """Whether a node acts."""

    GOING = "going"
    HOLDING = "holding"  # it hears no quorum lately: it begins nothing, and may go on later
    STOPPED = "stopped"  # for good, in this incarnation


@dataclass(frozen=True, slots=True)
class Status:
    """Whether a node acts, and for a person, why not."""

    state: State
    reason: str = ""


class Member:
    """The state machine of one node. To be called for each message, and at the latest at :meth:`due_s`.

    Args:
        me: this node.
        view: the first view, or that which admitted this node; it is a member.
        timing: limits, the same at all nodes.
        now_s: the time, by a clock that never stands still or jumps.

    Attributes:
        leaving: see :meth:`leave`.
        links: round-trip times to the other members, as heartbeats come back.

    Raises:
        ValueError: this node is no member of the view.
    """

    def __init__(self, me: Node, view: ClusterView, timing: Timing, now_s: float) -> None:
        if me not in view.members:
            raise ValueError(f"{me} is no member of the view of epoch {view.epoch}")
        self.me, self.view, self.timing = me, view, timing
        self.acceptor = Acceptor(view.epoch + 1)
        self._hearing = Hearing(me, view.members, timing, now_s)
        self._licence = Licence(me, view, timing, now_s)
        self._succession = Succession(me, view, timing)
        self.links: dict[Node, LinkEstimate] = {}
        self._proposer: Proposer | None = None
        self._highest = NO_BALLOT  # of this epoch, that was seen
        self._stopped, self.leaving = "", False
        self._hears_quorum = True
        self._ran_s = self._next_beat_s = self._next_send_s = self._licensed_s = now_s

    def status(self, now_s: float) -> Status:
        """Whether this node may act at this very time."""
        if self._stopped:
            return Status(State.STOPPED, self._stopped)
        if now_s < self._licence.until_s(now_s):
            return Status(State.GOING)
        return Status(State.HOLDING, f"{self.me} is not heard by a majority of {_names(self.view.members)}")

    def leave(self) -> None:
        """This node acts no more. It votes on until there is a view without it, which ends its part.

        Those that are left may be no majority of the last view, and could not agree on the next without it.
        """
        self.leaving = True
        self._succession.leaving.add(self.me)

    def diagnosis(self, now_s: float, limit_s: float | None = None) -> Diagnosis:
        """What this node thinks of the others, when a silence of ``limit_s`` counts (that of the timing by default)."""
        return self._hearing.diagnosis(now_s, limit_s)

    def due_s(self, now_s: float) -> float:
        """When :meth:`tick` is to be called next."""
        if self._stopped:
            return float("inf")
        soon_s = now_s + self.timing.limit_s / 50
        if self._succession.needed or self.acceptor.asked is not None:
            return min(self._next_beat_s, soon_s)
        return min(self._next_beat_s, max(self._hearing.next_change_s(), soon_s))

    def tick(self, now_s: float) -> list[Sent]:
        """Do what is due."""
        self._notice_pause(now_s)
        if self._stopped:
            return []
        out: list[Sent] = []
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self.timing.beat_s
            out += self._beats(now_s)
        if self.acceptor.asked != self.acceptor.vote:
            out += self._vote_if_free(now_s)
        out += self._propose_if_needed(now_s)
        self._stop_if_alone(now_s)
        return self._deliver_own(out, now_s)

    def receive(self, sender: Node, message: Message, now_s: float) -> list[Sent]:
        """Take in a message."""
        self._notice_pause(now_s)
        return self._deliver_own(self._handle(sender, message, now_s), now_s)

    def _deliver_own(self, messages: list[Sent], now_s: float) -> list[Sent]:
        out, queue = [], list(messages)
        while queue:
            sent = queue.pop(0)
            if sent.to == self.me:
                queue += self._handle(self.me, sent.message, now_s)
            else:
                out.append(sent)
        return out

    def _handle(self, sender: Node, message: Message, now_s: float) -> list[Sent]:
        if self._stopped:
            return []
        news = [Sent(sender, Decided(self.view))]
        if isinstance(message, Decided):
            self._take_on(message.view, now_s)
            return []
        if isinstance(message, JoinRequest):
            return [] if self._succession.asked_to_join(sender, now_s) else news
        if sender not in self.view.members:
            return news if message.epoch <= self.view.epoch else []
        if isinstance(message, Beat):
            self._hear(sender, message, now_s)
            return news if message.epoch < self.view.epoch else []
        if message.epoch != self.view.epoch + 1:
            return news if message.epoch <= self.view.epoch else []
        return self._handle_ballot(sender, message, now_s)

    def _hear(self, sender: Node, beat: Beat, now_s: float) -> None:
        self._hearing.heard(sender, beat.stamp_s, beat.rows, now_s)
        if beat.leaving:
            self._succession.leaving.add(sender)
        if beat.epoch != self.view.epoch:
            return
        asked = self.acceptor.asked
        if not beat.leaving and (asked is None or sender in asked.members):
            self._licence.promise(sender, beat.stamp_s, now_s)
        if beat.echo_s is not None:
            self._licence.echoed(sender, beat.echo_s)
            taken_s = max(0.0, now_s - beat.echo_s - beat.held_s)
            self.links[sender] = self.links.get(sender, LinkEstimate()).with_rtt(taken_s)

    def _handle_ballot(
        self, sender: Node, message: Prepare | Promise | Accept | Accepted | Refused, now_s: float
    ) -> list[Sent]:
        match message:
            case Prepare():
                self._saw(message.ballot, now_s)
                return [Sent(sender, self.acceptor.prepare(message.ballot))]
            case Accept():
                self._saw(message.vote.ballot, now_s)
                refused = self.acceptor.ask(message.vote)
                return self._vote_if_free(now_s) if refused is None else [Sent(sender, refused)]
            case Promise():
                chosen = self._proposer is not None and self._proposer.promised(sender, message)
                return self._send_attempt(now_s) if chosen else []
            case Accepted():
                view = None if self._proposer is None else self._proposer.accepted(sender, message)
                return [] if view is None else self._announce(view, now_s)
            case Refused():
                self._saw(message.promised, now_s)
                return []

    def _saw(self, ballot: Ballot, now_s: float) -> None:
        self._highest = max(self._highest, ballot)
        if ballot.proposer != self.me:
            self._succession.saw_rival(now_s)
            if self._proposer is not None and ballot > self._proposer.ballot:
                self._proposer = None

    def _vote_if_free(self, now_s: float) -> list[Sent]:
        """Vote for what was asked for, once no promise to those who would be out is left."""
        asked = self.acceptor.asked
        if asked is None or now_s < self._licence.free_s(set(self.view.members).difference(asked.members)):
            return []
        accepted = self.acceptor.accept()
        if accepted is None:
            return []
        self._licence.voted(asked.members, now_s)
        return [Sent(asked.ballot.proposer, accepted)]

    def _propose_if_needed(self, now_s: float) -> list[Sent]:
        self._notice_isolation(now_s)
        if self._proposer is not None and now_s - self._proposer.started_s > 2 * self.timing.limit_s:
            self._proposer = None
            self._succession.saw_rival(now_s)
        if self._proposer is not None:
            return self._send_attempt(now_s) if now_s >= self._next_send_s else []
        diagnosis = self._hearing.diagnosis(now_s)
        wanted = self._succession.wanted(diagnosis, self._licence.present, now_s)
        pending = self.acceptor.asked is not None or self.acceptor.vote is not None
        if not self._succession.is_turn(wanted, diagnosis, pending, now_s):
            return []
        ballot = Ballot(self._highest.number + 1, self.me)
        self._proposer = Proposer(self.view, self.timing.even_split, ballot, wanted, now_s)
        return self._send_attempt(now_s)

    def _send_attempt(self, now_s: float) -> list[Sent]:
        if self._proposer is None:
            return []
        self._next_send_s = now_s + self.timing.beat_s
        message, nodes = self._proposer.outstanding()
        return [Sent(node, message) for node in nodes]

    def _announce(self, view: ClusterView, now_s: float) -> list[Sent]:
        told = sorted({*self.view.members, *view.members} - {self.me})
        self._take_on(view, now_s)
        return [Sent(node, Decided(view)) for node in told]

    def _take_on(self, view: ClusterView, now_s: float) -> None:
        if view.epoch <= self.view.epoch:
            return
        if self.me not in view.members:
            self._stop(f"the others went on without {self.me} in epoch {view.epoch}: {_names(view.members)}")
            return
        self.view = view
        self.acceptor = Acceptor(view.epoch + 1)
        self._licence = Licence(self.me, view, self.timing, now_s)
        self._hearing.change_members(view.members, now_s)
        self.links = {node: link for node, link in self.links.items() if node in view.members}
        self._succession.change_view(view)
        self._proposer, self._highest = None, NO_BALLOT
        self._next_beat_s = self._licensed_s = now_s

    def _beats(self, now_s: float) -> list[Sent]:
        rows = self._hearing.rows_to_send(now_s)
        return [Sent(node, self._beat(node, rows, now_s)) for node in self.view.members if node != self.me]

    def _beat(self, node: Node, rows: tuple[Row, ...], now_s: float) -> Beat:
        licence = self._licence
        return Beat(self.view.epoch, now_s, licence.echo_s(node), rows, self.leaving, licence.held_s(node, now_s))

    def _notice_pause(self, now_s: float) -> None:
        """After a pause of this node itself, everybody gets the time to be heard again."""
        if now_s - self._ran_s > self.timing.limit_s / 2:
            self._hearing.listen_again(now_s)
            self._succession.paused()
            self._proposer = None
            self._licensed_s = now_s
        self._ran_s = max(now_s, self._ran_s)

    def _notice_isolation(self, now_s: float) -> None:
        """After a time without a quorum, everybody gets the time to connect again.

        An outage of the whole network ends for some nodes earlier than for others, and whoever was first would put all
        others out, although they live.
        """
        before = self._hears_quorum
        self._hears_quorum = self.view.is_quorum(self._hearing.diagnosis(now_s).alive, self.timing.even_split)
        if self._hears_quorum and not before:
            self._hearing.listen_again(now_s + max(0.0, RECONNECT_S - self.timing.limit_s))
            self._succession.paused()
            self._proposer = None

    def _stop_if_alone(self, now_s: float) -> None:
        if self.status(now_s).state is State.GOING:
            self._licensed_s = now_s
        elif now_s - self._licensed_s > self.timing.give_up_s:
            alive = _names(sorted(self._hearing.diagnosis(now_s).alive))
            self._stop(
                f"{self.me} was cut off from the majority for {self.timing.give_up_s:g} s: of "
                f"{_names(self.view.members)} (epoch {self.view.epoch}) only {alive} could be reached"
            )

    def _stop(self, reason: str) -> None:
        self._stopped = reason
        self._proposer = None


def _names(nodes: Iterable[Node]) -> str:
    return ", ".join(map(str, nodes))
