"""How often the view of a job has changed, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes of the view since the job was started. All members count alike, and newcomers are told the count.

    Attributes:
        recoveries: views that were committed because of a failure.
        deaths: members that died.
        joins: members that joined.
        leaves: members that left by agreement.
    """

    recoveries: int = 0
    deaths: int = 0
    joins: int = 0
    leaves: int = 0

    def after(self, cause: str, old: Collection[str], new: Collection[str]) -> Self:
        """The count after one more change.

        Args:
            cause: ``failure``, ``join``, ``leave`` or ``order``.
            old, new: members before and after.
        """
        failure = cause == "failure"
        gone = len(set(old) - set(new))
        return type(self)(
            recoveries=self.recoveries + failure,
            deaths=self.deaths + (gone if failure else 0),
            joins=self.joins + len(set(new) - set(old)),
            leaves=self.leaves + (0 if failure else gone),
        )

    def to_json(self) -> dict[str, int]:
        """As a JSON-able dict, from which ``Changes(**...)`` makes an equal one."""
        return asdict(self)
