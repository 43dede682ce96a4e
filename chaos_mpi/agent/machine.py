"""What a machine has and does. Asks the kernel when it is asked, and never else."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

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
            ``joined_at``: since when it has been part of the job, Unix seconds by its own clock. What the kernel does
            not tell is None.
        """
        with self._lock:
            cores = os.cpu_count() or 1
            percent = _told(self._busy_percent)
            memory = _told(psutil.virtual_memory)
            load = _told(os.getloadavg)
            return {
                "cores": cores,
                "cpu_percent": None if percent is None else round(min(100.0, percent / cores), 1),
                "load": None if load is None else [round(value, 2) for value in load],
                "memory_total_bytes": None if memory is None else memory.total,
                "memory_available_bytes": None if memory is None else memory.available,
                "accelerators": self._accelerators,
                "joined_at": self._joined_at,
            }

    def _busy_percent(self) -> float | None:
        times = psutil.cpu_times()
        busy_s = sum(times[:7]) - times.idle - getattr(times, "iowait", 0.0)
        return self._share.look(time.monotonic(), busy_s)


def _told(ask: Callable[[], T]) -> T | None:
    """What the kernel says; None if it does not: in some containers /proc is not whole."""
    try:
        return ask()
    except (OSError, ValueError, RuntimeError, psutil.Error):
        return None


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
        load = machine["load"]
        if load is not None:
            load = [_number(value) for value in load]
            if len(load) != 3:
                raise ValueError("the load is three numbers")
        return {
            "cores": int(_number(machine["cores"])),
            "cpu_percent": _number_or_none(machine["cpu_percent"]),
            "load": load,
            "memory_total_bytes": _number_or_none(machine["memory_total_bytes"]),
            "memory_available_bytes": _number_or_none(machine["memory_available_bytes"]),
            "accelerators": [str(model) for model in machine["accelerators"]],
            "joined_at": _number(machine["joined_at"]),
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"what it says of its machine cannot be read: {error!r}") from error


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no number")
    return number


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)
