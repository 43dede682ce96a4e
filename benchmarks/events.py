"""Time in which a job handles the leave of a rank, at 2 to 8 ranks, and where it goes.

A job of 8 ranks trains for real, with a wait in each step as for an accelerator that computes: if eight ranks computed
on two cores, the time until the last one gets a core again would be all that is seen (``--device-ms 0`` shows it). A
random member is asked, at a random moment, to let a random member leave; then the
next, until one is left. In between, in shuffled order, the same is done to the floor: a bare mpi4py loop in which all
ranks, once they know who goes, create the smaller communicator and agree that all have it.

All times are from the last rank that has come to a point to the last rank that has come to the next:

    wait       from the request until all are at the boundary: the end of the step under way, and what is left of it
    negotiate  until all know what all want (the floor: until all know who goes, by one reduction)
    decide     until each has worked out what follows
    create     until all have the new communicator
    commit     until all know that all have it: from here on the new view counts, and each trains on
    adopt      until a member that stays has shared the samples out anew (the slowest of them); the old communicator is
               freed when the job ends

*Handled* is decide, create and commit: from "known at all members" to "committed at all members". *Sealed* ends when
the first member knows that all have agreed: nothing can undo the change any more. What lies between the two is the wait
for a core, where several ranks share one, as whoever is first computes its next step at once.

    python benchmarks/events.py            # about ten minutes on two cores
    python benchmarks/events.py --quick    # a look, not a result
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs
import psutil
import report
from jobs import Job, JobError
from models import WORKLOADS
from recovery import EventLogs

_SCRIPT = Path(__file__).resolve().with_name("events_rank.py")
_JOB_LIMIT_S = 300
#: Longest wait for all members of one leave.
_LEAVE_LIMIT_S = 30.0
#: Training between two leaves, at least; a random part of as much again is added.
_BETWEEN_S = 0.4
#: The points that every rank passes, and the parts between them.
POINTS = ("arrived", "known", "decided", "changed", "committed", "adopted")
PARTS = ("wait", "negotiate", "decide", "create", "commit", "adopt")
SYSTEMS = {"chaos": "chaos_mpi", "floor": "floor (bare ULFM)"}
TARGET_MS = 1.0

#: When one rank passed the points, seconds of the monotonic clock. One that goes does not adopt.
Passage = dict[str, float]


class Shrinking:
    """A job whose ranks leave one by one.

    Args:
        system: ``chaos`` or ``floor``.
        model: what it trains.
        ranks: how many it starts with.
        device_ms: wait in each step.
    """

    def __init__(self, system: str, model: str, ranks: int, device_ms: float, rng: random.Random) -> None:
        self._system, self._rng = system, rng

        def commands(directory: Path) -> list[tuple[list[str], dict[str, str]]]:
            command, environ = jobs.mpirun(_SCRIPT, ranks, fault_tolerant=True)
            return [(command, {**environ, "CHAOS_EVENT_LOG": str(directory / "%m.jsonl")})]

        spec = {"system": system, "model": model, "device_s": device_ms / 1e3, "limit_s": _JOB_LIMIT_S}
        self._job = Job(f"{SYSTEMS[system]}, {ranks} ranks", commands, ranks, spec)
        self._logs = EventLogs(self._job.directory)
        self._members: list[int] = []  # by their ranks at the start

    def __enter__(self) -> Shrinking:
        self._job.__enter__()
        self._members = sorted(self._job.links)
        for link in self._job.links.values():
            link.send({"go": True})
        time.sleep(1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._job.end()

    def one_leaves(self) -> dict[str, float]:
        """Let a random member leave and return what it cost.

        Raises:
            JobError: not all members came to know of it in time.
        """
        members = list(self._members)
        time.sleep(_BETWEEN_S * (1 + self._rng.random()))
        asked, goes = self._rng.choice(members), self._rng.choice(members)
        self._members.remove(goes)
        try:
            self._job.links[asked].send({"leave": self._job.hellos[goes]["member"]})
            passages = self._passages(members, asked)
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise JobError(f"a leave at {len(members)} ranks was not handled in time; {self._job.output()}") from error
        self._await_end(self._job.hellos[goes]["pid"])
        requested = passages.pop(-1)["requested"]
        return {"size": len(members), **split(requested, list(passages.values()))}

    def _passages(self, members: Sequence[int], asked: int) -> dict[int, Passage]:
        """Those of the members, and at -1 when the request was made."""
        limit = time.monotonic() + _LEAVE_LIMIT_S
        told = members if self._system == "floor" else ()
        found: dict[int, Passage] = {}
        for rank in (asked, *told):
            message = self._heard(rank, limit)
            found[-1 if "requested" in message else rank] = message
        while len(found) < 1 + len(members):
            if time.monotonic() > limit:
                raise TimeoutError
            time.sleep(0.1)  # seldom, because the cores are the members'
            events = self._logs.events()
            for rank in members:
                own = [e for e in events.get(self._job.hellos[rank]["pid"], []) if e["event"] == "leave_committed"]
                # A member that stays has logged one for each that has left so far.
                if len(own) == self._job.ranks - len(members) + 1:
                    found[rank] = passage(own[-1])
        return found

    def _await_end(self, pid: int) -> None:
        """Until the one that left has ended: the next leave shall not share the cores with it."""
        limit = time.monotonic() + _LEAVE_LIMIT_S
        while psutil.pid_exists(pid) and time.monotonic() < limit:
            time.sleep(0.05)

    def _heard(self, rank: int, limit: float) -> dict[str, Any]:
        return self._job.links[rank].receive(limit - time.monotonic())


def passage(event: dict[str, Any]) -> Passage:
    """When a member passed the points, from its ``leave_committed``."""
    names = ("adopt", "commit", "communicator", "negotiate", "gather")
    at, times = event["mono"], {}
    for point, name in zip(reversed(POINTS), names, strict=False):
        if f"{name}_ms" in event:
            times[point] = at
            at -= event[f"{name}_ms"] / 1e3
    return {**times, "arrived": at}


def split(requested: float, passages: Sequence[Passage]) -> dict[str, float]:
    """The cost of one leave in ms, from when each member passed the points.

    ``handled`` is from known at all to committed at all, ``sealed`` to committed at the first, and ``boundary`` from
    at the boundary to committed at all.
    """
    last = [requested, *(max(p[point] for p in passages) for point in POINTS[:-1])]
    parts = {part: 1e3 * (b - a) for part, (a, b) in zip(PARTS, itertools.pairwise(last), strict=False)}
    parts["adopt"] = 1e3 * max(p["adopted"] - p["committed"] for p in passages if "adopted" in p)
    handled = parts["decide"] + parts["create"] + parts["commit"]
    sealed = handled - 1e3 * (last[-1] - min(p["committed"] for p in passages))
    total = 1e3 * (last[-1] - requested)
    return {**parts, "handled": handled, "sealed": sealed, "boundary": parts["negotiate"] + handled, "total": total}


def measure(model: str, most: int, device_ms: float, repeats: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every leave as one record; a job that fails is one too, with ``error``."""
    for repeat in range(repeats):
        for system in rng.sample(sorted(SYSTEMS), len(SYSTEMS)):
            print(f"{SYSTEMS[system]}: {most} ranks, round {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
            record: dict[str, Any] = {"system": system, "repeat": repeat}
            try:
                with Shrinking(system, model, most, device_ms, rng) as job:
                    for _ in range(most - 1):
                        yield {**record, **job.one_leaves()}
            except jobs.FAILURES as error:
                yield {**record, "size": most, **jobs.failed(error)}


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median, p90 and so on of every part, for each system and size."""
    rows = []
    for system in SYSTEMS:
        for size in sorted({r["size"] for r in records}):
            leaves = [r for r in records if (r["system"], r["size"]) == (system, size) and "total" in r]
            if leaves:
                names = (*PARTS, "handled", "sealed", "boundary", "total")
                rows.append(
                    {"system": system, "size": size, **{n: report.summary([k[n] for k in leaves]) for n in names}}
                )
    return rows


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for system, title in SYSTEMS.items():
        shown = Table(title=f"{title}: the leave of a rank, ms; parts are medians", padding=0)
        for name in ("ranks", "n", *PARTS, "sealed", "handled", "p90"):
            shown.add_column(name, justify="right")
        for row in result["rows"]:
            if row["system"] == system:
                shown.add_row(
                    str(row["size"]), str(row["handled"]["n"]),
                    *[f"{row[part]['median']:.2f}" for part in (*PARTS, "sealed", "handled")],
                    f"{row['handled']['p90']:.2f}",
                )  # fmt: skip
        console.print(shown)
    console.print("handled: decide, create and commit, known at all members to committed at all; sealed: at the first")
    for row in result["target"]:
        words = []
        for name in ("handled", "sealed"):
            word = "met" if row[name] < TARGET_MS else "MISSED"
            words.append(f"{name} {row[name]:.2f} ms, {word} (floor {row['floor'][name]:.2f})")
        console.print(f"target: below {TARGET_MS:.0f} ms (median) at {row['size']} ranks: {'; '.join(words)}")
    if result["failures"]:
        console.print(f"jobs that failed: {json.dumps(result['failures'])}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: handling of every leave. Right: median parts, ours beside the floor."""
    import matplotlib.pyplot as plt

    figure, (points, bars) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes = sorted({row["size"] for row in result["rows"]})
    colours = {"chaos": "C0", "floor": "C7"}
    for shift, system in zip((-0.15, 0.15), SYSTEMS, strict=True):
        rows = [r for r in result["rows"] if r["system"] == system]
        leaves = [r for r in result["leaves"] if r["system"] == system]
        points.plot(
            [r["size"] + shift for r in leaves], [r["handled"] for r in leaves], ".",
            color=colours[system], alpha=0.4,
        )  # fmt: skip
        points.plot(
            [r["size"] + shift for r in rows], [r["handled"]["median"] for r in rows], "_-",
            color=colours[system], label=f"{SYSTEMS[system]}, median",
        )  # fmt: skip
    points.axhline(TARGET_MS, color="C3", linestyle="--", label="target")
    points.set(xlabel="ranks before the leave", ylabel="ms", xticks=sizes, yscale="log", title="known to committed")
    for shift, system in zip((-0.2, 0.2), SYSTEMS, strict=True):
        rows = [r for r in result["rows"] if r["system"] == system]
        base = [0.0] * len(rows)
        for colour, part in enumerate(PARTS[1:]):
            heights = [r[part]["median"] for r in rows]
            bars.bar([r["size"] + shift for r in rows], heights, 0.36, bottom=base, color=f"C{colour}",
                     alpha=1.0 if system == "chaos" else 0.45, label=part if system == "chaos" else None)  # fmt: skip
            base = [b + h for b, h in zip(base, heights, strict=True)]
    bars.set(xlabel="ranks before the leave", ylabel="ms", xticks=sizes, title="median of each part (pale: the floor)")
    for axis in (points, bars):
        axis.legend(fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _target(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians in ms at each size, ours and the floor's."""
    medians = {(r["system"], r["size"]): {n: r[n]["median"] for n in ("handled", "sealed")} for r in rows}
    unknown = {"handled": float("nan"), "sealed": float("nan")}
    return [
        {"size": size, **ours, "floor": medians.get(("floor", size), unknown)}
        for (system, size), ours in medians.items()
        if system == "chaos"
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="size that a job starts with")
    parser.add_argument("--repeats", type=int, default=15, help="leaves of each system at each size")
    parser.add_argument("--model", choices=list(WORKLOADS), default="linear")
    parser.add_argument("--device-ms", type=float, default=5.0, help="wait in each step, as for an accelerator")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--seed", type=int, default=0, help="of members, moments and order")
    parser.add_argument("--quick", action="store_true", help="two leaves at each size")
    given = parser.parse_args()
    report.refuse_unusable(given.out)
    jobs.prepare_driver()
    head = {"benchmark": "events", **report.started(), "model": WORKLOADS[given.model].title}
    head["device_ms"] = given.device_ms
    repeats = 2 if given.quick else given.repeats
    leaves = measure(given.model, given.ranks, given.device_ms, repeats, random.Random(given.seed))
    records = report.collected(leaves)
    rows = summarise(records)
    result = {
        **head,
        "target": _target(rows),
        "rows": rows,
        "failures": [r for r in records if "error" in r],
        "leaves": [r for r in records if "total" in r],
    }
    report.publish(given.out, result, table, plot, records)


if __name__ == "__main__":
    main()
