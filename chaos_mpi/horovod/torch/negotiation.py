"""Which of the calls that are pending at the ranks can be made now, when the ranks are in different ones.

Horovod's calls are matched by name, so ranks may make them in different orders, and a rank that has joined makes none
at all. As long as all ranks come to the same call, nothing of this is needed; when they do not, they tell each other
what is pending, and all decide alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

#: The name of :func:`chaos_mpi.horovod.torch.join`.
JOIN = "join"
#: That of a rank that communicates no more.
SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class Asked:
    """One pending call.

    Attributes:
        name: what it is matched by.
        call: with all that has to be the same at every rank.
        zeros: what a rank that has joined needs to know to take part with zeros; None where that is not possible.
    """

    name: str
    call: str
    zeros: Mapping[str, Any] | None = None

    def to_json(self) -> list[Any]:
        """As JSON values."""
        return [self.name, self.call, self.zeros]


@dataclass(frozen=True, slots=True)
class Row:
    """What one rank says.

    Attributes:
        pending: its calls, in the order in which they were made.
        blocked: whether the rank's script waits for one of them, so that no other one can come.
        tired: whether it has waited for too long.
    """

    pending: tuple[Asked, ...]
    blocked: bool = False
    tired: bool = False

    def to_json(self) -> list[Any]:
        """As JSON values."""
        return [[asked.to_json() for asked in self.pending], self.blocked, self.tired]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        pending, blocked, tired = fields
        return cls(tuple(Asked(*asked) for asked in pending), blocked, tired)


@dataclass(frozen=True, slots=True)
class Action:
    """What all ranks do next.

    Attributes:
        name: of the call.
        refusal: why it cannot be made; empty if it is made.
        zeros: see :class:`Asked`.
    """

    name: str
    refusal: str = ""
    zeros: Mapping[str, Any] | None = None


def decide(rows: Sequence[Row]) -> list[Action]:
    """What to do with what is pending, in this order; nothing if it is too early to tell.

    Args:
        rows: of each rank, in rank order.
    """
    tables = [{asked.name: asked for asked in row.pending} for row in rows]
    names = list(dict.fromkeys(asked.name for row in rows for asked in row.pending))
    joined = {rank for rank, table in enumerate(tables) if JOIN in table}
    actions = []
    for name in names:
        having = {rank: table[name] for rank, table in enumerate(tables) if name in table}
        lacking = set(range(len(rows))) - set(having)
        if name != JOIN and lacking <= joined:
            actions.append(_made(name, having, lacking))
    if len(joined) == len(rows):
        actions.append(Action(JOIN))  # after all that was pending before
    if not actions and names and (all(row.blocked for row in rows) or any(row.tired for row in rows)):
        actions = [Action(name, _never(tables, any(row.tired for row in rows))) for name in names]
    return actions


def remaining(rows: Sequence[Row], actions: Sequence[Action]) -> bool:
    """Whether something stays pending at a rank when the actions are done."""
    done = {action.name for action in actions}
    return any(asked.name not in done for row in rows for asked in row.pending)


def _made(name: str, having: Mapping[int, Asked], lacking: set[int]) -> Action:
    first = next(iter(having.values()))
    if any(asked.call != first.call for asked in having.values()):
        return Action(name, f"ranks call it differently: {_told({r: a.call for r, a in having.items()})}")
    if lacking and first.zeros is None:
        ranks = ", ".join(map(str, sorted(lacking)))
        return Action(name, f"rank {ranks} has joined, and a rank that has joined cannot take part in: {first.call}")
    return Action(name, zeros=first.zeros)


def _never(tables: Sequence[Mapping[str, Asked]], tired: bool) -> str:
    pending = {
        rank: ", ".join(asked.call for asked in table.values()) or "nothing" for rank, table in enumerate(tables)
    }
    why = "not all ranks made the calls in time" if tired else "the ranks wait for different calls, each for ever"
    ended = ", ".join(str(rank) for rank, table in enumerate(tables) if any(a.call == SHUTDOWN for a in table.values()))
    advice = (
        f". The script of rank {ended} is at its end, or has called hvd.shutdown(), and those of others are not; with "
        "less data than others have, it would have to call hvd.join() first"
    )
    return f"{why} (pending at rank: calls): {_told(pending)}{advice if ended else ''}"


def _told(of_ranks: Mapping[int, str]) -> str:
    """The same text only once, with the ranks that it holds for."""
    texts: dict[str, list[str]] = {}
    for rank, text in of_ranks.items():
        texts.setdefault(text, []).append(str(rank))
    return "; ".join(f"{', '.join(ranks)}: {text}" for text, ranks in texts.items())
