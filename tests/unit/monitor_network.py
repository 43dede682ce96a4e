"""A network of cluster members in simulated time, which loses, delays and reorders messages and watches the rules."""

from __future__ import annotations

import heapq
import itertools
import random

from chaos_mpi.monitor.ballots import NO_BALLOT
from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.member import Member, State
from chaos_mpi.monitor.messages import Ballot, Decided, JoinRequest, Message, Sent

START_S = 1000.0


class Joiner:
    """A node that asks to join until a view has it."""

    def __init__(self, me: Node, contacts: list[Node]) -> None:
        self.me, self._contacts = me, contacts

    def tick(self) -> list[Sent]:
        return [Sent(node, JoinRequest()) for node in self._contacts if node != self.me]


class Network:
    """Members with clocks of their own, and messages between them. After every event the safety rules are checked.

    Args:
        names: the machines of the first view.
        timing: limits.
        seed: of delays, losses and clocks.
        witness: name of a further machine, which has no rank.
    """

    def __init__(self, names: list[str], timing: Timing, seed: int = 0, witness: str | None = None) -> None:
        self.timing, self._rng = timing, random.Random(seed)
        self.now_s = START_S
        nodes = tuple(Node(name) for name in names)
        voice = Node(witness) if witness is not None else None
        self.first = ClusterView(0, nodes if voice is None else (*nodes, voice), witness=voice)
        self._clocks: dict[Node, tuple[float, float]] = {}
        self.members: dict[Node, Member] = {}
        self.joiners: dict[Node, Joiner] = {}
        self.paused: set[Node] = set()
        self.cut: set[tuple[Node, Node]] = set()  # from, to
        self.loss = 0.0
        self.delay_s = (0.0005, 0.002)
        self.chosen: dict[int, ClusterView] = {0: self.first}
        self.bytes_sent: dict[Node, int] = {}
        self._votes: dict[tuple[int, Ballot], set[Node]] = {}
        self._wires: list[tuple[float, int, Node, Node, Message]] = []
        self._ticks_s: dict[Node, float] = {}
        self._waiting: dict[Node, list[tuple[Node, Message]]] = {}
        self._numbers = itertools.count()
        self.delivered = 0
        for node in self.first.members:
            self._start(node, self.first)

    def clock_s(self, node: Node) -> float:
        """What the clock of a node shows."""
        offset_s, rate = self._clocks[node]
        return offset_s + rate * self.now_s

    def _start(self, node: Node, view: ClusterView) -> None:
        # Two clocks differ by less than the drift that the timing allows for.
        half = self.timing.drift / 2
        self._clocks.setdefault(node, (self._rng.uniform(0, 1e4), self._rng.uniform(1 - half, 1 + half * 0.99)))
        self.members[node] = Member(node, view, self.timing, self.clock_s(node))
        self._ticks_s[node] = self.now_s

    def join(self, node: Node) -> None:
        """A node that is no member begins to ask."""
        self.joiners[node] = Joiner(node, sorted(self.members))
        self._ticks_s[node] = self.now_s

    def crash(self, node: Node) -> None:
        """Power off."""
        self.members.pop(node, None)
        self.joiners.pop(node, None)
        self._ticks_s.pop(node, None)
        self.paused.discard(node)

    def pause(self, node: Node) -> None:
        """SIGSTOP."""
        self.paused.add(node)

    def resume(self, node: Node) -> None:
        """SIGCONT: all that came meanwhile is read at once."""
        self.paused.discard(node)
        for sender, message in self._waiting.pop(node, []):
            self._receive(sender, node, message)

    def partition(self, *sides: list[Node]) -> None:
        """Cut every link between the sides."""
        for one, other in itertools.permutations(sides, 2):
            self.cut |= set(itertools.product(one, other))

    def cut_link(self, one: Node, other: Node) -> None:
        """Cut both directions."""
        self.cut |= {(one, other), (other, one)}

    def heal(self) -> None:
        """No link is cut, nothing gets lost or late, and nobody is paused."""
        self.cut.clear()
        self.loss, self.delay_s = 0.0, (0.0005, 0.002)
        for node in sorted(self.paused):
            self.resume(node)

    def state(self, node: Node) -> State:
        """Whether a node acts now."""
        return self.members[node].status(self.clock_s(node)).state

    def going(self) -> list[Node]:
        """Those that act now."""
        return [node for node in sorted(self.members) if self.state(node) is State.GOING]

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end_s = self.now_s + seconds
        while True:
            ticking = [(at_s, node) for node, at_s in self._ticks_s.items() if node not in self.paused]
            tick_s, ticker = min(ticking, default=(float("inf"), self.first.members[0]))
            wire_s = self._wires[0][0] if self._wires else float("inf")
            if min(tick_s, wire_s) > end_s:
                self.now_s = end_s
                return
            self.now_s = max(self.now_s, min(tick_s, wire_s))
            if wire_s <= tick_s:
                _, _, sender, to, message = heapq.heappop(self._wires)
                if (sender, to) not in self.cut:
                    self._arrive(sender, to, message)
            else:
                self._tick(ticker)

    def _tick(self, node: Node) -> None:
        if node in self.joiners:
            self._ticks_s[node] = self.now_s + self.timing.beat_s
            self._send(node, self.joiners[node].tick())
            return
        member = self.members[node]
        self._send(node, member.tick(self.clock_s(node)))
        offset_s, rate = self._clocks[node]
        self._ticks_s[node] = max(self.now_s + 1e-4, (member.due_s(self.clock_s(node)) - offset_s) / rate)
        self._check(node)

    def _arrive(self, sender: Node, to: Node, message: Message) -> None:
        if to in self.paused:
            self._waiting.setdefault(to, []).append((sender, message))
        else:
            self._receive(sender, to, message)

    def _receive(self, sender: Node, to: Node, message: Message) -> None:
        self.delivered += 1
        if to in self.joiners and isinstance(message, Decided) and to in message.view.members:
            del self.joiners[to]
            self._start(to, message.view)
        elif to in self.members:
            member = self.members[to]
            self._send(to, member.receive(sender, message, self.clock_s(to)))
            offset_s, rate = self._clocks[to]
            due_s = (member.due_s(self.clock_s(to)) - offset_s) / rate
            self._ticks_s[to] = min(self._ticks_s[to], max(self.now_s + 1e-4, due_s))
            self._check(to)

    def _send(self, sender: Node, messages: list[Sent]) -> None:
        for to, message in messages:
            if self._rng.random() >= self.loss:
                at_s = self.now_s + self._rng.uniform(*self.delay_s)
                heapq.heappush(self._wires, (at_s, next(self._numbers), sender, to, message))

    def _check(self, node: Node) -> None:
        """Safety: one view for each epoch, and nobody acts whom the newest view leaves out.

        So all that act are members of the newest view: there are never two halves of them.
        """
        member = self.members[node]
        # Its own vote, if it was the last that was missing, is no longer to be seen, but the view is.
        known = self.chosen.setdefault(member.view.epoch, member.view)
        assert known == member.view, f"two views of epoch {known.epoch}: {known} and {member.view}"
        vote = member.acceptor.vote
        if vote is not None and vote.ballot > NO_BALLOT:
            voters = self._votes.setdefault((member.acceptor.epoch, vote.ballot), set())
            voters.add(node)
            if member.view.is_quorum(voters, self.timing.even_split):
                view = member.view.next(vote.members)
                assert self.chosen.setdefault(view.epoch, view) == view, f"two views chosen for epoch {view.epoch}"
        newest = self.chosen[max(self.chosen)]
        for other in self.members:
            if self.state(other) is State.GOING:
                held = self.members[other].view.epoch
                for epoch in range(held + 1, newest.epoch + 1):
                    assert other in self.chosen[epoch].members, f"{other} acts in {held}, but is out in epoch {epoch}"
