"""When a host is given up: nobody is left there, not even somebody on the way in."""

from __future__ import annotations

import pytest

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.losses import PENDING_S, Losses, gone_hosts

NOTHING: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def contact(member: str, host: str, *addresses: str) -> Contact:
    return Contact(member, host, addresses, 1, "key")


A1, A2 = contact("a:1", "a", "10.0.0.1", "172.17.0.1"), contact("a:2", "a", "10.0.0.1", "172.17.0.1")
B1 = contact("b:1", "b", "10.0.0.2", "172.17.0.1")
ALL = {"a:1": A1, "a:2": A2, "b:1": B1}


def test_a_host_is_gone_when_nobody_is_left_there() -> None:
    alias = contact("a:3", "user@a", "10.0.0.1", "172.17.0.1")
    assert gone_hosts([A1, A2], [B1]) == (("a",), ("10.0.0.1",)), "not the address that others have as well"
    assert gone_hosts([A1], [A2, B1]) == ((), ())
    assert gone_hosts([A1, A2], [alias, B1]) == ((), ()), "another name of the machine"
    assert gone_hosts([], [B1]) == ((), ())


@pytest.fixture
def losses() -> Losses:
    made = Losses(fresh_s=2.0)
    for member in ALL:
        made.heard(member, 0.0)
    return made


def test_a_host_is_given_up_once(losses: Losses) -> None:
    losses.lose(A1, 1.0)
    contacts = {"a:1": A1, "b:1": B1}
    assert losses.given_up(contacts, {"b:1"}, {"a:1"}, 1.0) == (("a",), ("10.0.0.1",))
    assert losses.given_up(contacts, {"b:1"}, {"a:1"}, 1.1) == NOTHING


def test_a_host_with_a_member_that_takes_part_stays_however_silent_that_is(losses: Losses) -> None:
    losses.lose(A1, 1.0)
    assert losses.given_up(ALL, {"b:1", "a:2"}, {"a:1"}, 50.0) == NOTHING
    losses.lose(A2, 51.0)
    assert losses.given_up(ALL, {"b:1"}, {"a:1", "a:2"}, 51.0) == (("a",), ("10.0.0.1",))


def test_a_newcomer_keeps_its_host_as_long_as_it_is_heard(losses: Losses) -> None:
    losses.lose(A1, 1.0)
    losses.heard("a:2", 1.5)
    assert losses.given_up(ALL, {"b:1"}, {"a:1"}, 3.4) == NOTHING
    assert losses.given_up(ALL, {"b:1"}, {"a:1"}, 3.6) == (("a",), ("10.0.0.1",))


def test_a_loss_of_long_ago_ends_nothing_any_more(losses: Losses) -> None:
    losses.lose(A1, 1.0)
    assert losses.given_up(ALL, {"b:1", "a:2"}, {"a:1"}, 2.0 + PENDING_S) == NOTHING
    assert losses.given_up(ALL, {"b:1"}, {"a:1", "a:2"}, 3.0 + PENDING_S) == NOTHING


def test_nothing_is_given_up_where_nothing_was_lost(losses: Losses) -> None:
    """Members that have ended by themselves leave connections that the kernel has closed."""
    assert losses.given_up(ALL, {"b:1"}, {"a:1", "a:2"}, 1.0) == NOTHING
