"""All links between the hosts of a job, as each agent knows them from what the others say. Pure.

The speaker of each host says now and then how long heartbeats from there to the other hosts and back take, and what has
been ordered of links; who has measured bandwidths says these. So who comes later learns it, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

from chaos_mpi.membership import host_of
from chaos_mpi.monitor.hostlinks import UP, Ends, LinkStatus, Order, ends_of

#: The kind of the message.
TABLE = "Table"
#: How often it is sent.
TABLE_S = 5.0


class LinkTable:
    """What one agent knows of round-trip times and bandwidths.

    Args:
        me: its member.
    """

    def __init__(self, me: str) -> None:
        self._host = host_of(me)
        self._rtt_s: dict[str, dict[str, float]] = {}  # by host, by other host
        self._bytes_per_s: dict[str, dict[str, float]] = {}  # from host, to other host; what was measured last counts

    def measured(self, rtt_s: Mapping[str, float]) -> None:
        """What this agent has measured, by member; of several on a host the least counts."""
        by_host: dict[str, float] = {}
        for member, seconds in rtt_s.items():
            by_host[host_of(member)] = min(seconds, by_host.get(host_of(member), seconds))
        by_host.pop(self._host, None)
        self._rtt_s[self._host] = by_host

    def sent(self, bytes_per_s: Mapping[str, float]) -> None:
        """How fast data went from this host to others, by host."""
        self._bytes_per_s.setdefault(self._host, {}).update(bytes_per_s)

    def bytes_per_s_to(self, host: str) -> float | None:
        """How fast data went from this host to another one, if that is known."""
        return self._bytes_per_s.get(self._host, {}).get(host)

    @property
    def bytes_per_s(self) -> dict[Ends, float]:
        """Bandwidths, where they are known; of the slower direction."""
        return _least(self._bytes_per_s)

    @property
    def rtt_s(self) -> dict[Ends, float]:
        """Round-trip times, where they are known; the least that was measured by either end."""
        return _least(self._rtt_s)

    def message(self, orders: Mapping[Ends, Order]) -> dict[str, Any]:
        """What to send to all others."""
        rtt_ms = {other: round(1e3 * seconds, 3) for other, seconds in self._rtt_s.get(self._host, {}).items()}
        rates = {other: round(rate) for other, rate in self._bytes_per_s.get(self._host, {}).items()}
        told = [[*ends, *order] for ends, order in orders.items()]
        return {"kind": TABLE, "rtt_ms": rtt_ms, "bytes_per_s": rates, "orders": told}

    def receive(self, sender: str, fields: Mapping[str, Any]) -> dict[Ends, Order]:
        """Take a message in; returns the orders in it.

        Raises:
            ValueError: it cannot be understood.
        """
        try:
            rtt_s = {str(other): float(ms) / 1e3 for other, ms in fields["rtt_ms"].items()}
            rates = {str(other): float(rate) for other, rate in fields["bytes_per_s"].items()}
            orders = {
                ends_of(str(a), str(b)): Order(float(at_s), str(by), down is True)
                for a, b, at_s, by, down in fields["orders"]
            }
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"the table of links of {sender} cannot be read: {error!r}") from error
        if not all(0 <= seconds < math.inf for seconds in rtt_s.values()) or not all(
            0 < r < math.inf for r in rates.values()
        ):
            raise ValueError(f"the table of links of {sender} has times or bandwidths that cannot be")
        self._rtt_s[host_of(sender)] = rtt_s
        self._bytes_per_s.setdefault(host_of(sender), {}).update(rates)
        return orders

    def rows(self, hosts: Collection[str], links: Mapping[Ends, LinkStatus]) -> list[dict[str, Any]]:
        """A row for each pair of hosts: ``a``, ``b``, ``rtt_ms``, ``bytes_per_s``, ``state``, ``via``, ``no_detour``.

        What is not known is None.

        Args:
            hosts: of the job.
            links: those that are not simply up.
        """
        rtt_s, bytes_per_s = self.rtt_s, self.bytes_per_s
        rows = []
        for a, b in itertools.combinations(sorted(hosts), 2):
            status = links.get((a, b), LinkStatus((a, b), UP))
            rtt_ms = round(1e3 * rtt_s[a, b], 3) if (a, b) in rtt_s else None
            rate = round(bytes_per_s[a, b]) if (a, b) in bytes_per_s else None
            how = {"state": status.state, "via": status.via, "no_detour": status.no_detour}
            rows.append({"a": a, "b": b, "rtt_ms": rtt_ms, "bytes_per_s": rate, **how})
        return rows


def _least(by_host: Mapping[str, Mapping[str, float]]) -> dict[Ends, float]:
    """Of what hosts have measured of their links, the less of the two ends of each."""
    found: dict[Ends, float] = {}
    for host, of_others in by_host.items():
        for other, value in of_others.items():
            ends = ends_of(host, other)
            found[ends] = min(value, found.get(ends, value))
    return found
