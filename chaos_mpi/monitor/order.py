"""The order of the members in the communicator: slow links are to carry little of an allreduce, or nothing. Pure.

Gradients are summed by Rabenseifner's algorithm (Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005; Open MPI's
``coll/libnbc``, algorithm 3): ranks next to each other exchange as much as the whole message, those two apart half of
it, those four apart a quarter, and most pairs nothing at all. In every round all wait for the slowest pair. So which
link gets which pair of ranks decides how long a step takes where links differ.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from chaos_mpi.membership import host_of
from chaos_mpi.monitor.hostlinks import Ends, ends_of

#: Up to so many members the best order is found, beyond it a good one.
EXACT_MEMBERS = 6
#: Orders that are looked at beyond that, at most.
_MOST_TRIALS = 4000
#: A new order is worth its while if an allreduce takes so many times as long in the old one ...
_LEAST_RATIO = 1.5
#: ... and if so large a part of the time is saved.
_LEAST_SHARE = 0.1
#: A better order has to be found so often in succession.
_LOOKS = 2
#: For so long no other is asked for; twice as long each time that there were not so many times as many steps then.
_REST_S, _LONGEST_REST_S, _LEAST_GAIN = 60.0, 3600.0, 1.1

#: A rank that sends in a round, one that receives, and what part of the message that is, at most.
Exchange = tuple[int, int, float]
#: Links that cannot be used and would have to be, and the seconds of an allreduce: smaller is better.
Cost = tuple[int, float]


@dataclass(frozen=True, slots=True)
class HostLinks:
    """What is known of the links between hosts.

    Attributes:
        bytes_per_s: bandwidth; of the slower direction.
        rtt_s: round-trip time.
        unusable: links that are cut, with no way round.
    """

    bytes_per_s: Mapping[Ends, float]
    rtt_s: Mapping[Ends, float]
    unusable: Collection[Ends] = ()


def exchanges(size: int) -> list[list[Exchange]]:
    """The rounds of an allreduce among ``size`` ranks."""
    power = 1 << (size.bit_length() - 1)
    extra = size - power  # ranks that have a neighbour take part for them

    def real(rank: int) -> int:
        return 2 * rank if rank < extra else rank + extra

    halving = [
        [(real(rank), real(rank ^ mask), 0.5 / mask) for rank in range(power)]
        for mask in (1 << bit for bit in range(power.bit_length() - 1))
    ]
    if not extra:
        return [*halving, *reversed(halving)]
    odd_to_even = [(2 * i + 1, 2 * i, 0.5) for i in range(extra)]
    even_to_odd = [(even, odd, part) for odd, even, part in odd_to_even]
    result = [(even, odd, 1.0) for even, odd, _ in even_to_odd]
    return [[*odd_to_even, *even_to_odd], odd_to_even, *halving, *reversed(halving), result]


def cost(order: Sequence[str], links: HostLinks, nbytes: float) -> Cost:
    """What an allreduce of a message of ``nbytes`` takes among members (``host:pid``) in this order.

    Within a host it takes nothing. A link of which nothing is known counts as one of the middle among the others.
    """
    return _costs([host_of(member) for member in order], links, nbytes)(range(len(order)))


def share_sent(order: Sequence[str], member: str) -> float:
    """How much this member sends to other hosts in an allreduce, as a multiple of the message."""
    rank, hosts = order.index(member), [host_of(one) for one in order]
    sent = (
        part for exchanged in exchanges(len(order)) for a, b, part in exchanged if a == rank and hosts[a] != hosts[b]
    )
    return math.fsum(sent)


def best_order(order: Sequence[str], links: HostLinks, nbytes: float) -> tuple[str, ...]:
    """The order in which an allreduce takes least; the first member stays first. The same for the same arguments.

    Beyond :data:`EXACT_MEMBERS` it is the best that is reached by swaps of two, each of them for the better.
    """
    count = len(order)
    of = _costs([host_of(member) for member in order], links, nbytes)
    if count <= EXACT_MEMBERS:
        best = min(((0, *rest) for rest in itertools.permutations(range(1, count))), key=lambda p: (of(p), p))
    else:
        best = _by_swaps(tuple(range(count)), of)
    return tuple(order[place] for place in best)


class OrderKeeper:
    """Decides, from one look at the links after the other, when the members are to be in another order."""

    def __init__(self) -> None:
        self._wanted: tuple[str, ...] = ()
        self._looks = 0
        self._rest_s, self._rests_until_s = _REST_S, -math.inf
        self._asked: tuple[str, ...] = ()  # the last order that was, and how many steps there were a second before it
        self._pace_before = 0.0

    def look(
        self, order: Sequence[str], links: HostLinks, nbytes: float, steps_per_s: float, now_s: float
    ) -> tuple[str, ...] | None:
        """The order that is to be asked for now, if any.

        Args:
            order: the members as they are.
            links: what is known now.
            nbytes: the size of a step's gradients.
            steps_per_s: how often they are summed.
            now_s: the time.
        """
        if len(order) < 3 or not links.bytes_per_s or now_s < self._rests_until_s:
            return None
        if self._asked == tuple(order):  # what is known of links is never exact: see whether it has helped
            helped = steps_per_s >= _LEAST_GAIN * self._pace_before
            self._rest_s = _REST_S if helped else min(2 * self._rest_s, _LONGEST_REST_S)
            self._rests_until_s = now_s if helped else now_s + self._rest_s
            self._asked = ()
            return None
        wanted = best_order(order, links, nbytes)
        if not _is_worthwhile(cost(order, links, nbytes), cost(wanted, links, nbytes), steps_per_s):
            self._wanted, self._looks = (), 0
            return None
        self._looks = self._looks + 1 if wanted == self._wanted else 1
        self._wanted = wanted
        if self._looks < _LOOKS:
            return None
        self._wanted, self._looks, self._rests_until_s = (), 0, now_s + self._rest_s
        self._asked, self._pace_before = wanted, steps_per_s
        return wanted


def _is_worthwhile(old: Cost, new: Cost, steps_per_s: float) -> bool:
    if new[0] != old[0]:
        return new[0] < old[0]
    return old[1] >= _LEAST_RATIO * new[1] and (old[1] - new[1]) * steps_per_s >= _LEAST_SHARE


def _costs(hosts: Sequence[str], links: HostLinks, nbytes: float) -> Callable[[Sequence[int]], Cost]:
    """The cost of an order of these places."""
    rounds = exchanges(len(hosts))
    usual_rate, usual_rtt_s = _middle(links.bytes_per_s.values(), math.inf), _middle(links.rtt_s.values(), 0.0)

    def link(a: str, b: str) -> tuple[float, float]:
        ends = ends_of(a, b)
        if ends in links.unusable:
            return math.inf, 0.0
        return links.rtt_s.get(ends, usual_rtt_s) / 2, 1 / links.bytes_per_s.get(ends, usual_rate)

    known = [[(0.0, 0.0) if a == b else link(a, b) for b in hosts] for a in hosts]

    def of(order: Sequence[int]) -> Cost:
        unusable, total_s = 0, 0.0
        for exchanged in rounds:
            slowest_s = 0.0
            for a, b, part in exchanged:
                delay_s, s_per_byte = known[order[a]][order[b]]
                if delay_s == math.inf:
                    unusable += 1
                else:
                    slowest_s = max(slowest_s, delay_s + part * nbytes * s_per_byte)
            total_s += slowest_s
        return unusable, total_s

    return of


def _by_swaps(order: tuple[int, ...], of: Callable[[Sequence[int]], Cost]) -> tuple[int, ...]:
    best, tries = of(order), 0
    improved = True
    while improved and tries < _MOST_TRIALS:
        improved = False
        for a, b in itertools.combinations(range(1, len(order)), 2):
            swapped = list(order)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            tries += 1
            if (now := of(swapped)) < best:
                order, best, improved = tuple(swapped), now, True
            if tries >= _MOST_TRIALS:
                break
    return order


def _middle(values: Collection[float], default: float) -> float:
    return statistics.median_high(values) if values else default
