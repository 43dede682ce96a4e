"""How fast a source sends, from what has arrived. Pure: the time is told."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: What was this long ago counts for a third, seconds: links change, and the first bytes come late.
MEMORY_S = 1.0


@dataclass(slots=True)
class MeasuredRate:
    """Bytes per second over the time in which something was due, the recent time most.

    Attributes:
        since: when the last bytes came, or the first request after a pause was made; None while nothing is due.
    """

    since: float | None = None
    _nbytes: float = 0.0
    _seconds: float = 0.0

    @property
    def known(self) -> bool:
        """Whether anything has arrived yet."""
        return self._seconds > 0.0

    def asked(self, now: float) -> None:
        """Bytes are due from now on."""
        if self.since is None:
            self.since = now

    def arrived(self, now: float, nbytes: int, *, more: bool) -> None:
        """Bytes have come; whether ``more`` are due."""
        waited = 0.0 if self.since is None else now - self.since
        kept = math.exp(-waited / MEMORY_S)
        self._nbytes = self._nbytes * kept + nbytes
        self._seconds = self._seconds * kept + waited
        self.since = now if more else None

    def bytes_per_s(self, now: float, due_bytes: int, prior: float) -> float:
        """The rate; lower the longer the next ``due_bytes`` are late; at most ``prior`` as long as nothing has come.

        Args:
            now: the time.
            due_bytes: what is to come next.
            prior: what is assumed as long as nothing has come, bytes per second.
        """
        waited = 0.0 if self.since is None else now - self.since
        if not self.known:
            return min(prior, due_bytes / waited) if waited > 0.0 and due_bytes else prior
        late = max(0.0, waited - 2.0 * due_bytes * self._seconds / self._nbytes)
        return self._nbytes / (self._seconds + late)
