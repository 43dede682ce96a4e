"""The watch of several agents over each other: real connections over loopback, in one process and one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.agent import addressbook
from chaos_mpi.agent.assembly import Assembly
from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.crashes import Crash
from chaos_mpi.agent.losses import Removal
from chaos_mpi.agent.mesh import Mesh
from chaos_mpi.agent.talk import DISOWNED
from chaos_mpi.agent.watch import Watch
from chaos_mpi.errors import ConfigError
from chaos_mpi.monitor.cluster import Timing

LIMIT_S = 30.0
TIMING = Timing(limit_s=0.3, heal_s=0.3, give_up_s=3.0)


class Filtered(Mesh):
    """A network that loses what is for some members."""

    lost: frozenset[str] = frozenset()

    def send(self, member: str, message: dict[str, Any]) -> bool:
        return member not in self.lost and super().send(member, message)


class Agent:
    """One node: its watch, and what that has told."""

    def __init__(self, name: str, host: str = "") -> None:
        self.name = f"{name}:1"
        self.removals: list[Removal] = []
        self.stops: list[str] = []
        self.crashes: list[Crash] = []
        # All of 127.0.0.0/8 is loopback: each host has an address of its own in it.
        address = ipaddress.ip_interface(f"127.1.{ord(host or name)}.1/8")
        self.mesh = Filtered((address,), lambda sender, message: self.watch.receive(sender, message))
        self.contact = Contact(self.name, host or name, self.mesh.addresses, self.mesh.port, self.mesh.key)
        self.watch = Watch(
            self.contact, self.mesh, TIMING, self.removals.append, self.stops.append, self.crashes.append
        )  # fmt: skip
        self.alive = True

    async def die(self) -> None:
        """Power off."""
        self.alive = False
        self.watch.close()
        await self.mesh.close()

    @property
    def members(self) -> list[str]:
        view = self.watch.view
        return [] if view is None else [node.name for node in view.members]


@contextlib.asynccontextmanager
async def agents(names: str, hosts: str = "") -> AsyncIterator[list[Agent]]:
    made = [Agent(name, host) for name, host in zip(names, hosts or names, strict=True)]
    try:
        yield made
    finally:
        for agent in made:
            if agent.alive:
                await agent.die()


async def begin(members: list[Agent]) -> None:
    """Start them one after the other; returns when all take part."""
    names = [agent.name for agent in members]
    for agent in members:
        agent.watch.begin(names, [other.contact for other in members])
    await until(lambda: all(agent.members == sorted(names) for agent in members))
    for agent in members:
        assert await agent.watch.may_go_on_without([]) == ""


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * LIMIT_S))


def test_a_node_that_dies_is_removed_by_all_others() -> None:
    async def test() -> None:
        async with agents("abc") as (a, b, c):
            await begin([a, b, c])
            await c.die()
            assert "c:1 may be alive" in a.watch._reason_to_wait(["c:1"], 0.0)
            assert [await x.watch.may_go_on_without(["c:1"]) for x in (a, b)] == ["", ""]
            for x in (a, b):
                assert x.removals == [Removal(("c:1",), ("c",), ("127.1.99.1",))]
                assert x.members == ["a:1", "b:1"]
                assert not x.stops

    run(test())


def test_who_may_go_on_is_asked_before_the_watch_has_begun() -> None:
    async def test() -> None:
        async with agents("abc") as (a, b, c):
            asked = [asyncio.create_task(x.watch.may_go_on_with(["a:1", "b:1"])) for x in (a, b)]
            alone = asyncio.create_task(c.watch.may_go_on_with(["c:1"]))
            await asyncio.sleep(0)
            await begin([a, b, c])
            assert not any(task.done() for task in (*asked, alone))
            a.mesh.lost = b.mesh.lost = frozenset({"c:1"})
            c.mesh.lost = frozenset({"a:1", "b:1"})
            assert await asyncio.gather(*asked) == ["", ""]
            assert await alone
            assert await a.watch.may_go_on_with(["a:1", "b:1"]) == ""

    run(test())


def test_a_member_that_is_disowned_is_told_so_until_it_is_out() -> None:
    async def test() -> None:
        async with agents("abc") as (a, b, c):
            told: list[str] = []

            def receive(sender: str, message: dict[str, Any]) -> None:
                if message.get("kind") == DISOWNED:
                    told.append(sender)
                else:
                    c.watch.receive(sender, message)

            c.mesh._receive = receive
            a.watch.disown(["c:1"])
            await begin([a, b, c])
            await until(lambda: len(told) > 1)
            await c.watch.announce_end(LIMIT_S)
            assert await a.watch.may_go_on_without(["c:1"]) == ""
            assert set(told) == {"a:1"}

    run(test())


def test_a_partition_stops_the_minority_only() -> None:
    async def test() -> None:
        async with agents("abcde") as everybody:
            await begin(everybody)
            minority, majority = everybody[:2], everybody[2:]
            for x in everybody:
                others = majority if x in minority else minority
                x.mesh.lost = frozenset(other.name for other in others)
            answers = await asyncio.gather(
                *(x.watch.may_go_on_without(["a:1", "b:1"]) for x in majority),
                *(x.watch.may_go_on_without(["c:1", "d:1", "e:1"]) for x in minority),
            )
            assert answers[:3] == ["", "", ""]
            assert all(answers[3:])
            await until(lambda: all(x.stops for x in minority))
            assert all("was cut off from the majority for 3 s" in x.stops[0] for x in minority)
            assert [len(x.stops) for x in everybody] == [1, 1, 0, 0, 0]
            assert {x.watch.view for x in majority} == {majority[0].watch.view}

    run(test())


def test_a_node_that_was_removed_is_told_so_when_it_is_back() -> None:
    async def test() -> None:
        async with agents("abc") as (a, b, c):
            await begin([a, b, c])
            a.mesh.lost = b.mesh.lost = frozenset({"c:1"})
            c.mesh.lost = frozenset({"a:1", "b:1"})
            await until(lambda: a.removals and b.removals)
            for x in (a, b, c):
                x.mesh.lost = frozenset()
            await until(lambda: c.stops)
            assert "the others went on without c:1" in c.stops[0] or "cut off" in c.stops[0]
            assert not a.stops and not b.stops

    run(test())


def test_the_end_of_a_rank_is_known_without_waiting_for_silence() -> None:
    async def test() -> None:
        async with agents("abc") as (a, b, c):
            await begin([a, b, c])
            waiting = [asyncio.create_task(x.watch.may_go_on_without(["c:1"])) for x in (a, b)]
            await c.watch.announce_end(LIMIT_S)
            assert [await task for task in waiting] == ["", ""]
            assert a.members == ["a:1", "b:1", "c:1"], "before anything was agreed on"
            await c.watch.linger(LIMIT_S)
            await c.die()
            await until(lambda: a.removals and b.removals)
            # The kernel has closed its connections, and there may be another rank on its way in there.
            assert a.removals == b.removals == [Removal(("c:1",), (), ())]
            assert not c.stops

    run(test())


def test_a_crash_is_told_to_all_once() -> None:
    async def test() -> None:
        async with agents("abc", hosts="xyz") as (a, b, c):
            await begin([a, b, c])
            await c.watch.announce_end(LIMIT_S, "SIGSEGV")
            await c.watch.announce_end(LIMIT_S, "SIGSEGV")
            assert a.crashes == b.crashes == [Crash("c:1", "z", "SIGSEGV")]
            await b.watch.announce_end(LIMIT_S)
            assert a.crashes == [Crash("c:1", "z", "SIGSEGV")], "b has ended in good order"
            assert not c.crashes

    run(test())


def test_the_votes_of_ranks_that_have_ended_count() -> None:
    """Three of four ranks end together: the last one is no majority alone."""

    async def test() -> None:
        async with agents("abcd") as (a, b, c, d):
            await begin([a, b, c, d])

            async def end(x: Agent) -> None:
                await x.watch.announce_end(1.0)
                await x.watch.linger(LIMIT_S)
                await x.die()

            ending = [asyncio.create_task(end(x)) for x in (a, b, c)]
            await until(lambda: d.members == ["d:1"])
            assert await d.watch.may_go_on_without(["a:1", "b:1", "c:1"]) == ""
            await asyncio.gather(*ending)
            assert not d.stops

    run(test())


def test_who_has_ended_does_not_wait_for_others_that_are_gone() -> None:
    """They have agreed on a view without it, and have ended before it could hear of that."""

    async def test() -> None:
        async with agents("abc") as (a, b, c):
            await begin([a, b, c])
            await c.watch.announce_end(LIMIT_S)
            a.mesh.lost = b.mesh.lost = frozenset({"c:1"})
            await until(lambda: a.removals and b.removals)
            await a.die()
            await b.die()
            await c.watch.linger(LIMIT_S)
            assert c.members == ["a:1", "b:1", "c:1"]
            assert not c.watch.stopped, "it waited until it was found to be cut off"

    run(test())


def test_who_is_out_is_forgotten_and_not_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy tells its agent of all contacts again whenever there is another one."""
    monkeypatch.setattr(addressbook, "_FAREWELL_S", 0.2)
    monkeypatch.setattr(addressbook, "_FAREWELL_PAUSED_S", 0.4)

    async def test() -> None:
        async with agents("abcz") as (a, b, c, z):
            await begin([a, b, c])
            await c.die()
            await until(lambda: a.removals and b.removals)
            a.watch.know([c.contact])
            assert a.watch.contact("c:1") is not None, "it may only be paused, and is told that it is out"
            await until(lambda: not any(x.watch.contact("c:1") for x in (a, b)))
            everybody = [x.contact for x in (a, b, c, z)]
            a.watch.know(everybody)
            b.watch.know(everybody)
            z.watch.join(everybody)
            await until(lambda: all(x.members == ["a:1", "b:1", "z:1"] for x in (a, b, z)))
            await until(lambda: z.watch.contact("c:1") is None)
            for x in (a, b, z):
                x.watch.know(everybody)
                assert set(x.mesh._senders) == {"a:1", "b:1", "z:1"} - {x.name}

    run(test())


