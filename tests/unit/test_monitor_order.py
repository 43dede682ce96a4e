"""The order of the members: slow links carry little of an allreduce, or nothing."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.monitor.hostlinks import Ends, ends_of
from chaos_mpi.monitor.order import HostLinks, OrderKeeper, best_order, cost, exchanges, share_sent

MB = 1 << 20
FOUR = ("a:1", "b:1", "c:1", "d:1")


def names(count: int) -> tuple[str, ...]:
    return tuple(f"h{i}:1" for i in range(count))


def all_links(count: int, rate: float) -> dict[Ends, float]:
    return {ends_of(f"h{a}", f"h{b}"): rate for a, b in itertools.combinations(range(count), 2)}


@pytest.mark.parametrize("size", range(1, 18))
def test_the_rounds_sum_everything_up(size: int) -> None:
    """Run as sets of who is summed up where, in as many parts as there are ranks that take part to the end."""
    power = 1 << (size.bit_length() - 1)
    sent = Counter[int]()
    for exchanged in exchanges(size):
        busy = Counter(sender for sender, _, _ in exchanged)
        assert max(busy.values()) == 1  # a rank sends to one other at a time
        for sender, receiver, part in exchanged:
            assert sender != receiver
            sent[sender] += round(part * 2 * power)
    # Reducing and gathering take (power - 1) / power of the message each, and who takes no part sends half twice.
    extra = size - power
    for rank in range(size):
        own = 2 * (power - 1) * 2 if power > 1 else 0
        if rank < 2 * extra:
            own = 2 * power if rank % 2 else own + power + 2 * power
        assert sent[rank] == own
        assert share_sent(names(size), names(size)[rank]) == pytest.approx(own / (2 * power))


def test_four_ranks_use_four_of_six_links() -> None:
    used = {frozenset((a, b)) for exchanged in exchanges(4) for a, b, _ in exchanged}
    assert used == {frozenset(pair) for pair in ((0, 1), (2, 3), (0, 2), (1, 3))}


def test_the_cost_is_that_of_the_slowest_pair_in_each_round() -> None:
    links = HostLinks({("a", "b"): 1e6, ("c", "d"): 2e6, ("a", "c"): 4e6, ("b", "d"): 4e6}, {("a", "b"): 0.01})
    # Half the message a - b twice, then a quarter a - c twice; the usual round trip is a - b's.
    assert cost(FOUR, links, 1e6) == (0, pytest.approx(2 * (0.005 + 0.5) + 2 * (0.005 + 0.25 / 4)))
    assert cost(FOUR, HostLinks(links.bytes_per_s, {}, [("a", "b"), ("a", "d")]), 1e6)[0] == 4


def test_within_a_host_nothing_is_sent() -> None:
    order = ("a:1", "a:2", "b:1", "b:2")
    assert share_sent(order, "a:1") == 0.5
    assert cost(order, HostLinks({("a", "b"): 1e6}, {}), 1e6) == (0, pytest.approx(0.5))
    assert best_order(("a:1", "b:1", "a:2", "b:2"), HostLinks({("a", "b"): 1e6}, {}), 1e6)[:2] == ("a:1", "a:2")


@given(st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_no_other_order_of_few_members_is_better(count: int, data: st.DataObject) -> None:
    members = names(count)
    rates = {ends: data.draw(st.sampled_from([1e6, 2e6, 5e6])) for ends in all_links(count, 0)}
    cut = [ends for ends in rates if data.draw(st.booleans())]
    links = HostLinks(rates, {}, cut)
    order = best_order(members, links, MB)
    assert order[0] == members[0]
    assert sorted(order) == sorted(members)
    others = ((members[0], *rest) for rest in itertools.permutations(members[1:]))
    assert cost(order, links, MB) == min(cost(other, links, MB) for other in others)


@given(st.integers(7, 24), st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_many_members_are_never_worse_off(count: int, seed: int) -> None:
    members = names(count)
    rng = random.Random(seed)
    rates = {ends: 1e6 * rng.randint(1, 7) for ends in all_links(count, 0)}
    links = HostLinks(rates, {}, [ends for ends in rates if rng.random() < 0.1])
    order = best_order(members, links, MB)
    assert order[0] == members[0]
    assert sorted(order) == sorted(members)
    assert cost(order, links, MB) <= cost(members, links, MB)
    assert best_order(members, links, MB) == order


def test_one_slow_link_among_many_is_not_used() -> None:
    members = names(16)
    slow = ends_of("h0", "h1")
    links = HostLinks({**all_links(16, 1e8), slow: 1e6}, {})
    assert cost(best_order(members, links, MB), links, MB) == cost(members, HostLinks(all_links(16, 1e8), {}), MB)


SLOW = HostLinks({("a", "b"): 1e6, ("a", "c"): 1e8, ("c", "d"): 1e8}, {})


def test_a_better_order_is_asked_for_when_it_was_found_twice() -> None:
    keeper = OrderKeeper()
    assert keeper.look(FOUR, SLOW, MB, 1.0, 0.0) is None
    wanted = keeper.look(FOUR, SLOW, MB, 1.0, 5.0)
    assert wanted is not None
    assert wanted[0] == "a:1"
    assert wanted[3] == "b:1"  # the first of four sends nothing to the last
    assert keeper.look(FOUR, SLOW, MB, 1.0, 10.0) is None
    assert keeper.look(FOUR, SLOW, MB, 1.0, 64.0) is None
    assert keeper.look(FOUR, SLOW, MB, 1.0, 66.0) is None
    assert keeper.look(FOUR, SLOW, MB, 1.0, 71.0) == wanted
    assert keeper.look(wanted, SLOW, MB, 1.0, 200.0) is None


def test_an_order_that_has_not_helped_is_not_followed_by_another_one_soon() -> None:
    def looks(gain: float) -> list[float]:
        """When another order is asked for, if each is followed by so many times as many steps."""
        keeper, order, asked = OrderKeeper(), FOUR, list[float]()
        for at_s in range(0, 1200, 5):
            slow = ends_of(order[0][0], order[1][0])  # whichever pair is first turns out to be slow
            rates = {("a", "b"): 1e8, ("a", "c"): 1e8, ("a", "d"): 1e8, slow: 1e6}
            wanted = keeper.look(order, HostLinks(rates, {}), MB, gain ** len(asked), float(at_s))
            if wanted is not None:
                order = wanted
                asked.append(float(at_s))
        return asked

    futile, useful = looks(1.0), looks(1.2)
    assert futile[0] == useful[0] == 5.0
    assert len(futile) < 6 < len(useful)
    rests = [later - earlier for earlier, later in itertools.pairwise(futile)]
    assert rests == sorted(rests)


def test_what_was_found_once_and_not_again_is_not_asked_for() -> None:
    keeper = OrderKeeper()
    even = HostLinks({("a", "b"): 1e8}, {})
    looks = [SLOW, even, SLOW, even]
    assert [keeper.look(FOUR, links, MB, 1.0, 5.0 * i) for i, links in enumerate(looks)] == [None] * 4


@pytest.mark.parametrize(
    ("order", "links", "nbytes", "steps_per_s"),
    [
        (FOUR[:2], SLOW, MB, 1.0),  # there is nothing to choose
        (FOUR, HostLinks({}, {("a", "b"): 1.0}), MB, 1.0),  # nothing is known
        (FOUR, HostLinks({("a", "b"): 8e7, ("a", "c"): 1e8}, {}), MB, 1.0),  # about as fast
        (FOUR, SLOW, 1000, 1.0),  # it is a millisecond in each second
    ],
)
def test_no_order_is_asked_for_without_need(
    order: tuple[str, ...], links: HostLinks, nbytes: float, steps_per_s: float
) -> None:
    keeper = OrderKeeper()
    assert [keeper.look(order, links, nbytes, steps_per_s, at_s) for at_s in (0.0, 5.0, 10.0)] == [None] * 3


def test_a_cut_link_counts_more_than_any_slow_one() -> None:
    keeper = OrderKeeper()
    links = HostLinks({("a", "b"): 1e8, ("a", "c"): 1e5, ("a", "d"): 1e5}, {}, [("a", "b")])
    keeper.look(FOUR, links, MB, 1.0, 0.0)
    wanted = keeper.look(FOUR, links, MB, 1.0, 5.0)
    assert wanted is not None
    assert cost(wanted, links, MB)[0] == 0
    assert cost(wanted, links, MB)[1] < math.inf
