"""Where everybody is after a failure, and how the survivors meet again.

Every member executes the same sequence of collective operations (gradient steps, metric sums, ...). Each of
them needs a contribution from every member, so one that has *finished* operation ``k`` proves that all had
*entered* it. Two survivors therefore never differ by more than one operation:

- somebody finished ``k``: those who did not have entered it, and adopt the finished result, bit for bit;
- nobody did: all who entered it do it again among the survivors, from the inputs they kept.

Either way no finished work is lost and nothing is applied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from chaos_mpi.errors import MismatchError, RecoveryError


@dataclass(frozen=True, slots=True)
class Report:
    """What one survivor tells the others about its place in the sequence of operations.

    Attributes:
        member: who reports.
        finished: number of operations finished.
        entered: number of operations entered: ``finished`` or one more.
        label: what the operation in flight is (empty when none is); the same at every member.
        finished_label: what the last finished operation was.
        call, finished_call: these in words that say more; empty where there are none.
    """

    member: str
    finished: int
    entered: int
    label: str
    finished_label: str
    call: str = ""
    finished_call: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Decision:
    """How the survivors go on.

    Attributes:
        finished: the number of operations that counts as finished from here on.
        source: rank (in the order of the reports) whose result is adopted, or None when nobody is behind.
        behind: ranks that adopt it.
        furthest: the rank whose training state is the most advanced, for an emergency save.
    """

    finished: int
    source: int | None
    behind: tuple[int, ...]
    furthest: int


def decide(reports: Sequence[Report]) -> Decision:
    """Where the survivors, reporting in rank order, go on.

    Raises:
        MismatchError: members are in different operations at the same place in the sequence (a collective call
            that depends on the rank); the message names two of them.
        RecoveryError: the reports contradict what every run guarantees (a bug of this package).
    """
    if not reports:
        raise RecoveryError("a decision needs at least one report")
    finished = max(r.finished for r in reports)
    behind = tuple(i for i, r in enumerate(reports) if r.finished < finished)
    _check_labels(reports)
    for i in behind:
        report = reports[i]
        if report.finished != finished - 1 or report.entered != finished:
            raise RecoveryError(
                f"{report.member} finished {report.finished} operations and entered {report.entered}, "
                f"while another member finished {finished}"
            )
    source = next(i for i, r in enumerate(reports) if r.finished == finished) if behind else None
    furthest = max(range(len(reports)), key=lambda i: (reports[i].entered, -i))
    return Decision(finished, source, behind, furthest)


def _check_labels(reports: Sequence[Report]) -> None:
    seen: dict[int, tuple[str, str, str]] = {}
    for report in reports:
        places = [(report.finished, report.finished_label, report.finished_call or report.finished_label)]
        if report.entered > report.finished:
            places.append((report.entered, report.label, report.call or report.label))
        for place, label, call in places:
            member, other, other_call = seen.setdefault(place, (report.member, label, call))
            if other != label:
                raise MismatchError(
                    f"collective call number {place} is '{other_call}' on {member} but '{call}' on {report.member}: "
                    "every rank must make the same calls in the same order (look for a call under 'if rank == ...')."
                )
