"""What an agent makes of what its rank has sent: bandwidths of links, and an order for the members."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from chaos_mpi.agent import ordering
from chaos_mpi.agent.ordering import Ordering
from chaos_mpi.monitor.hostlinks import ends_of
from chaos_mpi.monitor.order import HostLinks

MEMBERS = ["a:1", "b:2", "c:3", "d:4"]
ADDRESSES = {"a:1": ("10.0.0.1",), "b:2": ("10.0.0.2", "fe80::2"), "c:3": ("10.0.0.3",), "d:4": ("10.0.0.4",)}


class Links:
    """All that is known of links, of one agent that knows what it learns itself, and that all others are fast."""

    def __init__(self, me: str) -> None:
        self.known: dict[str, float] = {}
        self._host = me.partition(":")[0]

    def sent(self, bytes_per_s: Mapping[str, float]) -> None:
        self.known.update(bytes_per_s)

    def links(self) -> HostLinks:
        return HostLinks({("c", "d"): 1e8} | {ends_of(self._host, to): rate for to, rate in self.known.items()}, {})


class Rank:
    """One end of the link that answers every question with the next of these, and notes what order it is told."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.answers, self.orders = answers, list[list[str]]()
        self.ordering: Ordering | None = None

    def ask_traffic(self) -> None:
        assert self.ordering is not None
        if self.answers:
            self.ordering.receive(self.answers.pop(0))

    def arrange(self, order: tuple[str, ...]) -> None:
        self.orders.append(list(order))


def told(step: int, **sent: tuple[int, float]) -> dict[str, Any]:
    by_address = {ADDRESSES[next(m for m in MEMBERS if m[0] == host)][0]: list(row) for host, row in sent.items()}
    return {"sent": by_address, "members": MEMBERS, "step": step}


def run(me: str, answers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[Rank, Links]:
    """Let the agent ask until the answers are used up, in no time; 5 s pass on its clock each time."""
    rank, links, clock = Rank(answers), Links(me), [0.0]
    rank.ordering = Ordering(me, rank, links, lambda: ADDRESSES)  # type: ignore[arg-type]
    asks = len(answers) + 1
    monkeypatch.setattr(ordering, "boot_clock_s", lambda: clock[0])

    async def enough() -> None:
        class Enough(Exception):
            pass

        left, real = [asks], asyncio.sleep

        async def tick(seconds: float) -> None:
            clock[0] += seconds
            left[0] -= 1
            if not left[0]:
                raise Enough
            await real(0)

        monkeypatch.setattr(asyncio, "sleep", tick)
        assert rank.ordering is not None
        try:
            await rank.ordering.run()
        except Enough:
            pass
        finally:
            monkeypatch.setattr(asyncio, "sleep", real)

    asyncio.run(enough())
    return rank, links


def grows(step: int) -> dict[str, Any]:
    """A quarter of a megabyte to c and twice that to b in each step, and b is slow."""
    return told(step, b=(500_000 * step, 5.0 * step), c=(250_000 * step, 0.0025 * step))


def test_the_agent_of_the_first_member_says_which_order_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, links = run("a:1", [grows(step) for step in (1, 2, 3, 4)], monkeypatch)
    assert links.known == {"b": pytest.approx(1e5, rel=0.1), "c": pytest.approx(5.5e7, rel=0.1)}
    assert len(rank.orders) == 1
    assert rank.orders[0][0] == "a:1"
    assert rank.orders[0][3] == "b:2"


def test_the_other_agents_learn_and_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, links = run("d:4", [grows(step) for step in (1, 2, 3, 4)], monkeypatch)
    assert links.known["b"] == pytest.approx(1e5, rel=0.1)
    assert rank.orders == []


def test_a_rank_that_makes_no_steps_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{**grows(step), "step": 7} for step in (1, 2, 3, 4)]
    assert run("a:1", answers, monkeypatch)[0].orders == []


@pytest.mark.parametrize(
    ("rows", "rate"),
    [
        ([(1_000_000, 1.0), (3_000_000, 2.0)], 2e6),  # what was sent last counts
        ([(1_000, 0.001), (2_000, 0.002)], 0),  # too little to be a measurement
        ([(1_000, 2.0)], 500.0),  # that took long
        ([(1_000_000, 1.0), (1_000_000, 1.0)], 1e6),  # nothing was sent since
        ([(9_000_000, 9.0), (100_000, 0.01)], 1e6),  # another connection
        ([(1_000_000, 0.0)], 5e8),  # less than a tick of the clock
    ],
)
def test_what_counts_as_a_measurement(
    rows: list[tuple[int, float]], rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, links = run("a:1", [told(i, b=row) for i, row in enumerate(rows)], monkeypatch)
    assert links.known.get("b", 0) == pytest.approx(rate, rel=0.3)


def test_what_stays_within_a_host_or_goes_elsewhere_is_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {"10.0.0.1": [10**7, 1.0], "192.168.1.1": [10**7, 1.0], "fe80::2": [3 * 10**6, 1.0]}
    _, links = run("a:1", [{"sent": sent, "members": MEMBERS, "step": 1}], monkeypatch)
    assert links.known == {"b": pytest.approx(3e6, rel=0.1)}


def test_what_cannot_be_read_is_refused() -> None:
    reader = Ordering("a:1", Rank([]), Links("a:1"), lambda: ADDRESSES)  # type: ignore[arg-type]
    for broken in ({}, {"sent": {"10.0.0.2": 3}, "members": [], "step": 1}, {"sent": {}, "members": 5, "step": 1}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            reader.receive(broken)
