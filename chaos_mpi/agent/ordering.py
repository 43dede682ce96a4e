"""Learns the bandwidth of links from what the rank sends, and says in which order the members would do better.

Now and then the agent asks its rank, which says ``{"sent": {address: [bytes, seconds]}, "members": [names], "step":
n}``: what it has sent to each address so far, and how long something was under way there; who the members are, in rank
order; and how many steps they have made. What was sent from one answer to the next, by the time it took, is how fast
the link is for messages like these: of large ones its bandwidth, of small ones less. The agents tell each other what
they have learned, and that of the first member decides (:mod:`chaos_mpi.monitor.order`).
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from chaos_mpi.agent.link_server import LinkServer
from chaos_mpi.agent.network import boot_clock_s
from chaos_mpi.membership import host_of
from chaos_mpi.monitor.linktable import TABLE_S
from chaos_mpi.monitor.order import HostLinks, OrderKeeper, share_sent
from chaos_mpi.monitor.topology import LEAST_TRANSFER_BYTES

#: Added to the time that something was under way, which the kernel counts in ticks of some milliseconds.
_LEAST_BUSY_S = 0.002
#: Also of few bytes it is a measurement if they took so long within :data:`TABLE_S`.
_LONG_BUSY_S = 0.5


class Links(Protocol):
    """Where what is known of links is kept: :class:`chaos_mpi.agent.detouring.Detouring`."""

    def sent(self, bytes_per_s: Mapping[str, float]) -> None: ...

    def links(self) -> HostLinks: ...


@dataclass(frozen=True, slots=True)
class _Told:
    """What the rank has said at one time."""

    at_s: float
    members: tuple[str, ...] = ()
    step: int = 0
    sent: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # bytes and seconds, by address


class Ordering:
    """One agent's part.

    Args:
        me: its member.
        link: with the rank.
        links: what is known of links.
        addresses: of the members that are known, by member.
    """

    def __init__(
        self, me: str, link: LinkServer, links: Links, addresses: Callable[[], Mapping[str, tuple[str, ...]]]
    ) -> None:
        self._me, self._link, self._links, self._addresses = me, link, links, addresses
        self._keeper = OrderKeeper()
        self._last = _Told(boot_clock_s())
        self._look: Callable[[], tuple[str, ...] | None] | None = None

    async def run(self) -> None:
        """Ask again and again, and decide."""
        while True:
            self._link.ask_traffic()
            await asyncio.sleep(TABLE_S)
            look, self._look = self._look, None
            # With many members it takes longer than heartbeats may wait.
            if look is not None and (wanted := await asyncio.to_thread(look)) is not None:
                self._link.arrange(wanted)

    def receive(self, told: Mapping[str, Any]) -> None:
        """Take in what the rank says.

        Raises:
            ValueError, TypeError, KeyError: it cannot be understood.
        """
        sent = {str(address): (int(nbytes), float(busy_s)) for address, (nbytes, busy_s) in told["sent"].items()}
        members = tuple(str(member) for member in told["members"])
        now = _Told(boot_clock_s(), members, int(told["step"]), sent)
        last, self._last = self._last, now
        hosts = {
            str(ipaddress.ip_address(address)): host_of(member)
            for member, addresses in self._addresses().items()
            for address in addresses
            if host_of(member) != host_of(self._me)
        }
        grown: dict[str, tuple[int, float]] = {}  # by host
        for address, (nbytes, busy_s) in sent.items():
            before_bytes, before_s = last.sent.get(address, (0, 0.0))
            if (host := hosts.get(address)) is not None and nbytes > before_bytes and busy_s >= before_s:
                more_bytes, more_s = grown.get(host, (0, _LEAST_BUSY_S))
                grown[host] = more_bytes + nbytes - before_bytes, more_s + busy_s - before_s
        much = {host for host, (n, busy_s) in grown.items() if n >= LEAST_TRANSFER_BYTES or busy_s >= _LONG_BUSY_S}
        self._links.sent({host: grown[host][0] / grown[host][1] for host in much})
        if members and members[0] == self._me and members == last.members:
            self._look = self._prepared(last, now, sum(nbytes for nbytes, _ in grown.values()))

    def _prepared(self, last: _Told, now: _Told, nbytes: int) -> Callable[[], tuple[str, ...] | None] | None:
        """A look at all links; ``nbytes`` are what the rank has sent to other hosts between these two times."""
        share, steps = share_sent(now.members, self._me), now.step - last.step
        if steps <= 0 or share <= 0:
            return None
        message_bytes, pace = nbytes / steps / share, steps / (now.at_s - last.at_s)
        return partial(self._keeper.look, now.members, self._links.links(), message_bytes, pace, now.at_s)
