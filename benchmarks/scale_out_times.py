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

    What is usual is taken from the steps before the request. A pause counts as idle if it is longer than 99 % of the
    pauses before; so the noise of a busy machine does not add up over many steps.

    Args:
        steps: of the member, in order.
        requested: when the event was asked for.
        ready: when the newcomer was ready to take the state.
        ended: when the newcomer had made its first step.
    """
    pauses = [(after[0], after[0] - before[1]) for before, after in itertools.pairwise(steps)]
    usual = [length for until, length in pauses if until <= requested]
    long, middle = report.quantile(usual, 0.99), statistics.median(usual)
    idle = [length - middle for until, length in pauses if requested < until <= ended and length > long]
    usual_step = statistics.mean([end - begun for begun, end in steps if end <= requested])
    slowed = [end - begun - usual_step for begun, end in steps if begun >= ready and end <= ended]
    made = sum(1 for begun, end in steps if begun > requested and end <= ended)
    return Cost(sum(idle), max(0.0, sum(slowed)), made)


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
