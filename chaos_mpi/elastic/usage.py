"""How fast the job goes, and what it takes of the machine. Pure but for the two functions that ask the kernel."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from typing import Any

import psutil

#: The speed is that of the last so many looks at which the step had changed.
LOOKS = 10
#: Looks closer to each other than this say little, seconds: the kernel counts in hundredths of a second.
LEAST_S = 0.5


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


class CpuShare:
    """Percent of one core, from looks at a counter of processor seconds.

    Args:
        since: when the counter was zero, seconds; None if that was too long ago to tell anything.
    """

    def __init__(self, since: float | None) -> None:
        self._before = (since, 0.0) if since is not None else None
        self._percent: float | None = None

    def look(self, now: float, cpu_s: float) -> float | None:
        """At ``now`` the counter was ``cpu_s``. The percentage since the look before, or the last one known."""
        if self._before is None:
            self._before = (now, cpu_s)
        elif now - self._before[0] >= LEAST_S:
            self._percent = 100.0 * (cpu_s - self._before[1]) / (now - self._before[0])
            self._before = (now, cpu_s)
        return self._percent


class Usage:
    """What this process, and its machine, are using. Asks the kernel when it is asked, and never else."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._of_process = CpuShare(self._process.create_time())
        self._of_machine = CpuShare(None)
        self._lock = threading.Lock()

    def process(self) -> dict[str, Any]:
        """``cpu_percent`` of one core, ``cpu_s`` since its start (children not counted), ``rss_bytes``."""
        with self._lock:
            times = self._process.cpu_times()
            cpu_s = times.user + times.system
            percent = self._of_process.look(time.time(), cpu_s)
            return {"cpu_percent": percent, "cpu_s": cpu_s, "rss_bytes": self._process.memory_info().rss}

    def machine(self) -> dict[str, Any]:
        """``cores``, ``cpu_percent`` of all cores together, ``load`` (1, 5 and 15 minutes), and memory in bytes."""
        with self._lock:
            times, memory, cores = psutil.cpu_times(), psutil.virtual_memory(), os.cpu_count() or 1
            busy_s = sum(times[:7]) - times.idle - getattr(times, "iowait", 0.0)
            percent = self._of_machine.look(time.monotonic(), busy_s)
            return {
                "cores": cores,
                "cpu_percent": None if percent is None else min(100.0, percent / cores),
                "load": list(os.getloadavg()),
                "memory_total_bytes": memory.total,
                "memory_available_bytes": memory.available,
            }
