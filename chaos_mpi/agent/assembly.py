"""How the agents of the first view begin to watch each other at about the same time. Pure.

They learn of each other at different times, and who begins early would take the late for dead. So each tells the others
whether it has heard all of them, and begins when all have said that they have: then every connection works, both ways.
And it says so only once its rank is up: ranks that load their libraries take every core that there is, and agents that
got none would be taken for dead as well.

The witness is not waited for beyond that: it may not be reachable, and its voice is of use, but not needed.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Who has not been heard by then at the beginning is taken for dead.
ASSEMBLY_LIMIT_S = 15.0
#: How long ranks may take to load their libraries; the watch begins then, whether they have or not.
UP_LIMIT_S = 120.0
#: How long a witness is waited for when all others are there. It may be where they cannot reach it.
WITNESS_LIMIT_S = 2.0


class Assembly:
    """What one agent knows of the beginning.

    Args:
        me: its name.
        members: of the first view, this one too.
        up: see below.
        witness: which of the members has no rank; None: all have.
        now_s: the time, monotonic.

    Attributes:
        others: all but this one.
        up: whether the rank of this agent is up.
    """

    def __init__(
        self, me: str, members: Iterable[str], *, up: bool = True, witness: str | None = None, now_s: float = 0.0
    ) -> None:
        self.others = frozenset(members) - {me}
        self._needed = self.others - {witness}
        self.up = up
        self._heard: set[str] = set()
        self._complete: set[str] = set()
        self._begun = False
        self._since_s = now_s
        self._lacking_s: float | None = None

    @property
    def complete(self) -> bool:
        """Whether the rank is up and all others were heard; to be told to them, again and again."""
        return self.up and self._heard >= self._needed

    @property
    def is_over(self) -> bool:
        """Whether to begin."""
        return self._begun or (self.up and self._complete >= self.others)

    @property
    def lacks_witness(self) -> bool:
        """Whether nothing but the witness is waited for."""
        return not self.is_over and self.up and self._complete >= self._needed

    def is_due(self, now_s: float) -> bool:
        """Whether to begin, because the beginning is over or has taken too long."""
        late = now_s - self._since_s > (ASSEMBLY_LIMIT_S if self.missing else UP_LIMIT_S)
        if self.lacks_witness:
            self._lacking_s = self._lacking_s or now_s
            late |= now_s - self._lacking_s > WITNESS_LIMIT_S
        return self.is_over or late

    @property
    def missing(self) -> list[str]:
        """Those that were not heard, and have to be."""
        return sorted(self._needed - self._heard)

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
