"""Heals cut links by detours: the state machine of :mod:`chaos_mpi.monitor.detours`, with a clock and with routes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from chaos_mpi.agent import tasks
from chaos_mpi.agent.contacts import Contact, Interface, nearest
from chaos_mpi.agent.machine import Machine, plausible
from chaos_mpi.agent.network import Network, boot_clock_s
from chaos_mpi.agent.routes import (
    Forwarding,
    Route,
    can_connect,
    remove,
    remove_left_over,
    replace,
    routes_through,
)
from chaos_mpi.membership import host_of
from chaos_mpi.monitor import detours
from chaos_mpi.monitor.cluster import Timing
from chaos_mpi.monitor.detours import Detours, Said, Way
from chaos_mpi.monitor.hostlinks import CUT, DOWN, Ends, LinkStatus, Order, Sight, ends_of, sight_of
from chaos_mpi.monitor.linktable import TABLE, TABLE_S, LinkTable
from chaos_mpi.monitor.order import HostLinks
from chaos_mpi.monitor.reachability import Diagnosis

#: The messages that are about links.
KINDS = frozenset({TABLE, *detours.KINDS})

log = logging.getLogger("chaos_mpi.agent")

#: A link that nothing came over for so many heartbeats gets a detour, if there was no answer to an attempt to connect,
#: which begins earlier. Sooner than a node is taken for dead: TCP waits twice as long each time that an attempt fails.
_LATE_BEATS, _SILENT_BEATS = 2, 3
#: How often the routes are looked after: another agent of this host that ends takes those away that it has set.
_RENEW_S = 1.0
#: Time that two ends have to set their routes, and then to connect anew where TCP waits long with its next attempt.
_CONNECT_S = 0.2
#: How often the direct way is tried while there is a detour, and how long each time.
_PROBE_S, _PROBE_LIMIT_S = 0.5, 0.4
#: An order counts for so much later than the one that it takes the place of, at least, seconds.
_LATER_S = 1e-3


class Watching(Protocol):
    """What is known of the other agents: :class:`chaos_mpi.agent.watch.Watch`."""

    @property
    def witness(self) -> str | None: ...

    def contact(self, member: str) -> Contact | None: ...

    def diagnosis(self, limit_s: float) -> Diagnosis | None: ...

    def rtt_s(self) -> dict[str, float]: ...


class Detouring:
    """One agent's part, from :meth:`start` to :meth:`close`.

    Args:
        me: its member.
        own: the addresses of this host that the agents use, with their networks.
        network: carries messages; what comes is to be given to :meth:`receive`.
        watch: knows the others.
        timing: limits.
        allowed: whether routes may be set and packets forwarded; else it is only said which links are cut.
        on_change: is called with the links that are otherwise than before.

    Attributes:
        learnt_s: when the bandwidth to another host was last measured, by host.
    """

    def __init__(
        self,
        me: str,
        own: Sequence[Interface],
        network: Network,
        watch: Watching,
        timing: Timing,
        allowed: bool,
        on_change: Callable[[list[LinkStatus]], None],
    ) -> None:
        self._own, self._network, self._watch, self._on_change = tuple(own), network, watch, on_change
        self._timing = timing
        self._links = Detours(me, 2 * timing.limit_s, can_route=allowed, can_forward=allowed)
        self._table = LinkTable(me)
        self._forwarding = Forwarding()
        self._sight: Sight | None = None
        self._has_measured = False  # bandwidths, since the last table
        self._machine, self._machines = Machine(), dict[str, dict[str, Any]]()  # this host's, and by host those of all
        self.learnt_s: dict[str, float] = {}
        self._set: dict[str, tuple[Way, list[Route]]] = {}  # by the other host
        self._connect_s: dict[str, float] = {}  # by the other host, when to connect anew if it is not heard
        self._complained: set[str] = set()
        self._wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._attempts: dict[str, asyncio.Task[None]] = {}  # by the other host

    def start(self, *, alone: bool) -> None:
        """Begin.

        Args:
            alone: no other rank of the job can have set routes on this host yet, so those that are there are left over.
        """
        if not self._tasks:
            work = (self._look_again_and_again(), self._keep_routes(alone), self._probe(), self._tell_table())
            self._tasks = [asyncio.get_running_loop().create_task(part) for part in work]
            for task in self._tasks:
                task.add_done_callback(_report)

    def receive(self, sender: str, fields: dict[str, Any]) -> None:
        """Take in a message of a peer that is of one of :data:`KINDS`.

        Raises:
            ValueError: it cannot be understood.
        """
        if fields["kind"] == TABLE:
            orders = self._table.receive(sender, fields)
            self._links.bytes_per_s = self._table.bytes_per_s
            self._heed_orders(orders)
            if "machine" in fields:
                self._machines[host_of(sender)] = plausible(fields["machine"])
        else:
            self._do(self._links.receive(sender, fields, boot_clock_s()))

    def table(self) -> list[dict[str, Any]]:
        """All links; see :meth:`chaos_mpi.monitor.linktable.LinkTable.rows`."""
        return self._measured_table().rows(self._hosts(), self._links.links)

    def machines(self) -> dict[str, dict[str, Any]]:
        """What is known of each host, by name; see :meth:`chaos_mpi.agent.machine.Machine.look`."""
        known = {**self._machines, self._links.host: self._machine.look()}
        return {host: machine for host, machine in sorted(known.items()) if host in self._hosts()}

    @property
    def speakers(self) -> Mapping[str, str]:
        """For each host with ranks the member that speaks for it."""
        speakers = self._sight.speakers if self._sight is not None else {}
        return {host: member for host, member in speakers.items() if host in self._hosts()}

    def bytes_per_s(self, host: str) -> float | None:
        """How fast data goes from here to another host, if that is known."""
        return self._table.bytes_per_s_to(host)

    def rtt_s(self, host: str) -> float | None:
        """The round-trip time to another host, if that is known."""
        return self._measured_table().rtt_s.get(ends_of(self._links.host, host))

    def sent(self, bytes_per_s: Mapping[str, float]) -> None:
        """How fast data went to other hosts. The others are told with the next table."""
        self._table.sent(bytes_per_s)
        self.learnt_s |= dict.fromkeys(bytes_per_s, boot_clock_s())
        self._links.bytes_per_s = self._table.bytes_per_s
        self._has_measured |= bool(bytes_per_s)

    def links(self) -> HostLinks:
        """What is known of all links."""
        table = self._measured_table()
        unusable = [ends for ends, status in self._links.links.items() if status.state in (CUT, DOWN)]
        return HostLinks(table.bytes_per_s, table.rtt_s, unusable)

    def order(self, one: str, other: str, *, down: bool) -> str:
        """Have a link not be used any more, or used again; returns why that cannot be, or nothing."""
        hosts = self._hosts()
        for host in (one, other):
            if host not in hosts:
                return f"there is no host {host} in the job; its hosts are {', '.join(sorted(hosts))}"
        if one == other:
            return f"a link has two ends, not {one} twice"
        ends = ends_of(one, other)
        before = self._links.orders.get(ends)
        # Later than what it is to replace, also if that was said where the clock is ahead.
        at_s = max(time.time(), before.at_s + _LATER_S) if before is not None else time.time()
        self._heed_orders({ends: Order(at_s, self._links.me, down)})
        self._send_table()
        return ""

    def _heed_orders(self, orders: Mapping[Ends, Order]) -> None:
        """Do at once what is new in these."""
        before = self._links.orders
        self._links.order(orders)
        if self._sight is not None and self._links.orders != before:
            self._do(self._links.tick(self._sight, boot_clock_s()))

    def _hosts(self) -> set[str]:
        return self._sight.hosts if self._sight is not None else set()

    def _measured_table(self) -> LinkTable:
        """The table, with the present round-trip times."""
        self._table.measured(self._watch.rtt_s())
        return self._table

    def _speaks(self, sight: Sight) -> bool:
        """Whether this agent speaks for its host."""
        return sight.speakers.get(self._links.host) == self._links.me

    def _send_table(self) -> None:
        if self._sight is not None:
            message = self._measured_table().message(self._links.orders)
            if self._speaks(self._sight):
                message["machine"] = self._machine.look()
            for member in self._sight.members:
                self._network.send(member, message)

    async def _tell_table(self) -> None:
        while True:
            await asyncio.sleep(TABLE_S)
            if self._sight is None:
                continue
            if self._has_measured or self._speaks(self._sight):
                self._has_measured = False
                self._send_table()

    async def close(self) -> None:
        """Put everything back."""
        await tasks.cancel([*self._tasks, *self._attempts.values()])
        for _, routes in self._set.values():
            for route in routes:
                await remove(route)
        self._set.clear()
        self._forwarding.stop()

    async def _look_again_and_again(self) -> None:
        while True:
            late, silent = (self._watch.diagnosis(n * self._timing.beat_s) for n in (_LATE_BEATS, _SILENT_BEATS))
            if late is not None and silent is not None:
                self._sight = sight_of(silent, self._watch.witness)
                for other in self._links.to_probe(sight_of(late, self._watch.witness)):
                    self._try_to_connect(other)
                self._do(self._links.tick(self._sight, boot_clock_s()))
                self._connect_anew(self._sight)
            await asyncio.sleep(self._timing.beat_s / 2)

    def _try_to_connect(self, other: str) -> None:
        contact = self._contact(other)
        if contact is None or other in self._attempts:
            return

        async def attempt() -> None:
            address = nearest(contact.addresses, self._own, same_machine=False)
            works = await can_connect(address, contact.port, self._timing.beat_s)
            self._links.probed(other, works, boot_clock_s())

        task = self._attempts[other] = asyncio.get_running_loop().create_task(attempt())
        task.add_done_callback(lambda _: self._attempts.pop(other))

    def _connect_anew(self, sight: Sight) -> None:
        """See soon whether a detour works: connections that were cut may wait for seconds until they try again."""
        now_s = boot_clock_s()
        for other in self._set:
            if ends_of(self._links.host, other) in sight.cut and now_s >= self._connect_s.get(other, now_s):
                self._connect_s[other] = now_s + 2 * _CONNECT_S
                for member in sight.members:
                    if host_of(member) == other:
                        self._network.reconnect(member)

    def _do(self, messages: list[Said]) -> None:
        """What the state machine wants. This host forwards before it says so."""
        if self._links.forwards != self._forwarding.started:
            messages = self._forward(self._links.forwards) or messages
        if self._links.ways != {other: way for other, (way, _) in self._set.items()}:
            self._wanted.set()
        for member, fields in messages:
            self._network.send(member, fields)
        if changes := self._links.changes():
            self._on_change(changes)

    def _forward(self, wanted: bool) -> list[Said]:
        """Begin or end to forward; what is to be said if that is not possible."""
        if not wanted:
            self._forwarding.stop()
            return []
        try:
            self._forwarding.start()
        except OSError as error:
            self._complain(f"{self._links.host} cannot pass on what others send round a cut link: {error}")
            return self._links.refuse_to_forward()
        return []

    # -- routes --------------------------------------------------------------------------------------------------

    async def _keep_routes(self, alone: bool) -> None:
        if alone and self._links.can_route:
            await remove_left_over()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _RENEW_S)
            again = not self._wanted.is_set()
            self._wanted.clear()
            if again and self._forwarding.started:
                self._do(self._forward(True))
            ways = self._links.ways
            for other in self._set.keys() - ways.keys():
                await self._replace_routes(other, None, [])
            for other, way in ways.items():
                if again or other not in self._set or self._set[other][0] != way:
                    await self._replace_routes(other, way, self._routes(other, way.via))

    async def _replace_routes(self, other: str, way: Way | None, routes: list[Route]) -> None:
        _, before = self._set.pop(other, (None, []))
        for route in before:
            if route.destination not in {new.destination for new in routes}:
                await remove(route)
        if way is None:
            return
        # First noted, then set: what was begun is taken back at the end, too.
        self._set[other] = (way, routes)
        self._connect_s[other] = boot_clock_s() + _CONNECT_S
        try:
            for route in routes:
                await replace(route)
        except OSError as error:
            self._complain(f"{self._links.host} cannot go round the cut link to {other}: {error.strerror}")
            if error.errno in (errno.EPERM, errno.ENOENT):
                self._links.can_route = False

    def _routes(self, other: str, via: str) -> list[Route]:
        target, third = self._contact(other), self._contact(via)
        if target is None or third is None:
            return []
        routes = routes_through(self._own, target.addresses, third.addresses)
        if not routes:
            self._complain(
                f"{self._links.host} cannot go round the cut link to {other}: {via} is in none of its networks"
            )
        return routes

    def _contact(self, host: str) -> Contact | None:
        speaker = self._sight.speakers.get(host) if self._sight is not None else None
        return None if speaker is None else self._watch.contact(speaker)

    def _complain(self, text: str) -> None:
        if text not in self._complained:
            self._complained.add(text)
            log.warning("%s", text)

    async def _probe(self) -> None:
        """Try the direct way to the hosts that there is a detour to."""
        while True:
            for other, (_, routes) in list(self._set.items()):
                contact = self._contact(other)
                if routes and contact is not None:
                    address = routes[0].destination
                    works = await can_connect(address, contact.port, _PROBE_LIMIT_S, around_routes=True)
                    self._links.probed(other, works, boot_clock_s())
            await asyncio.sleep(_PROBE_S)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("cut links are not healed any more: %r", error)
