"""How the agents of the first view begin to watch each other at about the same time. Pure.

They learn of each other at different times, and who begins early would take the late for dead. So each tells the others
whether it has heard all of them, and begins when all have said that they have: then every connection works, both ways.
"""

from __future__ import annotations

from collections.abc import Iterable


class Assembly:
    """What one agent knows of the beginning.

    Args:
        me: its name.
        members: of the first view, this one too.

    Attributes:
        others: all but this one.
    """

    def __init__(self, me: str, members: Iterable[str]) -> None:
        self.others = frozenset(members) - {me}
        self._heard: set[str] = set()
        self._complete: set[str] = set()
        self._begun = False

    @property
    def complete(self) -> bool:
        """Whether all others were heard; to be told to them, again and again."""
        return self._heard >= self.others

    @property
    def is_over(self) -> bool:
        """Whether to begin."""
        return self._begun or self._complete >= self.others

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
