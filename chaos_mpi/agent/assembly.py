"""How the agents of the first view begin to watch each other at about the same time. Pure.

They learn of each other at different times, and who begins early would take the late for dead. So each tells the others
whether it has heard all of them, and begins when all have said that they have: then every connection works, both ways.
And it says so only once its rank is up: ranks that load their libraries take every core that there is, and agents that
got none would be taken for dead as well.
"""

from __future__ import annotations

from collections.abc import Iterable


class Assembly:
    """What one agent knows of the beginning.

    Args:
        me: its name.
        members: of the first view, this one too.
        up: see below.

    Attributes:
        others: all but this one.
        up: whether the rank of this agent is up.
    """

    def __init__(self, me: str, members: Iterable[str], *, up: bool = True) -> None:
        self.others = frozenset(members) - {me}
        self.up = up
        self._heard: set[str] = set()
        self._complete: set[str] = set()
        self._begun = False

    @property
    def complete(self) -> bool:
        """Whether the rank is up and all others were heard; to be told to them, again and again."""
        return self.up and self._heard >= self.others

    @property
    def is_over(self) -> bool:
        """Whether to begin."""
        return self._begun or (self.up and self._complete >= self.others)

    @property
    def missing(self) -> list[str]:
        """Those that were not heard."""
        return sorted(self.others - self._heard)

    def heard(self, member: str, complete: bool) -> None:
        """Another one is there, and has or has not heard all."""
        self._heard.add(member)
        if complete:
            self._complete.add(member)

    def begun(self, member: str) -> None:
        """Another one has begun, so all had heard all."""
        if member in self.others:
            self._begun = True

    def ended(self, member: str) -> None:
        """Another one will not come."""
        self.heard(member, complete=True)
