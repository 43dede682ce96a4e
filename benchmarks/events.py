"""How long it takes to let a rank go, at 2 to 8 ranks: from the request to the smaller job.

A job of 8 ranks trains the digits net through the whole elastic loop. A random rank is asked to leave, then another,
until one is left. In between, in shuffled order, the same is done to the floor: a bare MPI loop in which a leave is a
flag in the sum of a step, a split of the communicator, and one agreement.

    wait      from the request until all members know of it: the rest of the step, and the negotiation after it
    handling  from there until the new view is committed at all of them

    python benchmarks/events.py            # about five minutes on two cores
    python benchmarks/events.py --quick    # a look, not a result
"""

from __future__ import annotations

import argparse
import random
import selectors
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs
import report
from jobs import Job, JobError
from recovery import EventLogs

_SCRIPT = Path(__file__).resolve().with_name("events_rank.py")
_JOB_LIMIT_S = 300
_LEAVE_LIMIT_S = 30.0
#: Training between two leaves, at least; a random part of as much again is added.
_BETWEEN_S = 0.3
SYSTEMS = {"chaos": "chaos_mpi", "floor": "floor (split, agree)"}
TARGET_MS = 1.0


class Shrinking:
    """A job whose ranks leave one by one.

    Args:
        system: ``chaos`` or ``floor``.
        ranks: how many it starts with.
    """

    def __init__(self, system: str, ranks: int, rng: random.Random) -> None:
        self._system, self._rng = system, rng

        def commands(directory: Path) -> list[tuple[list[str], dict[str, str]]]:
            command, environ = jobs.mpirun(_SCRIPT, ranks, fault_tolerant=True)
            return [(command, {**environ, "CHAOS_EVENT_LOG": str(directory / "%m.jsonl")})]

        spec = {"system": system, "model": "digits", "limit_s": _JOB_LIMIT_S}
        self._job = Job(f"{SYSTEMS[system]}, {ranks} ranks", commands, ranks, spec)
        self._logs = EventLogs(self._job.directory)
        self._ranks: list[int] = []

    def __enter__(self) -> Shrinking:
        self._job.__enter__()
        self._ranks = sorted(self._job.links)
        time.sleep(1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._job.end()

    def let_one_go(self) -> dict[str, Any]:
        """A random rank leaves at a random moment; how long it took.

        Raises:
            JobError: the leave was not committed everywhere in time.
        """
        size = len(self._ranks)
        time.sleep(_BETWEEN_S * (1 + self._rng.random()))
        rank = self._rng.choice(self._ranks)
        pids = [self._job.hellos[r]["pid"] for r in self._ranks]
        before = {pid: len(self._logs.events().get(pid, [])) for pid in pids}
        asked = time.monotonic()
        self._job.links[rank].send({"do": "leave"})
        sights = self._from_logs(before) if self._system == "chaos" else self._from_links()
        self._ranks.remove(rank)
        known, committed = max(s[0] for s in sights), max(s[1] for s in sights)
        return {"size": size, "wait": 1e3 * (known - asked), "handling": 1e3 * (committed - known)}

    def _from_logs(self, before: dict[int, int]) -> list[tuple[float, float]]:
        limit = time.monotonic() + _LEAVE_LIMIT_S
        while time.monotonic() < limit:
            time.sleep(0.1)  # seldom, because the cores are the job's
            events = self._logs.events()
            found = [
                event
                for pid, n in before.items()
                for event in events.get(pid, [])[n:]
                if event["event"] == "leave_committed"
            ]
            if len(found) == len(before):
                return [(e["mono"] - e["milliseconds"] / 1e3, e["mono"]) for e in found]
        raise JobError(f"{len(found)} of {len(before)} ranks committed the leave in time; {self._job.output()}")

    def _from_links(self) -> list[tuple[float, float]]:
        limit = time.monotonic() + _LEAVE_LIMIT_S
        sights: list[tuple[float, float]] = []
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(self._job.links[rank], selectors.EVENT_READ, self._job.links[rank])
            while len(sights) < len(self._ranks):
                if time.monotonic() > limit:
                    raise JobError(f"{len(sights)} of {len(self._ranks)} ranks parted in time; {self._job.output()}")
                for key, _ in selector.select(0.5):
                    told = key.data.receive(1.0)
                    selector.unregister(key.fileobj)
                    sights.append((told["known"], told["committed"]))
        return sights


def measure(most: int, repeats: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every leave as one record."""
    for repeat in range(repeats):
        for system in rng.sample(sorted(SYSTEMS), len(SYSTEMS)):
            print(f"{SYSTEMS[system]}: {most} ranks, round {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
            with Shrinking(system, most, rng) as job:
                for _ in range(most - 1):
                    yield {"system": system, "repeat": repeat, **job.let_one_go()}


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median, p90 and so on, for each system and size."""
    rows = []
    for system in SYSTEMS:
        for size in sorted({r["size"] for r in records}):
            leaves = [r for r in records if (r["system"], r["size"]) == (system, size)]
            parts = {name: report.summary([r[name] for r in leaves]) for name in ("wait", "handling")}
            rows.append({"system": system, "size": size, **parts})
    return rows


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="A rank leaves, ms", box=None, pad_edge=False)
    for name in ("system", "ranks", "n", "wait", "handling", "q25", "q75", "p90"):
        shown.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    for row in result["rows"]:
        handling = row["handling"]
        shown.add_row(
            SYSTEMS[row["system"]], str(row["size"]), str(handling["n"]), f"{row['wait']['median']:.1f}",
            *[f"{handling[key]:.2f}" for key in ("median", "q25", "q75", "p90")],
        )  # fmt: skip
    console = Console()
    console.print(shown)
    met = [str(r["size"]) for r in result["rows"] if r["system"] == "chaos" and r["handling"]["median"] < TARGET_MS]
    console.print(
        "wait: from the request until all know of it (the rest of the step, and a negotiation); handling: from there "
        f"to the commit at all. Target: median handling below {TARGET_MS:.0f} ms; met at {', '.join(met) or 'no'} ranks"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """The handling time of every leave, and the medians."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for shift, (system, colour) in zip((-0.12, 0.12), (("chaos", "C0"), ("floor", "C7")), strict=True):
        for record in result["leaves"]:
            if record["system"] == system:
                axes.plot(record["size"] + shift, record["handling"], ".", color=colour, alpha=0.4)
        rows = [r for r in result["rows"] if r["system"] == system]
        axes.plot(
            [r["size"] + shift for r in rows], [r["handling"]["median"] for r in rows], "_-", color=colour,
            label=f"{SYSTEMS[system]}, median",
        )  # fmt: skip
    axes.axhline(TARGET_MS, color="C3", linestyle="--", label="target")
    axes.set(xlabel="ranks before the leave", ylabel="ms from known to committed, at all", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Measure, and write JSON, a table and a plot."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="ranks of a fresh job (default 8)")
    parser.add_argument("--repeats", type=int, default=10, help="jobs of each kind (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two jobs of each kind")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the results")
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error("--ranks must be at least 2: the last rank stays")
    jobs.prepare_driver()
    head = report.started()
    try:
        leaves = list(measure(options.ranks, 2 if options.quick else options.repeats, random.Random(options.seed)))
    except JobError as error:
        print(f"events.py: {error}", file=sys.stderr)
        return 1
    result = {"benchmark": "events", **head, "target_ms": TARGET_MS, "rows": summarise(leaves), "leaves": leaves}
    table(result)
    for file in report.write(options.out, "events", result, plot):
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
