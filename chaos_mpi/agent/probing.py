"""Probes links over which the job sends nothing: see :mod:`chaos_mpi.monitor.topology`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from chaos_mpi.agent.network import Network, boot_clock_s
from chaos_mpi.membership import host_of
from chaos_mpi.monitor.topology import ProbePlan, Probes

#: The messages of probes: one, and its answer.
PROBE, PROBED = "Probe", "Probed"
KINDS = frozenset({PROBE, PROBED})
#: How often it is looked whether a link is to be probed.
_PERIOD_S = 1.0


class Known(Protocol):
    """Where what is known of links is kept: :class:`chaos_mpi.agent.detouring.Detouring`."""

    @property
    def speakers(self) -> Mapping[str, str]: ...

    @property
    def learnt_s(self) -> Mapping[str, float]: ...

    def bytes_per_s(self, host: str) -> float | None: ...

    def rtt_s(self, host: str) -> float | None: ...

    def sent(self, bytes_per_s: Mapping[str, float]) -> None: ...


class Probing:
    """One agent's part.

    Args:
        me: its member.
        network: carries messages; what comes is to be given to :meth:`receive`.
        links: what is known of links.
        plan: when to probe.
    """

    def __init__(self, me: str, network: Network, links: Known, plan: ProbePlan | None = None) -> None:
        self._me, self._network, self._links, self._plan = me, network, links, plan or ProbePlan()
        self._begun_s = boot_clock_s()
        self._number = 0
        self._sent: dict[str, tuple[int, int, float]] = {}  # by host: number, bytes and time of the last one
        self._probes: dict[str, Probes] = {}

    async def run(self) -> None:
        """Probe what is idle, again and again, if this agent speaks for its host."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            self.look(boot_clock_s())

    def look(self, now_s: float) -> None:
        """Probe a link if one is due."""
        speakers, host = self._links.speakers, host_of(self._me)
        if speakers.get(host) != self._me:
            return
        self._sent = {other: sent for other, sent in self._sent.items() if other in speakers}
        self._probes = {other: probes for other, probes in self._probes.items() if other in speakers}
        other = self._plan.next([(each, self._last_s(each)) for each in speakers if each != host], now_s)
        if other is not None:
            nbytes = self._plan.nbytes(self._links.bytes_per_s(other))
            self._number += 1
            self._sent[other] = self._number, nbytes, now_s
            self._network.send(speakers[other], {"kind": PROBE, "number": self._number, "filling": "." * nbytes})

    def _last_s(self, host: str) -> float:
        _, _, probed_s = self._sent.get(host, (0, 0, self._begun_s))
        return max(probed_s, self._links.learnt_s.get(host, self._begun_s))

    def receive(self, sender: str, fields: Mapping[str, Any]) -> None:
        """Take in a message of a peer that is of one of :data:`KINDS`.

        Raises:
            ValueError: it cannot be understood.
        """
        number = fields.get("number")
        if not isinstance(number, int):
            raise ValueError("a probe has no number")
        if fields["kind"] == PROBE:
            self._network.send(sender, {"kind": PROBED, "number": number})
            return
        host = host_of(sender)
        sent = self._sent.get(host)
        rtt_s = self._links.rtt_s(host)
        if sent is None or sent[0] != number or rtt_s is None:
            return
        known = self._links.bytes_per_s(host)
        rate = self._probes.setdefault(host, Probes()).answered(sent[1], boot_clock_s() - sent[2], rtt_s, known)
        if rate is not None and rate != known:
            self._links.sent({host: rate})
