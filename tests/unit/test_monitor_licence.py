"""The rules that the safety of the agreement rests on, one by one."""

from __future__ import annotations

import pytest

from chaos_mpi.monitor.ballots import Acceptor, choice
from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.licence import Licence
from chaos_mpi.monitor.messages import Accepted, Ballot, Promise, Refused, Vote

A, B, C = THREE = tuple(Node(name) for name in "abc")
VIEW = ClusterView(0, THREE)
TIMING = Timing(limit_s=1.0, drift=0.1)


def test_a_licence_counts_from_the_sending_and_is_shorter_than_the_promise() -> None:
    asking, promising = Licence(A, VIEW, TIMING, 0.0), Licence(B, VIEW, TIMING, 0.0)
    promising.promise(A, 10.0, 10.3)
    echo_s = promising.echo_s(A)
    assert echo_s == 10.0
    asking.echoed(B, echo_s)
    assert asking.until_s(10.6) == pytest.approx(10.9)
    assert promising.free_s([A]) == pytest.approx(11.3)


def test_a_licence_takes_a_quorum() -> None:
    asking = Licence(A, VIEW, TIMING, 0.0)
    assert asking.until_s(0.1) == -float("inf")
    asking.echoed(A, 0.1)
    assert asking.until_s(0.1) == -float("inf")
    asking.echoed(C, 0.05)
    assert asking.until_s(0.1) == pytest.approx(0.95)


def test_an_echo_that_comes_late_shortens_nothing() -> None:
    asking = Licence(A, VIEW, TIMING, 0.0)
    asking.echoed(B, 0.5)
    asking.echoed(B, 0.2)
    assert asking.until_s(0.6) == pytest.approx(1.4)


def test_taking_on_a_view_is_a_promise_to_all_its_members() -> None:
    assert Licence(B, VIEW, TIMING, 5.0).free_s([A]) == 6.0


def test_who_has_voted_promises_nothing_more() -> None:
    promising = Licence(B, VIEW, TIMING, 0.0)
    promising.promise(A, 1.0, 1.0)
    promising.voted([A, B], 1.5)
    promising.promise(A, 1.6, 1.6)
    assert promising.echo_s(A) == 1.0
    assert promising.free_s([A]) == 2.0


def test_who_has_voted_backs_itself_no_further() -> None:
    asking = Licence(A, VIEW, TIMING, 0.0)
    asking.voted([A, B], 1.0)
    asking.echoed(B, 1.5)
    assert asking.until_s(1.6) == pytest.approx(1.9)


def test_who_has_voted_for_its_own_removal_has_no_licence() -> None:
    asking = Licence(A, VIEW, TIMING, 0.0)
    asking.echoed(B, 1.0)
    asking.echoed(C, 1.0)
    asking.voted([B, C], 1.1)
    assert asking.until_s(1.1) == -float("inf")


def test_a_promise_holds_against_lower_ballots() -> None:
    acceptor, low, high = Acceptor(1), Ballot(1, A), Ballot(1, B)
    assert acceptor.prepare(high) == Promise(1, high, None)
    assert acceptor.prepare(low) == Refused(1, low, high)
    assert acceptor.ask(Vote(low, (A,))) == Refused(1, low, high)
    assert acceptor.accept() is None


def test_a_vote_that_waited_is_void_once_a_higher_ballot_has_the_promise() -> None:
    acceptor, low, high = Acceptor(1), Ballot(1, A), Ballot(2, B)
    assert acceptor.ask(Vote(low, (A,))) is None
    acceptor.prepare(high)
    assert acceptor.accept() is None
    assert acceptor.ask(Vote(high, (B,))) is None
    assert acceptor.accept() == Accepted(1, high)
    assert acceptor.prepare(Ballot(3, A)) == Promise(1, Ballot(3, A), Vote(high, (B,)))


def test_the_highest_vote_is_proposed_again() -> None:
    promises = {A: Vote(Ballot(1, C), (A, B)), B: Vote(Ballot(2, A), (A, C)), C: None}
    assert choice(promises, THREE) == (A, C)
    assert choice({A: None, B: None}, THREE) == THREE
