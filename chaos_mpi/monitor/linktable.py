"""All links between the hosts of a job, as each agent knows them from what the others say. Pure.

The speaker of each host says now and then how long heartbeats from there to the other hosts and back take, and what has
been ordered of links. So who comes later learns it, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from chaos_mpi.membership import host_of
from chaos_mpi.monitor.hostlinks import UP, Ends, LinkStatus, Order, ends_of

#: The kind of the message.
TABLE = "Table"
#: How often it is sent.
TABLE_S = 5.0


class LinkTable:
    """What one agent knows of round-trip times.

    Args:
        me: its member.
    """

    def __init__(self, me: str) -> None:
        self._host = host_of(me)
        self._rtt_s: dict[str, dict[str, float]] = {}  # by host, by other host

    def measured(self, rtt_s: Mapping[str, float]) -> None:
        """What this agent has measured, by member; of several on a host the least counts."""
        by_host: dict[str, float] = {}
        for member, seconds in rtt_s.items():
            by_host[host_of(member)] = min(seconds, by_host.get(host_of(member), seconds))
        by_host.pop(self._host, None)
        self._rtt_s[self._host] = by_host

    def message(self, orders: Mapping[Ends, Order]) -> dict[str, Any]:
        """What to send to all others."""
        rtt_ms = {other: round(1e3 * seconds, 3) for other, seconds in self._rtt_s.get(self._host, {}).items()}
        return {"kind": TABLE, "rtt_ms": rtt_ms, "orders": [[*ends, *order] for ends, order in orders.items()]}

    def receive(self, sender: str, fields: Mapping[str, Any]) -> dict[Ends, Order]:
        """Take a message in; returns the orders in it.

        Raises:
            ValueError: it cannot be understood.
        """
        try:
            rtt_s = {str(other): float(ms) / 1e3 for other, ms in fields["rtt_ms"].items()}
            orders = {
                ends_of(str(a), str(b)): Order(float(at_s), str(by), down is True)
                for a, b, at_s, by, down in fields["orders"]
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the table of links of {sender} cannot be read: {error!r}") from error
        self._rtt_s[host_of(sender)] = rtt_s
        return orders

    def rows(self, hosts: Collection[str], links: Mapping[Ends, LinkStatus]) -> list[dict[str, Any]]:
        """A row for each pair of hosts: ``a``, ``b``, ``rtt_ms`` (None where it is not known), ``state``, ``via``.

        Args:
            hosts: of the job.
            links: those that are not simply up.
        """
        rows = []
        for a, b in itertools.combinations(sorted(hosts), 2):
            known = [rtt[to] for rtt, to in ((self._rtt_s.get(a, {}), b), (self._rtt_s.get(b, {}), a)) if to in rtt]
            status = links.get((a, b), LinkStatus((a, b), UP))
            rtt_ms = round(1e3 * min(known), 3) if known else None
            rows.append({"a": a, "b": b, "rtt_ms": rtt_ms, "state": status.state, "via": status.via})
        return rows
