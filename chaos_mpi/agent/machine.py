"""What a machine has and does. Asks the kernel when it is asked, and never else."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil

#: Looks closer to each other than this say little, seconds: the kernel counts in hundredths of a second.
LEAST_S = 0.5
#: A directory for each accelerator (NVIDIA Linux driver, README, "proc interface").
_NVIDIA = Path("/proc/driver/nvidia/gpus")


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


class Machine:
    """Looks at the machine that this process runs on, from any thread. It counts as of now as part of the job."""

    def __init__(self) -> None:
        self._joined_at = time.time()
        self._share = CpuShare(None)
        self._accelerators = accelerators()
        self._lock = threading.Lock()

    def look(self) -> dict[str, Any]:
        """What it has and does, in JSON values.

        Returns:
            ``cores``; ``cpu_percent`` of all cores together, since the look before, None at first; ``load`` (1, 5 and
            15 minutes); ``memory_total_bytes`` and ``memory_available_bytes``; ``accelerators``: their models;
            ``joined_at``: since when it has been part of the job, Unix seconds by its own clock.
        """
        with self._lock:
            times, memory, cores = psutil.cpu_times(), psutil.virtual_memory(), os.cpu_count() or 1
            busy_s = sum(times[:7]) - times.idle - getattr(times, "iowait", 0.0)
            percent = self._share.look(time.monotonic(), busy_s)
            return {
                "cores": cores,
                "cpu_percent": None if percent is None else round(min(100.0, percent / cores), 1),
                "load": [round(value, 2) for value in os.getloadavg()],
                "memory_total_bytes": memory.total,
                "memory_available_bytes": memory.available,
                "accelerators": self._accelerators,
                "joined_at": self._joined_at,
            }


def accelerators(directory: Path = _NVIDIA) -> list[str]:
    """The models of this machine's accelerators, as far as they are known: those of NVIDIA."""
    found = []
    for path in sorted(directory.glob("*/information")):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        found.append(fields.get("Model", "unknown").strip())
    return found


def plausible(machine: Any) -> dict[str, Any]:
    """What another host says of itself, as :meth:`Machine.look` does.

    Raises:
        ValueError: it cannot be that.
    """
    try:
        percent = machine["cpu_percent"]
        load = [float(value) for value in machine["load"]]
        if len(load) != 3 or not all(map(math.isfinite, load)):
            raise ValueError("the load is three numbers")
        return {
            "cores": int(machine["cores"]),
            "cpu_percent": None if percent is None else float(percent),
            "load": load,
            "memory_total_bytes": int(machine["memory_total_bytes"]),
            "memory_available_bytes": int(machine["memory_available_bytes"]),
            "accelerators": [str(model) for model in machine["accelerators"]],
            "joined_at": float(machine["joined_at"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what it says of its machine cannot be read: {error!r}") from error
