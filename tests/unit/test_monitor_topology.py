"""Links, probes, and what gossip spreads."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.monitor.cluster import Node
from chaos_mpi.monitor.gossip import Gossip, Record
from chaos_mpi.monitor.topology import LinkEstimate, ProbePlan, next_probe

A, B = Node("a"), Node("b")


def test_bandwidth_follows_real_transfers() -> None:
    link = LinkEstimate().with_transfer(10_000_000, 0.1, 1.0)
    assert link.bytes_per_s == 1e8
    for second in range(2, 60):
        link = link.with_transfer(1_000_000, 0.1, float(second))
    assert link.bytes_per_s == pytest.approx(1e7, rel=0.05)


def test_one_probe_moves_a_measured_bandwidth_little() -> None:
    link = LinkEstimate().with_transfer(10_000_000, 0.1, 1.0).with_transfer(32_768, 0.01, 500.0, probe=True)
    assert link.bytes_per_s is not None
    assert link.bytes_per_s > 0.75e8


def test_short_transfers_are_use_and_no_measurement() -> None:
    link = LinkEstimate().with_transfer(500, 0.001, 3.0)
    assert (link.bytes_per_s, link.used_s) == (None, 3.0)


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


@given(
    st.integers(1, 1_000_000), st.floats(100, 10_000), st.floats(0, 60), st.lists(st.floats(0, 20), max_size=60),
    st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_probes_stay_under_their_rate(
    nbytes: int, rate: float, every_s: float, waits_s: list[float], answered: bool
) -> None:
    plan = ProbePlan(nbytes, rate, every_s, idle_s=0.0)
    link, probed_s, now_s, probes = LinkEstimate(), -math.inf, 0.0, []
    for wait_s in waits_s:
        now_s += wait_s
        if next_probe(plan, [(B, link, probed_s)], now_s) == B:
            probes.append(now_s)
            probed_s = now_s
            link = link.with_transfer(nbytes, 0.01, now_s, probe=True) if answered else link
    if len(probes) > 1:
        assert (len(probes) - 1) * nbytes <= rate * (probes[-1] - probes[0]) * (1 + 1e-9)


def test_only_idle_links_of_which_nothing_is_new_are_probed() -> None:
    plan = ProbePlan(every_s=30.0, idle_s=1.0)
    busy = LinkEstimate().with_transfer(100, 0.1, 99.5)
    fresh = LinkEstimate().with_transfer(1_000_000, 0.1, 90.0)
    stale = LinkEstimate().with_transfer(1_000_000, 0.1, 60.0)
    assert next_probe(plan, [(A, busy, -math.inf), (B, fresh, -math.inf)], 100.0) is None
    assert next_probe(plan, [(A, fresh, -math.inf), (B, stale, -math.inf)], 100.0) == B
    assert next_probe(plan, [(A, busy, -math.inf), (B, stale, -math.inf)], 101.0) == A


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
