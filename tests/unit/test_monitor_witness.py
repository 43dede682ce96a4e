"""A member without a rank, which says which of two hosts goes on: what may be lost, in which order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monitor_network import Network

from chaos_mpi.monitor.cluster import Node, Timing
from chaos_mpi.monitor.member import State

A, B = TWO = tuple(Node(name) for name in "ab")
#: A name before, and one after those of the ranks: it is to make no difference.
NAMES = ["0", "w"]


def network(witness: str, ranks: str = "ab", even_split: str = "lowest", seed: int = 0) -> Network:
    net = Network(list(ranks), Timing(heal_s=1.0, give_up_s=4.0, even_split=even_split), seed, witness)
    net.run(1.0)
    assert net.going() == list(net.first.members)
    return net


def training(net: Network) -> list[Node]:
    """The ranks that act."""
    return [node for node in net.going() if node != net.first.witness]


@pytest.mark.parametrize("even_split", ["lowest", "none"])
@pytest.mark.parametrize("witness", NAMES)
@pytest.mark.parametrize(("lost", "left"), [(A, B), (B, A)])
def test_either_of_two_may_be_lost_and_the_witness_after_it(
    lost: Node, left: Node, witness: str, even_split: str
) -> None:
    net = network(witness, even_split=even_split)
    net.crash(lost)
    net.run(1.0)
    assert training(net) == [left]
    net.crash(Node(witness))
    net.run(10.0)
    assert training(net) == [left]


@pytest.mark.parametrize("witness", NAMES)
@pytest.mark.parametrize(("lost", "going"), [(A, []), (B, [A])])
def test_after_the_loss_of_the_witness_it_is_as_without_one(lost: Node, going: list[Node], witness: str) -> None:
    net = network(witness)
    net.crash(Node(witness))
    net.run(1.0)
    assert training(net) == list(TWO)
    net.crash(lost)
    net.run(10.0)
    assert training(net) == going


@pytest.mark.parametrize("witness", NAMES)
@pytest.mark.parametrize("left", TWO)
def test_when_the_witness_and_one_of_two_are_lost_at_once_nobody_goes_on(left: Node, witness: str) -> None:
    """For all that the one that is left knows, they go on without it."""
    net = network(witness)
    net.crash(Node(witness))
    net.crash(*(set(TWO) - {left}))
    net.run(10.0)
    assert training(net) == []
    assert net.state(left) is State.STOPPED


@pytest.mark.parametrize("witness", NAMES)
@pytest.mark.parametrize(("one", "other"), [(A, B), (B, A)])
def test_of_two_that_lose_each_other_that_goes_on_which_reaches_the_witness(
    one: Node, other: Node, witness: str
) -> None:
    net = network(witness)
    net.partition([one, Node(witness)], [other])
    net.run(10.0)
    assert training(net) == [one]
    assert net.state(other) is State.STOPPED


@pytest.mark.parametrize("witness", NAMES)
def test_of_two_that_both_reach_the_witness_the_later_goes_unless_the_link_heals(witness: str) -> None:
    net = network(witness)
    net.cut_link(A, B)
    net.run(0.9)
    net.heal()
    net.run(2.0)
    assert training(net) == list(TWO)
    net.cut_link(A, B)
    net.run(3.0)
    assert training(net) == [A]


@pytest.mark.parametrize("witness", NAMES)
def test_a_witness_that_only_one_reaches_goes_rather_than_the_other(witness: str) -> None:
    net = network(witness)
    net.cut_link(A, Node(witness))
    net.run(5.0)
    assert training(net) == list(TWO)
    assert net.members[A].view.witness is None


@pytest.mark.parametrize("witness", NAMES)
def test_of_three_any_two_go_on_when_the_witness_is_lost_with_the_third(witness: str) -> None:
    for lost in "abc":
        net = network(witness, "abc")
        net.crash(Node(lost))
        net.crash(Node(witness))
        net.run(2.0)
        assert training(net) == [Node(name) for name in "abc" if name != lost]


@pytest.mark.parametrize("witness", NAMES)
def test_a_newcomer_learns_of_the_witness_and_counts_on_it(witness: str) -> None:
    net = network(witness, "a")
    net.join(B)
    net.run(1.0)
    assert training(net) == list(TWO)
    net.crash(A)
    net.run(1.0)
    assert training(net) == [B]


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.sampled_from(["ab", "abc", "abcd"]),
    witness=st.sampled_from(NAMES),
    even_split=st.sampled_from(["lowest", "none"]),
    seed=st.integers(0, 2**16),
    events=st.lists(
        st.tuples(st.sampled_from(["crash", "pause", "resume", "cut", "heal"]), st.integers(0, 9),
                  st.sampled_from([0.0, 0.1, 0.6, 2.0])),
        max_size=8,
    ),
)  # fmt: skip
def test_there_are_never_two_halves(
    ranks: str, witness: str, even_split: str, seed: int, events: list[tuple[str, int, float]]
) -> None:
    """The network checks at every message; here that those who act at one time would know each other as members."""
    net = network(witness, ranks, even_split, seed)
    for kind, number, wait_s in events:
        nodes = sorted(net.members)
        node, other = nodes[number % len(nodes)], nodes[(number // 3) % len(nodes)]
        if kind == "crash" and len(nodes) > 1:
            net.crash(node)
        elif kind == "cut" and node != other:
            net.cut_link(node, other)
        elif kind == "heal":
            net.heal()
        elif kind in ("pause", "resume"):
            getattr(net, kind)(node)
        net.run(wait_s)
        newest = net.chosen[max(net.chosen)]
        assert set(net.going()) <= set(newest.members)