@pytest.mark.parametrize("how", ["ended", "disowned"])
def test_who_never_became_a_member_is_forgotten(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addressbook, "_FAREWELL_S" if how == "ended" else "_FAREWELL_PAUSED_S", 0.2)

    async def test() -> None:
        async with agents("abyz") as (a, b, y, z):
            await begin([a, b])
            contacts = [x.contact for x in (a, b, y, z)]
            for x in (a, b):
                x.watch.know(contacts)
            if how == "ended":
                z.watch.know(contacts[:2])
                await z.watch.announce_end(LIMIT_S)
            else:
                for x in (a, b):
                    x.watch.disown(["z:1"])
            await until(lambda: not any(x.watch.contact("z:1") for x in (a, b)))
            for x in (a, b):
                x.watch.know(contacts)
                assert sorted(x.mesh._senders) == sorted({"a:1", "b:1", "y:1"} - {x.name})

    run(test())


def test_a_whole_job_ends_at_once() -> None:
    async def test() -> None:
        async with agents("abc") as everybody:
            await begin(everybody)
            await asyncio.gather(*(x.watch.announce_end(LIMIT_S) for x in everybody))
            await asyncio.gather(*(x.watch.linger(LIMIT_S) for x in everybody))
            assert [x.members for x in everybody] == [["a:1", "b:1", "c:1"]] * 3, "nobody waited for a view"

    run(test())


