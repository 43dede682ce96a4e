"""How fast the job goes, and what a process takes. Pure but for what asks the kernel."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Any

import psutil

from chaos_mpi.agent.machine import LEAST_S, CpuShare

#: The speed is that of the last so many looks at which the step had changed.
LOOKS = 5


class StepRate:
    """Steps per second, from looks at the number of the step. It need not be looked at in every step."""

    def __init__(self) -> None:
        self._changes: deque[tuple[float, int]] = deque(maxlen=LOOKS)

    def look(self, now: float, step: int) -> None:
        """At ``now`` (seconds) the step was ``step``. One that goes back, as by resuming, begins anew."""
        if self._changes and step < self._changes[-1][1]:
            self._changes.clear()
        before = self._changes[-1] if self._changes else (-math.inf, -1)
        if step != before[1] and now - before[0] >= LEAST_S:
            self._changes.append((now, step))

    def per_s(self, now: float) -> float | None:
        """Steps per second; None if it is not known yet. It falls when no step follows."""
        changes = list(self._changes)
        if len(changes) < 2:
            return None
        (begun, first), (before, _), (last, step) = changes[0], changes[-2], changes[-1]
        waited = now - last
        usual = max(last - before, (last - begun) / (len(changes) - 1))
        late = waited if waited > 2.0 * usual else 0.0
        return (step - first) / (last - begun + late)


class Usage:
    """What this process is using. Asks the kernel when it is asked, and never else."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._of_process = CpuShare(self._process.create_time())
        self._lock = threading.Lock()

    def process(self) -> dict[str, Any]:
        """``cpu_percent`` of one core, ``cpu_s`` since its start (children not counted), ``rss_bytes``."""
        with self._lock:
            times = self._process.cpu_times()
            cpu_s = times.user + times.system
            percent = self._of_process.look(time.time(), cpu_s)
            return {"cpu_percent": percent, "cpu_s": cpu_s, "rss_bytes": self._process.memory_info().rss}
