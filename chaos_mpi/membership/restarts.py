"""Whether a rank that crashed is started again: a few times an hour on each host, and no more. Pure.

What was started is part of what all members have agreed on, so that all come to the same, and newcomers know it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: The time in which restarts are counted, seconds.
PERIOD_S = 3600.0


@dataclass(frozen=True, slots=True)
class Restart:
    """A rank that was started in the place of one that crashed.

    Attributes:
        host: where.
        at_s: when that was agreed on, Unix seconds, by the clock of a member.
    """

    host: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Crash:
    """What all members have agreed on after a crash; as text a line for people.

    Attributes:
        host: where.
        how: the rank ended, such as ``SIGSEGV``.
        number: how many restarts there were on that host within the hour, with this one if there is one.
        limit: how many there may be.
        obstacle: why it is not started again; empty if it is.
    """

    host: str
    how: str
    number: int
    limit: int
    obstacle: str = ""

    def __str__(self) -> str:
        what = f"{self.host}: its rank crashed ({self.how})"
        if self.obstacle:
            return f"{what} and is not started again: {self.obstacle}"
        return f"{what} and is started again ({self.number} of {self.limit} this hour)"


def judge(
    history: Iterable[Restart], host: str, how: str, at_s: float, limit: int, obstacle: str = ""
) -> tuple[Crash, tuple[Restart, ...]]:
    """Whether a rank is started again, and the restarts that count from here on.

    Args:
        history: restarts so far.
        host: where the rank crashed.
        how: it ended.
        at_s: the time. It may be of another member's clock than the last one; one that is behind forgets nothing.
        limit: restarts on a host within an hour; 0 for none.
        obstacle: why it cannot be; empty if it can.
    """
    recent = tuple(restart for restart in history if at_s - restart.at_s < PERIOD_S)
    before = number_on(recent, host)
    if not obstacle and before >= limit:
        obstacle = f"that was done {before} times within the hour, and --restarts is {limit}"
    if obstacle:
        return Crash(host, how, before, limit, obstacle), recent
    return Crash(host, how, before + 1, limit), (*recent, Restart(host, at_s))


def number_on(restarts: Sequence[Restart], host: str) -> int:
    """How many of these were on a host."""
    return sum(restart.host == host for restart in restarts)
