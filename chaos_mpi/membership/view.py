"""The agreed membership."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """The members that take part, in rank order, numbered by ``epoch``. Every member holds the same view.

    Attributes:
        epoch: 0 for the view a job starts with, one more for each committed change.
        members: member ids (``host:pid``); the index is the rank.
    """

    epoch: int
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a view needs at least one member")
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"a member appears twice in {self.members}")

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)

    def rank_of(self, member: str) -> int:
        """The rank of ``member``; ValueError when it takes no part."""
        return self.members.index(member)

    def gone(self, members: Iterable[str]) -> tuple[str, ...]:
        """Those of this view that are not among ``members``, in rank order."""
        kept = set(members)
        return tuple(m for m in self.members if m not in kept)

    def next(self, members: Iterable[str]) -> View:
        """The view that follows this one, with these members in rank order."""
        return View(self.epoch + 1, tuple(members))