def test_a_host_is_given_up_only_when_nobody_is_left_there() -> None:
    async def test() -> None:
        async with agents("abcde", hosts="xxxyy") as (a, b, c, d, e):
            await begin([a, b, c, d, e])
            await d.die()
            await until(lambda: a.removals)
            assert a.removals == [Removal(("d:1",), (), ())]
            await e.die()
            await until(lambda: len(a.removals) == 2)
            assert a.removals[1] == Removal(("e:1",), ("y",), ("127.1.121.1",))

    run(test())


def test_a_newcomer_joins_even_if_not_all_were_told_of_it() -> None:
    async def test() -> None:
        async with agents("abcz") as (a, b, c, z):
            await begin([a, b, c])
            contacts = [x.contact for x in (a, b, c, z)]
            a.watch.know(contacts)  # b and c will ask a
            assert "does not take part" in z.watch._reason_to_wait([], 0.0)
            z.watch.join(contacts)
            await until(lambda: all(x.members == ["a:1", "b:1", "c:1", "z:1"] for x in (a, b, c, z)))
            assert await z.watch.may_go_on_without([]) == ""
            await c.die()
            assert [await x.watch.may_go_on_without(["c:1"]) for x in (a, b, z)] == ["", "", ""]
            assert not any(x.stops for x in (a, b, z))

    run(test())


def test_who_ends_before_all_have_met_is_not_waited_for() -> None:
    async def test() -> None:
        async with agents("abc") as (a, b, c):
            names, contacts = [x.name for x in (a, b, c)], [x.contact for x in (a, b, c)]
            for x in (a, b):
                x.watch.begin(names, contacts)
            c.watch.know(contacts)
            await c.watch.announce_end(LIMIT_S)
            await until(lambda: a.members and b.members)
            assert await a.watch.may_go_on_without(["c:1"]) == ""

    run(test())


