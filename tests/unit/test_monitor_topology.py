"""Round-trip times, probes, and what gossip spreads."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.monitor.gossip import Gossip, Record
from chaos_mpi.monitor.topology import LinkEstimate, ProbePlan, Probes


@given(st.lists(st.floats(0, 10), min_size=1))
def test_a_smoothed_round_trip_stays_among_the_measured(samples_s: list[float]) -> None:
    link = LinkEstimate()
    for sample_s in samples_s:
        link = link.with_rtt(sample_s)
    assert link.rtt_s is not None
    assert min(samples_s) - 1e-9 <= link.rtt_s <= max(samples_s) + 1e-9


def test_a_round_trip_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rtt_s is -1"):
        LinkEstimate().with_rtt(-1.0)


@given(st.lists(st.floats(0, 20), max_size=60), st.none() | st.floats(1.0, 1e10))
def test_probes_are_few_and_short(waits_s: list[float], bytes_per_s: float | None) -> None:
    plan = ProbePlan()
    nbytes, probes, now_s = plan.nbytes(bytes_per_s), [0.0], 0.0
    assert plan.least_bytes <= nbytes <= plan.most_bytes
    assert bytes_per_s is None or nbytes <= max(plan.least_bytes, plan.aim_s * bytes_per_s + 1)
    for wait_s in waits_s:
        now_s += wait_s
        if plan.next([("b", probes[-1])], now_s) == "b":
            probes.append(now_s)
    assert all(later - earlier >= plan.every_s for earlier, later in itertools.pairwise(probes))


def test_the_link_of_which_nothing_was_learnt_for_longest_is_probed() -> None:
    plan = ProbePlan(every_s=30.0)
    assert plan.next([("a", 10.0), ("b", 20.0)], 39.0) is None
    assert plan.next([("a", 10.0), ("b", 20.0)], 40.0) == "a"
    assert plan.next([("a", 21.0), ("b", 20.0)], 60.0) == "b"


def test_a_probe_shows_that_a_slow_link_has_recovered() -> None:
    probes = Probes()
    assert probes.answered(16_000, 0.0165, 0.0005, bytes_per_s=1e5) == pytest.approx(1e6)


@given(st.integers(1, 10**6), st.floats(0, 10), st.floats(0, 1), st.floats(1, 1e10))
def test_no_probe_makes_a_link_slower_than_transfers_have_shown_it(
    nbytes: int, seconds: float, rtt_s: float, bytes_per_s: float
) -> None:
    rate = Probes().answered(nbytes, seconds, rtt_s, bytes_per_s)
    assert rate is not None
    assert rate >= bytes_per_s


def test_an_unused_link_is_slow_when_probes_say_so_again_and_again() -> None:
    probes = Probes()
    slow = [probes.answered(2000, seconds, 0.001, None) for seconds in (0.021, 0.026, 0.041, 0.031, 0.029)]
    assert slow == [None] * 4 + [pytest.approx(1e5)]
    assert probes.answered(2000, 0.001, 0.001, None) is None, "it was the hosts that were slow"
    assert probes.answered(2000, 0.021, 0.001, None) is None


@given(st.permutations(range(6)))
def test_the_highest_version_wins_in_any_order(order: list[int]) -> None:
    gossip: Gossip[str] = Gossip("me")
    for version in order:
        gossip.receive([Record("other", version, b"%d" % version)])
    assert gossip.records["other"] == Record("other", 5, b"5")


def test_nobody_else_speaks_for_a_node() -> None:
    gossip: Gossip[str] = Gossip("me")
    gossip.publish(b"mine")
    gossip.receive([Record("me", 99, b"theirs")])
    assert gossip.records["me"].payload == b"mine"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a record of 216 bytes does not fit into 100"):
        Gossip("me", budget_bytes=100).publish(b"x" * 200)


@given(st.integers(2, 24), st.integers(1, 4), st.sampled_from([0.0, 0.3]), st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_all_come_to_know_all_and_no_message_is_over_budget(count: int, fan_out: int, loss: float, seed: int) -> None:
    rng = random.Random(seed)
    nodes = {i: Gossip(i, fan_out, budget_bytes=200) for i in range(count)}
    for i, node in nodes.items():
        node.publish(b"node %02d" % i + bytes(20))
    for _ in range(300):
        for i, node in nodes.items():
            sent = node.next_round([j for j in nodes if j != i], rng)
            assert len(sent) <= fan_out
            for to, records in sent:
                assert sum(record.nbytes for record in records) <= 200
                if rng.random() >= loss:
                    nodes[to].receive(records)
    assert all(len(node.records) == count for node in nodes.values())
