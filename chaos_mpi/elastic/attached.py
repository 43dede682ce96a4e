"""The samplers of a session: told of finished steps, and of every change of the view, even of earlier ones."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos_mpi.elastic.sampler import ElasticSampler


log = logging.getLogger("chaos_mpi.elastic")


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of the view.

    Attributes:
        reports: of each survivor, in rank order, those of its samplers.
        old, new: members before and after.
        attached: how many samplers this rank had at the time.
    """

    reports: list[list[dict[str, Any]]]
    old: tuple[str, ...]
    new: tuple[str, ...]
    attached: int

    def tell(self, index: int, sampler: ElasticSampler) -> None:
        reports = [of_member[index] for of_member in self.reports if index < len(of_member)]
        if reports:
            sampler.apply_change(reports, self.old, self.new)


class AttachedSamplers:
    """The samplers of one session, in the order in which every rank makes them."""

    def __init__(self) -> None:
        self._samplers: list[ElasticSampler] = []
        self._changes: list[_Change] = []
        self._has_warned = False

    def __len__(self) -> int:
        return len(self._samplers)

    def __iter__(self) -> Iterator[ElasticSampler]:
        return iter(self._samplers)

    def attach(self, sampler: ElasticSampler) -> None:
        """Add one. Other ranks may have had theirs for longer: changes that came in between are told now."""
        index = len(self._samplers)
        self._samplers.append(sampler)
        for change in self._changes:
            if index >= change.attached:
                change.tell(index, sampler)

    def warn_of_late_one(self, rank: int) -> None:
        """A sampler is made after the training state, so a rank that joins there does not have it. Said once."""
        level = logging.DEBUG if self._has_warned or rank != 0 else logging.WARNING
        self._has_warned = True
        log.log(
            level,
            "an ElasticSampler was made after the TrainingState: from now on no rank can join, because a newcomer has "
            "none when it gets the state. Make samplers once, before the state, give them to it (sampler=...), and go "
            "through the epochs with the same ones; each one that is made is kept until the end",
        )

    def commit(self) -> None:
        """A gradient step is finished: what was taken for it is trained on."""
        for sampler in self._samplers:
            sampler.commit()

    def at_round_start(self) -> bool:
        """Whether the loop has just got a new batch: a newcomer's loop, which begins with one, is where it is."""
        return any(sampler.has_untrained() for sampler in self._samplers)

    def reports(self) -> list[dict[str, Any]]:
        """Where each of them is."""
        return [sampler.report() for sampler in self._samplers]

    def view_changed(self, reports: list[list[dict[str, Any]]], old: tuple[str, ...], new: tuple[str, ...]) -> None:
        """Share the samples out anew."""
        change = _Change(reports, old, new, len(self._samplers))
        self._changes.append(change)
        for index, sampler in enumerate(self._samplers):
            change.tell(index, sampler)
