"""How an agent tells a crash of its rank from an end in good order. Pure."""

from __future__ import annotations

import signal
from typing import Any, NamedTuple


class Crash(NamedTuple):
    """A rank that crashed, as agents tell each other and their ranks of it.

    Attributes:
        member: its name.
        host: where it ran, as ssh knows it; empty for the launch host.
        how: it ended, for people.
    """

    member: str
    host: str
    how: str


def how_it_crashed(status: int, was_member: bool, outcome: str | None) -> str:
    """How a rank crashed that was not told to end; empty if it did not crash.

    Who takes part in the training no more has written down why. A newcomer that ends before it took part is dealt with
    by the member that had it started.

    Args:
        status: of the process, as :mod:`subprocess` gives it: the number of a signal is negated.
        was_member: whether it took part in the training.
        outcome: of its session, if it has written one down.
    """
    if status == 0 or not was_member or outcome not in (None, "crashed"):
        return ""
    if outcome == "crashed":
        return "by an error in the script"
    return how_ended(status)


def how_ended(status: int) -> str:
    """How a process ended, for people.

    Args:
        status: as :mod:`subprocess` gives it.
    """
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def crash_of(member: str, fields: dict[str, Any]) -> Crash | None:
    """What a message says of the crash of a member; None if it did not crash.

    Raises:
        ValueError: it cannot be understood.
    """
    how, host = fields.get("crashed", ""), fields.get("host", "")
    if not isinstance(how, str) or not isinstance(host, str):
        raise ValueError(f"{member} says of its end: {how!r}, on {host!r}")
    return Crash(member, host, how) if how else None
