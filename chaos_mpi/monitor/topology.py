"""What is known of links and nodes, and when a link is to be probed. Pure: the time is told.

Bandwidth comes from real transfers wherever there are some. A link of which nothing was learnt for long is probed, when
it is idle, with few bytes, and never so often that probes exceed a rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from chaos_mpi.monitor.cluster import Node

#: Shorter transfers tell more about the round-trip time than about bandwidth.
LEAST_TRANSFER_BYTES = 64 * 1024
#: What was measured that long ago counts for a third.
MEMORY_S = 10.0
#: Weight of one new round-trip time (RFC 6298 uses the same).
_RTT_WEIGHT = 1 / 8


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What is known of the link to one other node.

    Attributes:
        rtt_s: smoothed round-trip time; None if unknown.
        bytes_per_s: smoothed bandwidth; None if unknown.
        measured_s: when the bandwidth was last measured.
        used_s: when bytes last went over it, probes included.
    """

    rtt_s: float | None = None
    bytes_per_s: float | None = None
    measured_s: float = -math.inf
    used_s: float = -math.inf

    def with_rtt(self, rtt_s: float) -> LinkEstimate:
        """After a heartbeat or its like came back in that time."""
        if not 0 <= rtt_s < math.inf:
            raise ValueError(f"rtt_s is {rtt_s}; it must be a number of seconds, 0 or more")
        smoothed = rtt_s if self.rtt_s is None else self.rtt_s + _RTT_WEIGHT * (rtt_s - self.rtt_s)
        return replace(self, rtt_s=smoothed)

    def with_transfer(self, nbytes: int, seconds: float, now_s: float, *, probe: bool = False) -> LinkEstimate:
        """After a transfer. A short one is no measurement, unless it is a probe, and those count little.

        Args:
            nbytes: how much was sent.
            seconds: from the first to the last byte.
            now_s: the time at its end.
            probe: whether it was made to measure.
        """
        used = replace(self, used_s=max(self.used_s, now_s))
        if seconds <= 0 or nbytes <= 0 or (nbytes < LEAST_TRANSFER_BYTES and not probe):
            return used
        rate = nbytes / seconds
        if self.bytes_per_s is None:
            return replace(used, bytes_per_s=rate, measured_s=now_s)
        # The longer since the last measurement, and the longer the transfer, the more it counts.
        weight = 1 - math.exp(-(max(0.0, now_s - self.measured_s) + seconds) / MEMORY_S)
        weight = min(weight, 0.2) if probe else max(weight, 0.1)
        return replace(used, bytes_per_s=self.bytes_per_s + weight * (rate - self.bytes_per_s), measured_s=now_s)


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """When to probe.

    Attributes:
        probe_bytes: size of one.
        most_bytes_per_s: probes take no more than this of a link.
        every_s: a link of which nothing was learnt for so long is probed.
        idle_s: only after nothing went over it for so long.
    """

    probe_bytes: int = 32 * 1024
    most_bytes_per_s: float = 5_000.0
    every_s: float = 30.0
    idle_s: float = 1.0

    def __post_init__(self) -> None:
        if self.probe_bytes <= 0 or self.most_bytes_per_s <= 0:
            raise ValueError(
                f"probe_bytes is {self.probe_bytes} and most_bytes_per_s is {self.most_bytes_per_s}; "
                "both must be positive"
            )

    @property
    def interval_s(self) -> float:
        """Time between two probes of a link, at least."""
        return max(self.every_s, self.probe_bytes / self.most_bytes_per_s)

    def due_s(self, link: LinkEstimate, probed_s: float) -> float:
        """When a link is to be probed, if nothing goes over it until then.

        Args:
            link: what is known of it.
            probed_s: when it was last probed, whether or not that came to anything; minus infinity for never.
        """
        rested_s = probed_s + self.probe_bytes / self.most_bytes_per_s
        return max(link.used_s + self.idle_s, link.measured_s + self.interval_s, rested_s)


def next_probe(plan: ProbePlan, links: Iterable[tuple[Node, LinkEstimate, float]], now_s: float) -> Node | None:
    """The one link to probe now, that of which nothing was learnt for longest; None if none is due.

    Args:
        plan: when.
        links: the other end, what is known, and when it was last probed.
        now_s: the time.
    """
    due = [(link.measured_s, node) for node, link, probed_s in links if plan.due_s(link, probed_s) <= now_s]
    return min(due)[1] if due else None


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What a node has and does.

    Attributes:
        cores: that the job may use.
        load: processes that run or wait, on the average of a minute.
        memory_bytes: in all.
        memory_free_bytes: that can be used.
        accelerator: its model; empty for none.
        joined_unix_s: when it became a member, by its own clock.
    """

    cores: int
    load: float
    memory_bytes: int
    memory_free_bytes: int
    accelerator: str = ""
    joined_unix_s: float = 0.0
