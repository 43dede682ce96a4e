"""What is learnt of links without the job's own traffic: round-trip times, and probes of idle ones. Pure.

Bandwidth comes from real transfers (:mod:`chaos_mpi.agent.ordering`). A link over which nothing went that would tell
anything is probed now and then, with few bytes. A probe takes as long as the two hosts are slow to answer and the link
is slow to carry it, so it says that a link is *at least* so fast: enough to see that one has recovered which the job
keeps away from. That one is slow is believed of a link which was never used, and after several probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

#: Shorter transfers tell more about the round-trip time than about bandwidth.
LEAST_TRANSFER_BYTES = 64 * 1024
#: Weight of one new round-trip time (RFC 6298 uses the same).
_RTT_WEIGHT = 1 / 8
#: Hosts may take so long to answer: less than that on top of the round trip tells nothing of a link.
_NOISE_S = 0.01
#: So many probes in which a link was slow are believed.
_BELIEVED = 5


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What heartbeats tell of the link to one other node.

    Attributes:
        rtt_s: smoothed round-trip time; None if unknown.
    """

    rtt_s: float | None = None

    def with_rtt(self, rtt_s: float) -> LinkEstimate:
        """After a heartbeat or its like came back in that time.

        Raises:
            ValueError: it is no time.
        """
        if not 0 <= rtt_s < math.inf:
            raise ValueError(f"rtt_s is {rtt_s}; it must be a number of seconds, 0 or more")
        smoothed = rtt_s if self.rtt_s is None else self.rtt_s + _RTT_WEIGHT * (rtt_s - self.rtt_s)
        return replace(self, rtt_s=smoothed)


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """When a link is probed, and with how much: at most 16 kB every 30 s, which is 0.5 kB/s.

    Attributes:
        every_s: a link is probed when nothing was learnt of it, and no probe was sent, for so long.
        least_bytes, most_bytes: size of a probe.
        aim_s: in between, as much as the link carries in this time, by what is known of it: heartbeats wait behind it.
    """

    every_s: float = 30.0
    least_bytes: int = 2 * 1024
    most_bytes: int = 16 * 1024
    aim_s: float = 0.02

    def nbytes(self, bytes_per_s: float | None) -> int:
        """The size of a probe of a link whose bandwidth is known, or not."""
        wanted = self.aim_s * bytes_per_s if bytes_per_s is not None else self.least_bytes
        return round(min(max(wanted, self.least_bytes), self.most_bytes))

    def next(self, links: Iterable[tuple[str, float]], now_s: float) -> str | None:
        """The one link to probe now, that of which nothing was learnt for longest; None if none is due.

        Args:
            links: the other host, and when something was last learnt of the link, or it was last probed.
            now_s: the time.
        """
        due = [(learnt_s, host) for host, learnt_s in links if learnt_s + self.every_s <= now_s]
        return min(due)[1] if due else None


class Probes:
    """What the probes of one link have told."""

    def __init__(self) -> None:
        self._slow: list[float] = []

    def answered(self, nbytes: int, seconds: float, rtt_s: float, bytes_per_s: float | None) -> float | None:
        """After an answer.

        Args:
            nbytes: the size of the probe.
            seconds: until the answer.
            rtt_s: the round-trip time of a heartbeat, which is short.
            bytes_per_s: the bandwidth as it is known.

        Returns:
            The bandwidth as it is known now; None if nothing is.
        """
        carried_s = seconds - rtt_s
        at_least = nbytes / max(carried_s, _NOISE_S)
        if bytes_per_s is not None:
            self._slow.clear()
            return max(bytes_per_s, at_least)
        self._slow = [*self._slow, at_least] if carried_s > _NOISE_S else []
        return max(self._slow) if len(self._slow) >= _BELIEVED else None