async def begin_with_witness(ranks: list[Agent], witness: Agent, *, silent: bool = False) -> None:
    """The last one has no rank, and if ``silent`` it never begins."""
    names = [agent.name for agent in ranks]
    everybody = [*ranks, witness]
    for agent in ranks if silent else everybody:
        agent.watch.begin(names, [other.contact for other in everybody], witness=witness.name)
    await until(lambda: all(agent.members for agent in ranks))


@pytest.mark.parametrize("lost", [0, 1])
def test_with_a_witness_either_of_two_may_be_lost(lost: int) -> None:
    async def test() -> None:
        async with agents("abw") as (a, b, w):
            await begin_with_witness([a, b], w)
            assert a.members == ["a:1", "b:1", "w:1"]
            gone, left = [a, b][lost], [a, b][1 - lost]
            await gone.die()
            assert await left.watch.may_go_on_without([gone.name]) == ""
            await until(lambda: left.members == [left.name, "w:1"])
            await w.die()
            await until(lambda: left.members == [left.name])
            assert await left.watch.may_go_on_without([gone.name]) == ""
            assert [removal.members for removal in left.removals] == [(gone.name,)], "the witness is nobody's affair"

    run(test())


@pytest.mark.parametrize("how", ["silent", "deaf"])
def test_a_witness_that_cannot_take_part_is_not_waited_for(how: str) -> None:
    async def test() -> None:
        async with agents("abw") as (a, b, w):
            if how == "deaf":
                a.mesh.lost = b.mesh.lost = frozenset({"w:1"})
            await begin_with_witness([a, b], w, silent=how == "silent")
            await until(lambda: a.members == b.members == ["a:1", "b:1"])
            assert [await x.watch.may_go_on_without([]) for x in (a, b)] == ["", ""]
            assert not a.stops and not b.stops and not a.removals

    run(test())


def test_a_witness_holds_nobody_up_at_the_end() -> None:
    async def test() -> None:
        async with agents("abw") as (a, b, w):
            await begin_with_witness([a, b], w)
            await w.die()
            await asyncio.gather(*(x.watch.announce_end(2 * LIMIT_S) for x in (a, b)))
            await asyncio.gather(*(x.watch.linger(2 * LIMIT_S) for x in (a, b)))

    run(test())


def test_a_stranger_cannot_begin() -> None:
    async def test() -> None:
        async with agents("ab") as (a, b):
            with pytest.raises(ConfigError, match="a:1 is none of the first members b:1"):
                a.watch.begin(["b:1"], [b.contact])

    run(test())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "Nonsense"},
        {"kind": "Beat"},
        {"kind": "Who"},
        {"kind": "Contacts", "contacts": [{"member": 1}]},
        {"kind": "Ended", "crashed": 9, "host": "x"},
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any]) -> None:
    async def test() -> None:
        async with agents("ab") as (a, b):
            await begin([a, b])
            with pytest.raises(ValueError, match=r".+"):
                a.watch.receive("b:1", fields)
            assert await a.watch.may_go_on_without([]) == ""

    run(test())


@given(st.integers(2, 5), st.randoms(use_true_random=False), st.booleans())
def test_nobody_begins_before_all_have_heard_all(size: int, rng: Any, with_witness: bool) -> None:
    """Whatever order messages come in, and whichever are lost: when one begins, every connection has worked, and every
    rank is up; but for those to the witness."""
    names = [str(number) for number in range(size)]
    witness = names[0] if with_witness else None
    parts = {name: Assembly(name, names, up=False, witness=witness) for name in names}
    heard: set[tuple[str, str]] = set()
    for _ in range(100):
        one, other = rng.sample(names, 2)
        parts[one].up |= rng.random() < 0.2
        if rng.random() < 0.3:
            continue
        parts[other].heard(one, parts[one].complete)
        heard.add((one, other))
        lacking = [part for name, part in parts.items() if part.lacks_witness and name != witness]
        if lacking:
            ranks = [name for name in names if name != witness]
            assert heard.issuperset(itertools.permutations(ranks, 2))
        if parts[other].is_over:
            assert heard.issuperset(pair for pair in itertools.permutations(names, 2) if pair[0] != witness)
            assert all(part.up for part in parts.values())
            return
