"""Detours round cut links, decided by agents that hear each other over a network in simulated time."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.membership import host_of
from chaos_mpi.monitor.cluster import Node, Timing
from chaos_mpi.monitor.detours import LEASE_S, STEADY_S, Detours, Said
from chaos_mpi.monitor.hostlinks import CUT, DETOUR, DOWN, UP, Ends, LinkStatus, Order, ends_of, sight_of
from chaos_mpi.monitor.reachability import Diagnosis, Hearing

TIMING = Timing(limit_s=0.5)
LATE_S, SUSPECT_S, TICK_S = 0.2, 0.3, 0.05
TRY_S = 1.0


class Bed:
    """Hosts with agents, links that can be cut, and the routes and the forwarding that the agents want.

    Args:
        members: ``host:pid``.
        seed: of the order in which agents act.
        witness: the member that has no rank, if there is one.
    """

    def __init__(self, *members: str, seed: int = 0, witness: str | None = None) -> None:
        self.now_s, self.witness = 100.0, witness
        self.members = list(members)
        nodes = tuple(sorted(Node(member) for member in members))
        self.hearing = {member: Hearing(Node(member), nodes, TIMING, self.now_s) for member in members}
        self.agents = {member: Detours(member, TRY_S) for member in members}
        self.cut: set[Ends] = set()
        self.mute: set[tuple[str, str]] = set()  # from, to: heartbeats do not arrive
        self.deaf: set[str] = set()  # hosts that cannot forward, and do not know it
        self.ended: dict[str, float] = {}  # ranks whose agents go later, and when
        self.said: dict[str, list[LinkStatus]] = {member: [] for member in members}
        self._rng = random.Random(seed)
        self._ticks = itertools.count()

    def hosts(self) -> set[str]:
        return {host_of(member) for member in self.members}

    def way(self, one: str, other: str) -> str:
        """Through which host packets from one to another go; empty for none."""
        ways = [
            self.agents[member].ways[other]
            for member in (*self.members, *self._lingering())
            if host_of(member) == one and other in self.agents[member].ways
        ]
        return ways[0].via if ways else ""

    def forwards(self, host: str) -> bool:
        present = [member for member in (*self.members, *self._lingering()) if host_of(member) == host]
        return host not in self.deaf and any(self.agents[member].forwards for member in present)

    def _lingering(self) -> list[str]:
        return [member for member, until_s in self.ended.items() if until_s > self.now_s]

    def arrives(self, one: str, other: str) -> bool:
        via = self.way(one, other)
        if not via:
            return ends_of(one, other) not in self.cut
        hops = {ends_of(one, via), ends_of(via, other)}
        return via in self.hosts() and self.forwards(via) and hops.isdisjoint(self.cut)

    def connected(self, one: str, other: str) -> bool:
        return self.arrives(one, other) and self.arrives(other, one)

    def send(self, sender: str, messages: list[Said]) -> None:
        waiting = [(sender, said) for said in messages]
        while waiting:
            origin, (to, fields) = waiting.pop(0)
            if to in self.members and self.arrives(host_of(origin), host_of(to)):
                waiting += [(to, said) for said in self.agents[to].receive(origin, fields, self.now_s)]

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            beats = next(self._ticks) % 2 == 0
            for member in self._rng.sample(self.members, len(self.members)):
                agent, hearing = self.agents[member], self.hearing[member]
                if beats:
                    rows = hearing.rows_to_send(self.now_s)
                    for other in self.members:
                        way = (agent.host, host_of(other))
                        if other != member and way not in self.mute and self.arrives(*way):
                            self.hearing[other].heard(Node(member), self.now_s, rows, self.now_s)
                late = sight_of(hearing.diagnosis(self.now_s, LATE_S), self.witness)
                for other in agent.to_probe(late):
                    works = self.connected(agent.host, other)
                    agent.probed(other, works, self.now_s)
                for other in agent.ways:
                    agent.probed(other, ends_of(agent.host, other) not in self.cut, self.now_s)
                sight = sight_of(hearing.diagnosis(self.now_s, SUSPECT_S), self.witness)
                self.send(member, agent.tick(sight, self.now_s))
                self.said[member] += agent.changes()

    def die(self, member: str) -> None:
        self.members.remove(member)

    def end(self, member: str) -> None:
        """Its agent takes its routes away some time later."""
        self.die(member)
        self.ended[member] = self.now_s + 1.5


def states(bed: Bed, member: str) -> list[tuple[str, str]]:
    """What an agent has said of links. The far end of one that is cut may hear of it only when there is a detour."""
    said = [key for key, _ in itertools.groupby((status.state, status.via) for status in bed.said[member])]
    return [(CUT, ""), *said] if host_of(member) == "b" and said[:1] != [(CUT, "")] else said


def test_the_host_of_the_witness_passes_on_only_what_nobody_else_can() -> None:
    bed = Bed("b:1", "c:1", "d:1", "a:9", witness="a:9")
    bed.run(1.0)
    bed.cut = {("b", "c")}
    bed.run(2.0)
    assert bed.way("b", "c") == bed.way("c", "b") == "d"
    bed.die("d:1")
    bed.run(4.0)
    assert bed.way("b", "c") == bed.way("c", "b") == "a"
    assert bed.connected("b", "c")


def test_links_to_the_witness_are_not_healed() -> None:
    bed = Bed("b:1", "c:1", "a:9", witness="a:9")
    bed.run(1.0)
    bed.cut = {("a", "b")}
    bed.run(3.0)
    assert not bed.way("a", "b") and not bed.way("b", "a")
    assert not any(bed.said.values())


def test_a_cut_link_goes_round_by_the_same_host_both_ways() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1")
    bed.run(1.0)
    bed.cut = {("a", "b")}
    bed.run(0.6)
    assert bed.connected("a", "b")
    assert bed.way("a", "b") == bed.way("b", "a") == "c"
    assert [host for host in "abcd" if bed.forwards(host)] == ["c"]
    bed.run(10.0)
    assert all(states(bed, member) == [(CUT, ""), (DETOUR, "c")] for member in bed.members)
    assert all(bed.agents[member].links == {("a", "b"): (("a", "b"), DETOUR, "c", "")} for member in bed.members)


def test_nothing_is_done_where_nothing_is_wrong() -> None:
    bed = Bed("a:1", "a:2", "b:1", "c:1")
    bed.run(5.0)
    assert not any(bed.said.values())
    assert not any(agent.ways or agent.forwards for agent in bed.agents.values())


def test_the_direct_way_is_taken_again_when_it_has_worked_for_a_while() -> None:
    bed = Bed("a:1", "b:1", "c:1")
    bed.cut = {("a", "b")}
    bed.run(2.0)
    bed.cut = set()
    bed.run(STEADY_S / 2)
    bed.cut = {("a", "b")}
    bed.run(STEADY_S)
    assert bed.connected("a", "b")
    bed.cut = set()
    bed.run(STEADY_S + LEASE_S + 1.0)
    assert not any(agent.ways or agent.forwards or agent.links for agent in bed.agents.values())
    assert all(states(bed, member) == [(CUT, ""), (DETOUR, "c"), (UP, "")] for member in bed.members)


def test_the_next_host_is_tried_where_one_is_of_no_use() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1", "e:1")
    bed.deaf = {"c"}
    bed.agents["d:1"].can_forward = False
    bed.cut = {("a", "b")}
    bed.run(0.4 + TRY_S + 0.6)
    assert bed.connected("a", "b")
    assert bed.way("a", "b") == bed.way("b", "a") == "e"


def test_a_host_that_finds_that_it_cannot_forward_says_so() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1")
    bed.cut = {("a", "b")}
    bed.run(1.0)
    bed.send("c:1", bed.agents["c:1"].refuse_to_forward())
    bed.run(1.0)
    assert bed.connected("a", "b")
    assert bed.way("a", "b") == "d"


def test_who_is_a_detour_is_replaced_when_it_dies() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1")
    bed.cut = {("a", "b")}
    bed.run(1.0)
    bed.die("c:1")
    bed.run(1.0)
    assert bed.connected("a", "b")
    assert bed.way("a", "b") == bed.way("b", "a") == "d"


def test_a_detour_does_not_lead_over_another() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1")
    bed.cut = {("a", "b")}
    bed.run(1.0)
    bed.cut |= {("a", "d")}
    bed.run(2.0)
    assert bed.way("a", "d") == "c"  # not b, to which it has none itself
    bed.cut |= {("b", "c")}
    bed.run(3.0)
    assert all(bed.way(one, other) != "b" for one, other in itertools.permutations("abcd", 2))


@pytest.mark.parametrize("last", ["a:1", "b:1", "c:1"])
def test_another_rank_of_a_host_takes_over(last: str) -> None:
    """And the detour stays as it is."""
    bed = Bed("a:1", "a:2", "b:1", "b:2", "c:1", "c:2")
    bed.cut = {("a", "b")}
    bed.run(1.0)
    bed.end(last)
    for _ in range(40):
        bed.run(0.25)
        assert bed.connected("a", "b")
    assert all(states(bed, member)[-1] == (DETOUR, "c") for member in bed.members)


def test_an_agent_that_is_only_late_has_no_cut_link() -> None:
    """Its host still takes connections."""
    bed = Bed("a:1", "b:1", "c:1")
    bed.run(1.0)
    bed.mute = {("b", "a")}
    bed.run(2.0)
    assert not any(bed.said.values())
    bed.mute, bed.cut = set(), {("a", "b")}
    bed.run(1.0)
    assert states(bed, "a:1")[-1] == (DETOUR, "c")


def test_a_detour_that_fails_is_left_at_once_where_the_direct_way_works() -> None:
    """Else the host at its end would seem to be dead."""
    bed = Bed("a:1", "b:1", "c:1")
    bed.cut = {("b", "c")}
    bed.run(1.0)
    bed.cut = set()
    bed.run(0.5)
    assert bed.way("b", "c") == bed.way("c", "b") == "a"
    bed.cut = {("a", "b")}
    bed.run(0.5)
    assert bed.connected("b", "c")


def test_a_host_that_dies_is_no_cut_link() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1", seed=3)
    bed.run(1.0)
    bed.die("d:1")
    bed.run(3.0)
    assert not any(bed.said.values())


def test_a_host_that_may_not_set_routes_says_what_is_cut() -> None:
    bed = Bed("a:1", "b:1", "c:1")
    bed.agents["a:1"].can_route = False
    bed.cut = {("a", "b")}
    bed.run(5.0)
    assert all(states(bed, member) == [(CUT, "")] for member in bed.members)
    assert not any(agent.ways or agent.forwards for agent in bed.agents.values())
    bed.cut = set()
    bed.run(1.0)
    assert states(bed, "a:1")[-1] == states(bed, "c:1")[-1] == (UP, "")


def why_none(bed: Bed, member: str) -> list[str]:
    """Why there is no detour, as an agent has said it in the course of time."""
    return [key for key, _ in itertools.groupby(status.no_detour for status in bed.said[member]) if key]


def test_all_are_told_why_there_is_no_detour() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1")
    bed.deaf, bed.agents["d:1"].can_forward = {"c"}, False
    bed.cut = {("a", "b")}
    bed.run(10.0)
    for member in ("a:1", "c:1", "d:1"):
        assert why_none(bed, member) == ["c was of no use, d cannot pass it on"]
        assert bed.agents[member].links[("a", "b")].state == CUT
    bed.deaf = set()
    bed.run(6.0)
    assert all(bed.agents[member].links[("a", "b")] == (("a", "b"), DETOUR, "c", "") for member in bed.members)


def order(bed: Bed, down: bool) -> None:
    """Somebody says to all whether the link of a and b is to be used."""
    for member in bed.members:
        bed.agents[member].order({("a", "b"): Order(bed.now_s, "c:1", down)})


def test_why_there_cannot_be_a_detour() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1")
    bed.agents["a:1"].can_route = False
    bed.cut = {("a", "b")}
    bed.run(5.0)
    assert why_none(bed, "a:1") == why_none(bed, "c:1") == ["a may not set routes"]
    bed.cut = set()
    bed.run(5.0)
    assert not any(agent.links for agent in bed.agents.values())
    two = Bed("a:1", "b:1")
    order(two, True)
    two.run(5.0)
    assert why_none(two, "a:1") == why_none(two, "b:1") == ["there is no third host that reaches both"]
    order(two, False)
    two.run(1.0)
    assert not any(agent.links for agent in two.agents.values())


def test_a_link_that_is_not_to_be_used_goes_round_until_it_is() -> None:
    bed = Bed("a:1", "b:1", "c:1")
    bed.run(1.0)
    order(bed, True)
    bed.run(0.3)
    assert bed.way("a", "b") == bed.way("b", "a") == "c"
    bed.run(10.0)
    assert bed.way("a", "b") == bed.way("b", "a") == "c"
    assert all([state for state, _ in states(bed, member)][-2:] == [DOWN, DETOUR] for member in bed.members)
    for agent in bed.agents.values():  # one that comes late counts for nothing
        agent.order({("a", "b"): Order(1.0, "b:1", down=False)})
    bed.run(1.0)
    assert bed.way("a", "b") == "c"
    order(bed, False)
    bed.run(STEADY_S + LEASE_S + 1.0)
    assert not any(agent.ways or agent.forwards or agent.links for agent in bed.agents.values())
    assert all(states(bed, member)[-1] == (UP, "") for member in bed.members)


def test_a_link_that_is_not_to_be_used_is_where_there_is_no_detour() -> None:
    bed = Bed("a:1", "b:1")
    order(bed, True)
    bed.run(5.0)
    assert bed.connected("a", "b")
    assert all(states(bed, member)[-1] == (DOWN, "") for member in bed.members)
    order(bed, False)
    bed.run(1.0)
    assert all(states(bed, member)[-1] == (UP, "") for member in bed.members)


def test_no_detour_leads_over_a_link_that_is_not_to_be_used() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1")
    for member in bed.members:
        bed.agents[member].order({("a", "c"): Order(bed.now_s, "d:1", down=True)})
    bed.cut = {("a", "b")}
    bed.run(2.0)
    assert bed.way("a", "b") == bed.way("a", "c") == "d"


def test_faster_detours_are_tried_first() -> None:
    bed = Bed("a:1", "b:1", "c:1", "d:1")
    bed.agents["a:1"].bytes_per_s = {("a", "c"): 1e6, ("b", "c"): 9e6, ("a", "d"): 2e6, ("b", "d"): 3e6}
    bed.cut = {("a", "b")}
    bed.run(1.0)
    assert bed.way("a", "b") == bed.way("b", "a") == "d"


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_cuts_that_leave_a_host_in_reach_of_all_are_healed(data: st.DataObject) -> None:
    """And all is as before when they are over."""
    hosts = data.draw(st.sampled_from(["abc", "abcd", "abcde"]))
    pid = st.integers(1, 2)
    members = [f"{host}:{number + 1}" for host in hosts for number in range(data.draw(pid))]
    bed = Bed(*members, seed=data.draw(st.integers(0, 99)))
    hub = data.draw(st.sampled_from(hosts))
    pairs = [ends for ends in itertools.combinations(hosts, 2) if hub not in ends]
    bed.run(0.5)
    for _ in range(data.draw(st.integers(1, 3))):
        bed.cut = set(data.draw(st.lists(st.sampled_from(pairs), min_size=1)))
        bed.run(data.draw(st.sampled_from([0.35, 1.0, 4.0])))
    bed.run(12.0)
    for one, other in itertools.combinations(hosts, 2):
        assert bed.connected(one, other), (one, other, bed.cut, bed.way(one, other), bed.way(other, one))
    bed.cut = set()
    bed.run(STEADY_S + LEASE_S + 2.0)
    assert not any(agent.ways or agent.forwards or agent.links for agent in bed.agents.values())


@pytest.mark.parametrize(
    "fields",
    [{}, {"kind": "Links"}, {"kind": "Links", "links": [{"ends": ["a"]}]}, {"kind": "Carries", "ends": ["a", "b"]},
     {"kind": "Links", "links": [{"ends": ["a", "b"]}]}, {"kind": "Links", "links": 3}],
)  # fmt: skip
def test_what_cannot_be_read(fields: dict[str, Any]) -> None:
    agent = Detours("a:1", TRY_S)
    nodes = frozenset({Node("a:1"), Node("b:1")})
    agent.tick(sight_of(Diagnosis(nodes, frozenset(), frozenset(), frozenset())), 0.0)
    with pytest.raises(ValueError, match="b:1"):
        agent.receive("b:1", fields, 0.0)


def test_who_is_no_member_says_nothing() -> None:
    agent = Detours("a:1", TRY_S)
    link = {"ends": ["b", "c"], "state": CUT, "via": "a", "number": 1}
    assert agent.receive("b:1", {"kind": "Links", "links": [link]}, 0.0) == []
    assert not agent.links and not agent.forwards
