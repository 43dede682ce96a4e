"""What a scale-out cost, from the journals of the ranks. Pure functions; all times in seconds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import report

#: Parts of the scale-out delay, in order.
PARTS = ("launch_s", "wait_s", "transfer_s", "rest_s")

#: When a step of a member began (its batch was there) and when it was over (the optimizer had stepped).
Step = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one member lost.

    Attributes:
        idle_s: time between steps beyond what is usual there: neither computing nor in a regular allreduce.
        slowed_s: how much longer the steps took than usual while the newcomer took the state, because its
            traffic and theirs share links and processors.
        steps: how many steps it made between the request and the newcomer's first step.
    """

    idle_s: float
    slowed_s: float
    steps: int


def cost(steps: Sequence[Step], requested: float, ready: float, ended: float) -> Cost:
    """What an event cost one member.

    While the newcomer's process starts, on the same processors, some pauses between steps are a little longer. That is
    the machine's doing: until the newcomer is ready, only the longest 1 % of the pauses count, as the one for agreeing
    on the event does; from then on all do, less what is usual until then.

    Args:
        steps: of the member, in order.
        requested: when the event was asked for.
        ready: when the newcomer was ready to take the state.
        ended: when the newcomer had made its first step.
    """
    pauses = [(after[0], after[0] - before[1]) for before, after in itertools.pairwise(steps)]
    early = [length for until, length in pauses if until <= ready]
    usual, longest = statistics.mean(early), report.quantile(early, 0.99)
    agreeing = [length - usual for until, length in pauses if requested < until <= ready and length > longest]
    stopped = [length - usual for until, length in pauses if ready < until <= ended]
    usual_step = statistics.mean([end - begun for begun, end in steps if end <= ready])
    slowed = [end - begun - usual_step for begun, end in steps if begun >= ready and end <= ended]
    made = sum(1 for begun, end in steps if begun > requested and end <= ended)
    return Cost(sum(agreeing) + max(0.0, sum(stopped)), max(0.0, sum(slowed)), made)


def steps_of(journal: Sequence[Mapping[str, Any]]) -> list[Step]:
    """The steps in a journal."""
    return [(e["begun"], e["at"]) for e in journal if e["event"] == "step"]


def noted(journal: Sequence[Mapping[str, Any]], event: str) -> Mapping[str, Any]:
    """The first line of that event.

    Raises:
        LookupError: there is none.
    """
    for line in journal:
        if line["event"] == event:
            return line
    raise LookupError(f"no '{event}' in the journal")


def joined_parts(total_s: float, parts: Mapping[str, float]) -> dict[str, float]:
    """The split of a delay in which the newcomer was started while the others trained on.

    Args:
        total_s: the delay.
        parts: what was measured: ``launch_s`` (from the request until the newcomer could take the state),
            ``waited_s`` (until the members stopped for it), ``transfer_s``.
    """
    known = {"launch_s": parts["launch_s"], "wait_s": parts["waited_s"], "transfer_s": parts["transfer_s"]}
    return {**known, "rest_s": max(0.0, total_s - sum(known.values()))}


def restarted_parts(
    requested: float, first: Sequence[Mapping[str, Any]], second: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, float]:
    """The split of a delay in which all were stopped, and started again from a checkpoint.

    Args:
        requested: when.
        first: journal of rank 0 before.
        second: journals of all ranks after, by name.
    """
    stopped, saved = noted(first, "stopped")["at"], noted(first, "saved")["at"]
    reading = max(noted(journal, "reading")["at"] for journal in second.values())
    read = max(noted(journal, "read")["at"] for journal in second.values())
    contributed = noted(second["newcomer"], "contributed")["at"]
    known = {"wait_s": stopped - requested, "launch_s": reading - saved, "transfer_s": saved - stopped + read - reading}
    return {**known, "rest_s": max(0.0, contributed - requested - sum(known.values()))}
