"""Node failure, link failure, partition and pause: who goes on."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from monitor_network import Network

from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.member import Member, State
from chaos_mpi.monitor.messages import Decided

A, B, C, D, E = FIVE = tuple(Node(name) for name in "abcde")
TIMING = Timing(limit_s=0.5, heal_s=1.0, give_up_s=8.0)


def network(count: int = 5, timing: Timing = TIMING, seed: int = 0) -> Network:
    net = Network(list("abcdefgh"[:count]), timing, seed)
    net.run(1.0)
    assert net.going() == list(net.first.members)
    return net


def views(net: Network, nodes: list[Node]) -> set[tuple[Node, ...]]:
    return {net.members[node].view.members for node in nodes}


def test_a_healthy_cluster_changes_nothing() -> None:
    net = network()
    net.run(20.0)
    assert net.going() == list(FIVE)
    assert list(net.chosen) == [0]


@pytest.mark.parametrize("outage_s", [0.8, 2.0, 6.0])
@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_an_outage_of_the_whole_network_costs_nobody(count: int, outage_s: float, seed: int) -> None:
    """Links come back one after the other, as connections are made again."""
    net = network(count, seed=seed)
    nodes = list(net.first.members)
    net.partition(*([node] for node in nodes))
    net.run(outage_s)
    links = sorted(net.cut)
    random.Random(seed).shuffle(links)
    for link in links:
        net.cut.discard(link)
        net.run(1.5 / len(links))
    net.run(5.0)
    assert list(net.chosen) == [0]
    assert net.going() == nodes


@pytest.mark.parametrize("dead", [A, E])
def test_who_dies_in_an_outage_of_the_whole_network_is_removed_after_it(dead: Node) -> None:
    net = network()
    net.partition(*([node] for node in FIVE))
    net.run(1.0)
    net.crash(dead)
    net.heal()
    net.run(3.5)
    left = [node for node in FIVE if node != dead]
    assert net.chosen[1].members == tuple(left)
    assert net.going() == left


@pytest.mark.parametrize("dead", FIVE)
def test_a_dead_node_is_removed_within_the_limit_and_a_few_round_trips(dead: Node) -> None:
    net = network()
    net.crash(dead)
    # Clocks differ by a tenth in this network, and two round trips take at most 8 ms; the lowest node may be the dead.
    net.run(0.5 * 1.06 + 0.05)
    left = [node for node in FIVE if node != dead]
    assert net.chosen[1].members == tuple(left)
    assert views(net, left) == {tuple(left)}
    net.run(0.3)
    assert net.going() == left


@pytest.mark.parametrize("first", [0.0, 0.03, 0.09])
def test_two_nodes_that_die_together_are_removed_by_one_change(first: float) -> None:
    net = network()
    net.crash(B)
    net.run(first)
    net.crash(E)
    net.run(1.0)
    assert {epoch: view.members for epoch, view in net.chosen.items()} == {0: FIVE, 1: (A, C, D)}


@pytest.mark.parametrize("minority", [[A, B], [A, D], [D, E], [C]])
def test_the_majority_goes_on_and_the_rest_stop_with_a_reason(minority: list[Node]) -> None:
    net = network()
    majority = [node for node in FIVE if node not in minority]
    net.partition(minority, majority)
    net.run(2.0)
    assert net.going() == majority
    assert views(net, majority) == {tuple(majority)}
    assert {net.state(node) for node in minority} == {State.HOLDING}
    net.run(TIMING.give_up_s)
    for node in minority:
        status = net.members[node].status(net.clock_s(node))
        assert status.state is State.STOPPED
        assert f"{node} was cut off from the majority" in status.reason


@pytest.mark.parametrize(("even_split", "going"), [("lowest", [A, C]), ("none", [])])
def test_an_even_split_goes_to_the_lowest_or_to_nobody(even_split: str, going: list[Node]) -> None:
    net = network(4, Timing(heal_s=1.0, even_split=even_split))
    net.partition([A, C], [B, D])
    net.run(3.0)
    assert net.going() == going


def test_one_after_the_other_down_to_two() -> None:
    net = network()
    for dead, left in ((A, [B, C, D, E]), (D, [B, C, E]), (C, [B, E])):
        net.crash(dead)
        net.run(2.0)
        assert net.going() == left
    net.crash(B)  # half of two, and not the lowest: it cannot tell whether the other lives
    net.run(2.0)
    assert net.going() == []


def test_a_short_pause_is_tolerated() -> None:
    net = network()
    net.pause(B)
    net.run(0.3)
    net.resume(B)
    net.run(2.0)
    assert list(net.chosen) == [0]
    assert net.going() == list(FIVE)


@pytest.mark.parametrize("paused", [A, C])
def test_a_node_that_was_stopped_for_long_learns_that_it_is_out(paused: Node) -> None:
    net = network()
    net.pause(paused)
    net.run(5.0)
    left = [node for node in FIVE if node != paused]
    assert net.going() == left
    net.resume(paused)
    assert net.state(paused) is not State.GOING
    net.run(0.5)
    status = net.members[paused].status(net.clock_s(paused))
    assert status.state is State.STOPPED
    assert f"the others went on without {paused} in epoch 1" in status.reason
    assert net.going() == left


def test_all_nodes_but_one_being_stopped_it_does_not_go_on_alone_and_nobody_judges_on_waking() -> None:
    net = network()
    for node in FIVE[1:]:
        net.pause(node)
    net.run(3.0)
    assert net.going() == []
    net.heal()
    net.run(2.0)
    assert net.going() == list(FIVE)
    assert list(net.chosen) == [0]


def test_a_cut_link_is_told_from_a_dead_node() -> None:
    net = network()
    net.cut_link(B, D)
    net.run(0.9)
    for node in FIVE:
        diagnosis = net.members[node].diagnosis(net.clock_s(node))
        assert diagnosis.cut == {(B, D)}
        assert diagnosis.dead == frozenset()
    assert list(net.chosen) == [0]
    assert net.going() == list(FIVE)


def test_a_link_that_is_healed_in_time_removes_nobody() -> None:
    net = network()
    net.cut_link(B, D)
    net.run(1.2)
    net.heal()
    net.run(3.0)
    assert list(net.chosen) == [0]


@pytest.mark.parametrize("one_way", [False, True])
def test_a_link_that_stays_cut_costs_one_end(one_way: bool) -> None:
    net = network()
    net.cut.add((B, D))
    if not one_way:
        net.cut.add((D, B))
    net.run(4.0)
    assert net.going() == [A, B, C, E]
    assert net.state(D) is State.STOPPED


def test_the_node_with_most_cut_links_goes() -> None:
    net = network()
    for other in (C, D):
        net.cut_link(B, other)
    net.run(4.0)
    assert net.going() == [A, C, D, E]


def test_a_new_life_of_a_machine_joins_and_the_old_one_never() -> None:
    net = network()
    net.crash(C)
    net.run(1.5)
    again = Node("c", 1)
    net.join(C)
    net.run(1.0)
    assert net.going() == [A, B, D, E]
    net.crash(C)
    net.join(again)
    net.run(1.0)
    assert net.going() == [A, B, again, D, E]
    assert views(net, net.going()) == {(A, B, again, D, E)}


def test_a_machine_that_reboots_fast_replaces_its_former_life() -> None:
    net = network()
    net.crash(C)
    net.join(Node("c", 1))
    net.run(1.5)
    assert net.going() == [A, B, Node("c", 1), D, E]


@pytest.mark.parametrize("leavers", [[E], [A], [B, D], [A, B, C, D], [B, C, D, E]])
def test_members_that_leave_vote_themselves_out(leavers: list[Node]) -> None:
    """However many: those that stay need not be a majority, and act until it is decided, and from then on."""
    net = network()
    staying = [node for node in FIVE if node not in leavers]
    for node in leavers:
        net.members[node].leave()
    net.run(0.3)
    assert list(net.chosen) == [0]
    assert set(staying) <= set(net.going())
    net.run(1.5)
    assert views(net, staying) == {tuple(staying)}
    assert {net.state(node) for node in leavers} == {State.STOPPED}
    assert net.going() == staying
    decided = max(net.chosen)
    net.run(2.0)
    assert net.going() == staying
    assert max(net.chosen) == decided


def test_a_leaver_that_dies_is_removed_as_any_other() -> None:
    net = network()
    net.members[D].leave()
    net.run(0.05)
    net.crash(D)
    net.run(1.0)
    assert net.going() == [A, B, C, E]


def test_when_all_leave_nothing_is_decided() -> None:
    net = network(3)
    for node in (A, B, C):
        net.members[node].leave()
    net.run(2.0)
    assert list(net.chosen) == [0]


def test_a_stopped_node_says_no_more() -> None:
    member = Member(A, ClusterView(0, FIVE), TIMING, 0.0)
    member.receive(B, Decided(ClusterView(3, (B, C, D))), 0.1)
    assert member.status(0.1).state is State.STOPPED
    assert member.tick(5.0) == []
    assert member.due_s(5.0) == float("inf")


def test_a_node_must_be_a_member_of_its_view() -> None:
    with pytest.raises(ValueError, match="e is no member"):
        Member(E, ClusterView(0, (A, B)), TIMING, 0.0)


@pytest.mark.parametrize("seed", range(6, 12))
def test_storms_of_cuts_pauses_and_late_messages_never_make_two_sides(seed: int) -> None:
    """Short troubles in quick succession, so that ballots and licences overlap; safety is checked at every event."""
    rng = random.Random(seed)
    timing = Timing(limit_s=0.5, heal_s=0.3, give_up_s=1e6, drift=0.1)
    net = Network(list("abcde"), timing, seed)
    for round_ in range(60):
        nodes = sorted(net.members)
        net.loss, net.delay_s = rng.choice([0.0, 0.1, 0.3]), (0.0005, rng.choice([0.002, 0.05, 0.4, 1.5]))
        net.cut = {(a, b) for a in nodes for b in nodes if a != b and rng.random() < rng.choice([0.0, 0.1, 0.4])}
        if rng.random() < 0.3:
            side = [node for node in nodes if rng.random() < 0.5]
            net.partition(side, [node for node in nodes if node not in side])
        for node in nodes:
            if rng.random() < 0.15:
                net.pause(node)
            elif rng.random() < 0.5:
                net.resume(node)
            if net.state(node) is State.STOPPED:
                net.crash(node)
                net.join(Node(node.name, node.incarnation + 1 + round_))
        net.run(rng.choice([0.05, 0.3, 0.8]))
        if rng.random() < 0.3:
            net.heal()
            net.run(rng.choice([0.3, 1.0]))
    assert max(net.chosen) >= 5


class AnyTrouble(RuleBasedStateMachine):
    """Loss, delay, reordering, cuts, pauses, crashes, joins in any order; the network checks safety at every event."""

    @initialize(
        count=st.integers(2, 6),
        seed=st.integers(0, 2**16),
        even_split=st.sampled_from(["lowest", "none"]),
        give_up_s=st.sampled_from([4.0, 1e6]),
        witness=st.sampled_from([None, "0", "w"]),
    )
    def start(self, count: int, seed: int, even_split: str, give_up_s: float, witness: str | None) -> None:
        timing = Timing(limit_s=0.5, heal_s=1.0, give_up_s=give_up_s, even_split=even_split)
        self.net = Network(list("abcdefgh"[:count]), timing, seed, witness)
        self.incarnations = itertools.count(1)

    def pick(self, number: int) -> Node:
        nodes = sorted(self.net.members)
        return nodes[number % len(nodes)]

    @rule(seconds=st.sampled_from([0.02, 0.2, 0.6, 1.5]))
    def wait(self, seconds: float) -> None:
        self.net.run(seconds)

    @rule(one=st.integers(0, 5), other=st.integers(0, 5), both=st.booleans())
    def cut(self, one: int, other: int, both: bool) -> None:
        self.net.cut.add((self.pick(one), self.pick(other)))
        if both:
            self.net.cut.add((self.pick(other), self.pick(one)))

    @rule(sides=st.lists(st.booleans(), min_size=8, max_size=8))
    def partition(self, sides: list[bool]) -> None:
        nodes = sorted(self.net.members)
        chosen = [node for node, side in zip(nodes, itertools.cycle(sides), strict=False) if side]
        self.net.partition(chosen, [node for node in nodes if node not in chosen])

    @rule(loss=st.sampled_from([0.0, 0.1, 0.5]), slow_s=st.sampled_from([0.002, 0.1, 0.7, 3.0]))
    def disturb(self, loss: float, slow_s: float) -> None:
        self.net.loss, self.net.delay_s = loss, (0.0005, slow_s)

    @rule(number=st.integers(0, 5))
    def pause(self, number: int) -> None:
        self.net.pause(self.pick(number))

    @rule(number=st.integers(0, 5))
    def resume(self, number: int) -> None:
        self.net.resume(self.pick(number))

    @precondition(lambda self: len(self.net.members) > 2)
    @rule(number=st.integers(0, 5))
    def crash(self, number: int) -> None:
        self.net.crash(self.pick(number))

    @rule(number=st.integers(0, 5))
    def leave(self, number: int) -> None:
        self.net.members[self.pick(number)].leave()

    @precondition(lambda self: len(self.net.members) + len(self.net.joiners) < 7)
    @rule(name=st.sampled_from("abcdefgh"))
    def join(self, name: str) -> None:
        self.net.join(Node(name, next(self.incarnations)))

    @rule()
    def heal(self) -> None:
        self.net.heal()

    def teardown(self) -> None:
        if hasattr(self, "net"):
            calm_down(self.net)


def calm_down(net: Network) -> None:
    """Liveness: once the network is stable, a quorum of the newest view comes to one view and acts."""
    net.heal()
    net._wires.clear()
    newest = net.chosen[max(net.chosen)]
    living = [node for node in net.members if net.state(node) is not State.STOPPED]
    living += net.joiners  # those of the newest view will learn that they are in it
    knows = [node for node in living if node in net.members and net.members[node].view == newest]
    net.run(8.0)
    last = net.chosen[max(net.chosen)]
    # What was voted for before the network was stable must still be decided, and may count on nodes that died since.
    able = [view.is_quorum(set(living), net.timing.even_split) for view in (newest, last)]
    # Who was about to give up when the network became stable may do so yet.
    patient = net.timing.give_up_s > 1000
    # Members that leave propose nothing.
    proposers = [node for node in last.members if node in net.members and not net.members[node].leaving]
    if patient and knows and all(able) and proposers:
        going = net.going()
        assert views(net, going) == {last.members}
        assert tuple(going) == last.members
    stuck = [node for node in net.members if net.state(node) is not State.STOPPED and node not in last.members]
    assert not (patient and knows and proposers and stuck)


TestAnyTrouble = AnyTrouble.TestCase
# Runs that failed are not shortened: each takes seconds of simulated trouble, and the steps are told anyway.
TestAnyTrouble.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
