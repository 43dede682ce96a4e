"""What the parts of an agent have in common: a network that carries messages, and a clock."""

from __future__ import annotations

import time
from typing import Any, Protocol

from chaos_mpi.agent.contacts import Contact


class Network(Protocol):
    """What carries the messages: :class:`chaos_mpi.agent.mesh.Mesh`."""

    def know(self, contact: Contact) -> None: ...

    def forget(self, member: str) -> None: ...

    def reconnect(self, member: str) -> None: ...

    def send(self, member: str, message: dict[str, Any]) -> bool: ...


def boot_clock_s() -> float:
    """A clock that goes on while the process is stopped or the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
