"""Detours and evictions, rows, quorums, messages."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.cuts import detour, mutually_reachable
from chaos_mpi.monitor.messages import (
    Accept,
    Accepted,
    Ballot,
    Beat,
    Decided,
    JoinRequest,
    Prepare,
    Promise,
    Refused,
    Row,
    Vote,
    from_json,
    to_json,
)
from chaos_mpi.monitor.reachability import Hearing, diagnose

A, B, C, D = FOUR = tuple(Node(name) for name in "abcd")
NODES = tuple(Node(name) for name in "abcdefg")
PAIRS = list(itertools.combinations(NODES, 2))


@given(st.sets(st.sampled_from(PAIRS)))
def test_as_many_as_possible_stay_and_all_of_them_reach_each_other(cut: set[tuple[Node, Node]]) -> None:
    def whole(nodes: tuple[Node, ...]) -> bool:
        return not cut.intersection(itertools.combinations(nodes, 2))

    stay = mutually_reachable(NODES, cut)
    assert whole(tuple(sorted(stay)))
    most = max(n for n in range(8) if any(whole(nodes) for nodes in itertools.combinations(NODES, n)))
    assert len(stay) == most
    assert mutually_reachable(reversed(NODES), [(b, a) for a, b in cut]) == stay


def test_of_two_ends_the_later_goes() -> None:
    assert mutually_reachable(FOUR, [(B, C)]) == {A, B, D}
    assert mutually_reachable(FOUR, [(B, C), (A, C)]) == {A, B, D}


@given(st.sets(st.sampled_from(PAIRS)), st.sampled_from(NODES))
def test_the_witness_goes_rather_than_a_rank(cut: set[tuple[Node, Node]], witness: Node) -> None:
    ranks = set(NODES) - {witness}
    most = mutually_reachable(ranks, cut)
    stay = mutually_reachable(NODES, cut, witness)
    assert len(stay - {witness}) == len(most)
    assert not cut.intersection(itertools.combinations(sorted(stay), 2))
    if not any(cut.intersection([(node, witness), (witness, node)]) for node in most):
        assert witness in stay


def test_of_two_ranks_that_lose_each_other_that_stays_which_the_witness_hears() -> None:
    assert mutually_reachable((A, B, C), [(A, B)], C) == {A, C}
    assert mutually_reachable((A, B, C), [(A, B), (A, C)], C) == {B, C}
    assert mutually_reachable((A, B, C), [(A, C)], C) == {A, B}


def test_many_cut_links_are_dealt_with_too() -> None:
    nodes = [Node(f"n{i:02}") for i in range(40)]
    cut = [(nodes[0], other) for other in nodes[1:]]
    assert mutually_reachable(nodes, cut) == set(nodes[1:])


def test_a_detour_goes_through_the_fastest_that_hears_both() -> None:
    rates = {(A, C): 1e9, (B, C): 1e6, (A, D): 1e7, (B, D): 1e7}
    assert detour(A, B, FOUR, {(A, B)}, rates) == D
    assert detour(A, B, FOUR, {(A, B), (A, D)}, rates) == C
    assert detour(A, B, FOUR, {(A, B), (A, D), (B, C)}, rates) is None


def test_heard_by_one_that_is_heard_is_alive() -> None:
    silence_s = {A: {B: 0.1, C: 0.9, D: 0.9}, B: {A: 0.1, C: 0.1, D: 0.8}, D: {C: 0.1}}
    diagnosis = diagnose(A, FOUR, silence_s, limit_s=0.5, late_s=0.2)
    assert diagnosis.alive == {A, B, C}
    assert diagnosis.dead == {D}
    assert diagnosis.cut == {(A, C)}


def test_an_old_row_never_replaces_a_newer_one() -> None:
    hearing = Hearing(A, FOUR, Timing(), 0.0)
    hearing.heard(B, 5.0, [Row(B, 7, 0.0, ((D, 0.4),))], 0.1)
    hearing.heard(C, 5.0, [Row(B, 6, 0.0, ())], 0.1)
    assert hearing.silence_s(0.2)[B][D] == pytest.approx(0.5)
    hearing.heard(C, 5.1, [Row(B, 8, 0.05, ())], 0.2)
    assert hearing.silence_s(0.2)[B][D] == pytest.approx(0.05)


def test_a_heartbeat_that_was_overtaken_is_no_sign_of_life() -> None:
    hearing = Hearing(A, FOUR, Timing(), 0.0)
    hearing.heard(B, 5.0, [], 0.1)
    hearing.heard(B, 4.9, [], 0.4)
    assert hearing.silence_s(0.4)[A][B] == pytest.approx(0.3)


def test_after_a_pause_of_its_own_a_node_takes_nobody_for_dead() -> None:
    hearing = Hearing(A, FOUR, Timing(), 0.0)
    assert hearing.diagnosis(5.0).dead == {B, C, D}
    hearing.listen_again(5.0)
    assert hearing.diagnosis(5.1).dead == frozenset()


@given(
    st.sets(st.sampled_from(NODES)), st.sets(st.sampled_from(NODES)), st.integers(1, 7),
    st.sampled_from(["lowest", "none"]), st.none() | st.integers(0, 6),
)  # fmt: skip
def test_two_quorums_have_a_member_in_common(
    one: set[Node], other: set[Node], count: int, split: str, witness: int | None
) -> None:
    members = NODES[:count]
    view = ClusterView(0, members, witness=members[witness % count] if witness is not None else None)
    if view.is_quorum(one, split) and view.is_quorum(other, split):
        assert one & other & set(members)


@pytest.mark.parametrize("witness", [Node("0"), Node("w")])
@pytest.mark.parametrize("split", ["lowest", "none"])
def test_the_witness_breaks_ties_and_has_no_say_otherwise(witness: Node, split: str) -> None:
    two, three = (ClusterView(0, (*ranks, witness), witness=witness) for ranks in ((A, B), (A, B, C)))
    for pair in ([A, B], [A, witness], [B, witness]):
        assert two.is_quorum(pair, split)
        assert not two.is_quorum(pair[:1], split)
        assert not two.is_quorum(pair[1:], split)
    assert three.is_quorum([B, C], split)
    assert not three.is_quorum([A, witness], split)
    one = two.next([B, witness])
    assert one.is_quorum([B], split)
    assert not one.is_quorum([witness], split)
    without = two.next([A, B])
    assert without.witness is None
    assert without.is_quorum([A], split) == (split == "lowest")


def test_a_witness_has_to_be_a_member() -> None:
    with pytest.raises(ValueError, match="the witness d is none of a, b"):
        ClusterView(0, (A, B), witness=D)


def test_a_life_that_is_over_is_never_admitted_again() -> None:
    view = ClusterView(0, FOUR).next([A, B, C])
    assert not view.admits(D)
    assert not view.next([A, B]).next([A]).admits(D)
    assert not view.admits(Node("a", 1))
    again = view.next([A, B, C, Node("d", 2)])
    assert not again.next([A, B, C]).admits(Node("d", 1))
    assert again.next([A, B, C]).admits(Node("d", 3))


def test_every_message_survives_the_wire() -> None:
    ballot, view = Ballot(3, B), ClusterView(0, FOUR).next([A, Node("d", 2)])
    vote = Vote(ballot, (A, B))
    messages = [
        Beat(1, 2.5, None, ()), Beat(1, 2.5, None, (), leaving=True),
        Beat(1, 2.5, 0.1, (Row(A, 4, 0.5, ((B, 0.3),)),)), Prepare(1, ballot),
        Promise(1, ballot, None), Promise(1, ballot, vote), Accept(1, vote), Accepted(1, ballot),
        Refused(1, ballot, ballot), Decided(view), Decided(ClusterView(4, (A, B), (C,), B)), JoinRequest(),
    ]  # fmt: skip
    for message in messages:
        assert from_json(json.loads(json.dumps(to_json(message)))) == message


@pytest.mark.parametrize(
    "fields", [{}, {"kind": "Rumour"}, {"kind": "Accept", "epoch": 1}, {"kind": "Prepare", "epoch": "x"}]
)
def test_what_is_no_message_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"message of kind"):
        from_json(fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"limit_s": 0}, "limit_s is 0"), ({"period_s": 0.4}, "period_s is 0.4"), ({"drift": 0.6}, "drift is 0.6"),
        ({"even_split": "both"}, "even_split is 'both'"), ({"give_up_s": 0.1}, "give_up_s is 0.1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Timing(**fields)
