"""Members that are threads of one process, and give each other something."""

from __future__ import annotations

import threading
from typing import Any


class Meeting:
    """Where they meet.

    Args:
        size: how many they are.
    """

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30.0)
        self._given: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What all have given, in rank order."""
        self._given[rank] = value
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given
