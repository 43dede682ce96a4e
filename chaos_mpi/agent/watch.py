"""Watches the other nodes of a job: the state machine of :mod:`chaos_mpi.monitor.member`, with a network and a clock.

A node is the agent beside one rank, and is named as that rank is (``host:pid``); the witness, which has none, after its
own process. Besides the messages of the state machine the agents tell each other when a rank has ended by itself, so
that nobody has to wait for silence then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any

from chaos_mpi.agent.addressbook import AddressBook
from chaos_mpi.agent.assembly import ASSEMBLY_LIMIT_S, Assembly
from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.crashes import Crash, crash_of
from chaos_mpi.agent.losses import Losses, Removal
from chaos_mpi.agent.network import Network, boot_clock_s
from chaos_mpi.agent.talk import CONTACTS, DISOWNED, ENDED, HERE, NOTED, WHO, entries
from chaos_mpi.errors import ConfigError
from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.member import Member, State
from chaos_mpi.monitor.messages import Decided, JoinRequest, Message, Sent, from_json, to_json
from chaos_mpi.monitor.reachability import Diagnosis

log = logging.getLogger("chaos_mpi.agent")

#: How often the end of a rank is told to who has not confirmed it.
_REPEAT_S = 0.02
#: How long an agent whose rank has ended waits for others, whose ranks have as well, to say that they know.
_PARTING_S = 1.0
#: A newcomer on its way in that is silent for so long, at least, is not waited for.
_NEWCOMER_SILENT_S = 2.0


class Watch:
    """One node's part in the watch, from :meth:`begin` or :meth:`join` to :meth:`close`.

    Args:
        me: how this agent is reached.
        network: carries messages; what comes is to be given to :meth:`receive`.
        timing: limits, the same on all nodes.
        on_removed: is called after a new view has left members out.
        on_stopped: is called with the reason, once, when this node must not go on.
        on_crashed: is called once for each other rank that has crashed, when its agent has said so.

    Attributes:
        ended: members whose ranks have ended by themselves.
    """

    def __init__(
        self,
        me: Contact,
        network: Network,
        timing: Timing,
        on_removed: Callable[[Removal], None],
        on_stopped: Callable[[str], None],
        on_crashed: Callable[[Crash], None],
    ) -> None:
        self.me, self.ended, self._host = me.member, set[str](), me.host
        self._network, self._timing = network, timing
        self._on_removed, self._on_stopped, self._on_crashed = on_removed, on_stopped, on_crashed
        self._assembly: Assembly | None = None
        self._member: Member | None = None
        self._seen: ClusterView | None = None
        self._joining = self._leaving = self._closed = False
        self._stopped = ""
        self._heard_s = 0.0
        self._witness: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._confirmed: set[str] = set()
        self._disowned: frozenset[str] = frozenset()
        self._end: dict[str, Any] = {"kind": ENDED}
        self._losses = Losses(max(2 * timing.limit_s, _NEWCOMER_SILENT_S))
        self._book = AddressBook(me, network, self._losses)

    @property
    def view(self) -> ClusterView | None:
        """The present view; None before the first."""
        return None if self._member is None else self._member.view

    @property
    def witness(self) -> str | None:
        """The member that has no rank, as long as there is one."""
        return self._witness if self.view is None or self.view.witness is not None else None

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The addresses of all other hosts of the job that are known."""
        return self._book.elsewhere

    @property
    def stopped(self) -> str:
        """Why this node must not go on; empty if it may, as far as it knows."""
        return self._stopped

    def addresses(self) -> dict[str, tuple[str, ...]]:
        """The addresses of the machines of all members that are known."""
        return {member: contact.addresses for member, contact in self._book.contacts.items()}

    def contact(self, member: str) -> Contact | None:
        """How to reach another one, if that is known."""
        return self._book.contacts.get(member)

    def diagnosis(self, limit_s: float) -> Diagnosis | None:
        """What this node thinks of the members, when a silence of so long counts; None while it takes no part."""
        return None if self._member is None or self._stopped else self._member.diagnosis(boot_clock_s(), limit_s)

    def rtt_s(self) -> dict[str, float]:
        """Round-trip times to other members."""
        links = {} if self._member is None else self._member.links
        return {node.name: link.rtt_s for node, link in links.items() if link.rtt_s is not None}

    def begin(
        self, ranks: Iterable[str], contacts: Iterable[Contact], *, up: bool = True, witness: str | None = None
    ) -> None:
        """Start as one of the first members.

        Args:
            ranks: all of them that have a rank.
            contacts: how to reach the others, and maybe more.
            up: whether the rank is up; if not, :meth:`rank_is_up` is to follow.
            witness: the member that has none, if there is one.

        Raises:
            ConfigError: this node is none of them.
        """
        first = sorted({*ranks} | ({witness} if witness else set()))
        if self.me not in first:
            raise ConfigError(f"{self.me} is none of the first members {', '.join(first)}")
        self._assembly = Assembly(self.me, first, up=up, witness=witness, now_s=boot_clock_s())
        self._witness = witness
        for member in self.ended:
            self._assembly.ended(member)
        self.know(contacts)
        self._tick()

    def rank_is_up(self) -> None:
        """The rank of this agent has loaded its libraries, and has connected with the agent."""
        if self._assembly is not None:
            self._assembly.up = True
            self._tick()

    def join(self, contacts: Iterable[Contact]) -> None:
        """Start as a newcomer: ask all to be admitted until a view has this node."""
        self.know(contacts)
        self._joining = True
        self._tick()

    def know(self, contacts: Iterable[Contact]) -> None:
        """Take note of how to reach others. What is known already stays."""
        view = self.view
        removed = {node.name for node in view.removed} if view is not None else set[str]()
        self._book.know(contacts, self.ended | removed, boot_clock_s())

    def disown(self, members: Iterable[str]) -> None:
        """The ranks of these are dead to MPI, whatever their agents think. They are told so while they take part."""
        self._disowned = frozenset(members)
        self._tell_disowned()

    async def may_go_on_without(self, members: Collection[str]) -> str:
        """Wait until it is certain that these members take no part any more, and that this node may go on.

        Returns:
            Empty when so. The reason, if this node is stopped, or if it stays uncertain for longer than a node that is
            cut off goes on.
        """
        deadline_s = boot_clock_s() + self._timing.give_up_s + 2 * self._timing.limit_s
        while True:
            now_s = boot_clock_s()
            reason = self._reason_to_wait(members, now_s)
            if not reason or self._stopped or now_s >= deadline_s:
                return reason
            await self._change(min(self._timing.beat_s, deadline_s - now_s))

    async def may_go_on_with(self, members: Collection[str]) -> str:
        """As :meth:`may_go_on_without`, for all of the first members but these; waits until the watch has begun."""
        while self._member is None and not self._stopped:
            await self._change(self._timing.beat_s)
        return await self.may_go_on_without(self._others() - set(members))

    async def announce_end(self, limit_s: float, crash: str = "") -> None:
        """Tell the others that the rank has ended; returns when all have confirmed it, or after ``limit_s`` seconds.

        Args:
            limit_s: see above.
            crash: how it crashed; empty if it did not.
        """
        self._leave()
        deadline_s = boot_clock_s() + limit_s
        self._end = {"kind": ENDED, "crashed": crash, "host": self._host}
        self._tell_end(name for name in (self._witness,) if name not in (None, self.me))
        while (silent := self._others() - self._confirmed) and boot_clock_s() < deadline_s:
            self._tell_end(silent)
            await self._change(_REPEAT_S)

    async def linger(self, limit_s: float) -> None:
        """After the rank has ended: vote until there is a view without it.

        Many ranks may end together, and those that are left may be no majority without the votes of these agents.
        Returns when there is such a view, when all others have ended as well and know of this one, when none of them
        is heard any more (they may be gone before they could tell of such a view), or after ``limit_s`` seconds.
        """
        self._leave()
        begun_s = self._heard_s = boot_clock_s()
        while self._member is not None and not self._stopped and (now_s := boot_clock_s()) < begun_s + limit_s:
            if now_s > self._heard_s + self._timing.limit_s:
                return
            # Who has ended too, and has gone, cannot confirm any more.
            unaware = set(self._book) - {self.me} - self._confirmed if now_s < begun_s + _PARTING_S else set()
            if not (unaware - {self._witness}) | self._others():
                return
            self._tell_end(unaware)
            await self._change(self._timing.beat_s)

    def close(self) -> None:
        """Say and do nothing any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    # -- messages ------------------------------------------------------------------------------------------------

    def receive(self, sender: str, fields: dict[str, Any]) -> None:
        """Take in a message of a peer.

        Raises:
            ValueError: it cannot be understood.
        """
        if self._closed:
            return
        kind, now_s = fields.get("kind"), boot_clock_s()
        self._losses.heard(sender, now_s)
        self._heard_s = now_s
        if kind == HERE:
            self._heard_here(sender, fields.get("complete") is True, now_s)
        elif kind == ENDED:
            self._heard_end(sender, crash_of(sender, fields))
        elif kind == NOTED:
            self._confirmed.add(sender)
        elif kind == WHO:
            self._book.answer(sender, map(str, entries(fields, "members")))
        elif kind == CONTACTS:
            self.know([Contact.from_json(entry) for entry in entries(fields, "contacts")])
        else:
            self._receive_monitor(Node(sender), from_json(fields), now_s)
        self._tell_change()
        if self._member is not None:
            self._schedule(self._member.due_s(now_s) - now_s)

    def _receive_monitor(self, sender: Node, message: Message, now_s: float) -> None:
        if self._assembly is not None:
            self._assembly.begun(sender.name)
            self._start_if_assembled(now_s)
        if self._member is not None:
            self._dispatch(self._member.receive(sender, message, now_s))
            self._look(self._member, now_s)
        elif self._joining and isinstance(message, Decided):
            self._heard_view(message.view, now_s)

    def _heard_here(self, sender: str, complete: bool, now_s: float) -> None:
        assembly = self._assembly
        if assembly is None:
            return
        before = assembly.complete
        assembly.heard(sender, complete)
        if assembly.complete and not before:
            self._say_here(assembly)
        self._start_if_assembled(now_s)

    def _heard_end(self, sender: str, crash: Crash | None) -> None:
        self._network.send(sender, {"kind": NOTED})
        if sender in self.ended:
            return
        self.ended.add(sender)
        if self._assembly is not None:
            self._assembly.ended(sender)
        if crash is not None:
            self._on_crashed(crash)

    def _heard_view(self, view: ClusterView, now_s: float) -> None:
        """What a newcomer hears."""
        me = Node(self.me)
        if me in view.members:
            self._joining = False
            self._start(view, now_s)
        elif me in view.removed:
            self._stop(f"{self.me} was removed in epoch {view.epoch}, before it had heard that it was admitted")

    def _dispatch(self, messages: Iterable[Sent]) -> None:
        for to, message in messages:
            self._network.send(to.name, to_json(message))

    # -- time ----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._closed or self._stopped:
            return
        now_s = boot_clock_s()
        wait_s = self._timing.beat_s
        if self._assembly is not None:
            self._say_here(self._assembly)
            self._start_if_assembled(now_s)
        elif self._member is not None:
            self._dispatch(self._member.tick(now_s))
            self._look(self._member, now_s)
            self._look_for_lost_hosts(self._member.view, now_s)
            self._book.ask_for_missing(self._member.view, self.ended, now_s, self._timing.beat_s)
            self._book.forget_those_out(self._member.view, self.ended, self._disowned, now_s)
            self._tell_disowned()
            wait_s = self._member.due_s(now_s) - now_s
        elif self._joining:
            for name in self._book:
                self._network.send(name, to_json(JoinRequest()))
        self._schedule(wait_s)

    def _schedule(self, wait_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._closed and not self._stopped:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._tick)

    def _say_here(self, assembly: Assembly) -> None:
        for name in assembly.others:
            self._network.send(name, {"kind": HERE, "complete": assembly.complete})

    def _start_if_assembled(self, now_s: float) -> None:
        assembly = self._assembly
        if assembly is None or not assembly.is_due(now_s):
            return
        if not assembly.is_over and assembly.missing:
            log.warning(
                "%s: not heard within %g s of the beginning, so taken for dead: %s",
                self.me, ASSEMBLY_LIMIT_S, ", ".join(assembly.missing),
            )  # fmt: skip
        self._assembly = None
        first = tuple(Node(name) for name in (self.me, *assembly.others))
        self._start(ClusterView(0, first, witness=Node(self._witness) if self._witness else None), now_s)

    def _start(self, view: ClusterView, now_s: float) -> None:
        self._seen = view
        self._witness = view.witness.name if view.witness is not None else None
        self._member = Member(Node(self.me), view, self._timing, now_s)
        if self._leaving:
            self._member.leave()

    # -- what follows --------------------------------------------------------------------------------------------

    def _look(self, member: Member, now_s: float) -> None:
        """After the state machine has run: what is new?"""
        status = member.status(now_s)
        if status.state is State.STOPPED:
            self._stop(status.reason)
            return
        before, view = self._seen, member.view
        if before is None or view is before:
            return
        self._seen = view
        removed = {node.name for node in before.members} - {node.name for node in view.members}
        self._book.part_with(removed, self.ended, now_s)
        removed.discard(self._witness or "")  # no rank has to do with it
        # The kernel has closed the connections of those that have ended, and their host may get another rank.
        for name in removed - self.ended:
            if name in self._book.contacts:
                self._losses.lose(self._book.contacts[name], now_s)
        if removed:
            self._on_removed(Removal(tuple(sorted(removed)), *self._given_up(view, now_s)))

    def _look_for_lost_hosts(self, view: ClusterView, now_s: float) -> None:
        """A host may be found lost after its members: when a newcomer on it is not heard any more."""
        hosts, addresses = self._given_up(view, now_s)
        if hosts:
            self._on_removed(Removal((), hosts, addresses))

    def _given_up(self, view: ClusterView, now_s: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        present = {node.name for node in view.members} - self.ended
        out = {node.name for node in view.removed} | self.ended
        return self._losses.given_up(self._book.contacts, present, out, now_s)

    def _reason_to_wait(self, members: Collection[str], now_s: float) -> str:
        if self._stopped:
            return self._stopped
        if self._member is None:
            return f"{self.me} does not take part in the watch yet"
        present = {node.name for node in self._member.view.members}
        living = sorted(present.intersection(members) - self.ended)
        if living:
            return f"{', '.join(living)} may be alive: no majority has agreed that it is out"
        status = self._member.status(now_s)
        return "" if status.state is State.GOING else status.reason

    def _leave(self) -> None:
        self._leaving = True
        if self._member is not None:
            self._member.leave()

    def _stop(self, reason: str) -> None:
        if self._stopped:
            return
        self._stopped = reason
        self._tell_change()
        if not self._leaving:
            self._on_stopped(reason)

    def _tell_end(self, members: Iterable[str]) -> None:
        for member in members:
            self._network.send(member, self._end)

    def _tell_disowned(self) -> None:
        for member in self._disowned & self._others() if self._member is not None else ():
            self._network.send(member, {"kind": DISOWNED})

    def _others(self) -> set[str]:
        """The others that take part, as far as is known, and whose ranks have not ended."""
        view = self.view
        names = set(self._book) if view is None else {node.name for node in view.members}
        return names - self.ended - {self.me, self._witness}

    async def _change(self, limit_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), limit_s)

    def _tell_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
