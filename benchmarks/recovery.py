"""Time from a SIGKILL to the next finished step, at 2 to 8 ranks, and where it goes.

A job of 8 ranks trains for real; one rank after the other, chosen at random, is killed at a random moment
until one is left. So the kill at 8 ranks always hits a fresh job, and smaller sizes were reached by earlier
recoveries (``--fresh``: a fresh job for every kill). In between, in shuffled order, the same is done to the
floor: a bare mpi4py loop that only revokes, shrinks and reduces again, without any care for the training
state.

How a recovery is split: survivors go on computing until they need the others, so a part of the time from the
kill on would have passed without a failure too. ``compute`` is that part: from the kill until the last
survivor had its gradients ready. What follows is the cost of the failure, as the survivor that came last saw
it (the others wait for it):

    detect    until MPI reports the failure
    revoke    until the broken communicator is revoked and its requests are ended
    shrink    agree to meet, build the smaller communicator, agree that everybody has it
    exchange  tell who finished what, hand over a finished result, commit the new view (the floor has none)
    redo      reduce the gradients of the step in flight again

    python benchmarks/recovery.py            # about eight minutes on two cores
    python benchmarks/recovery.py --quick    # a look, not a result
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import selectors
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs
import report
from jobs import Job, JobError
from models import WORKLOADS

_SCRIPT = Path(__file__).resolve().with_name("recovery_rank.py")
_JOB_LIMIT_S = 300
#: Longest wait for all survivors of one kill.
_RECOVERY_LIMIT_S = 30.0
#: Training between two kills, at least; a random part of as much again is added.
_BETWEEN_S = 0.3
PARTS = ("compute", "detect", "revoke", "shrink", "exchange", "redo")
SYSTEMS = {"chaos": "chaos_mpi", "floor": "floor (bare ULFM)"}
TARGET_MS, TARGET_RANKS = 50.0, 8

#: One survivor's view of one recovery: the monotonic times ``entered`` (from when it needs the others), ``detected``
#: and ``finished``, seconds, and the parts, milliseconds.
Sight = dict[str, float]


class EventLogs:
    """The event logs of a job's ranks, read as they grow."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}
        self._pids: dict[int, list[dict[str, Any]]] = {}

    def events(self) -> dict[int, list[dict[str, Any]]]:
        """All events so far, by process id."""
        for path in self._directory.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                event = json.loads(line)
                self._pids.setdefault(int(event["member"].rpartition(":")[2]), []).append(event)
        return self._pids


class Victim:
    """A job whose ranks are killed one by one.

    Args:
        system: ``chaos`` or ``floor``.
        model: what it trains.
        ranks: how many it starts with.
    """

    def __init__(self, system: str, model: str, ranks: int, rng: random.Random) -> None:
        self._system, self._rng = system, rng

        def commands(directory: Path) -> list[tuple[list[str], dict[str, str]]]:
            command, environ = jobs.mpirun(_SCRIPT, ranks, fault_tolerant=True)
            return [(command, {**environ, "CHAOS_EVENT_LOG": str(directory / "%m.jsonl")})]

        spec = {"system": system, "model": model, "limit_s": _JOB_LIMIT_S}
        self._job = Job(f"{SYSTEMS[system]}, {ranks} ranks", commands, ranks, spec)
        self._logs = EventLogs(self._job.directory)
        self.pids: list[int] = []

    def __enter__(self) -> Victim:
        self._job.__enter__()
        self.pids = [hello["pid"] for hello in self._job.hellos.values()]
        for link in self._job.links.values():
            link.send({"go": True})
        time.sleep(1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._job.end()

    def kill_one(self) -> dict[str, Any]:
        """Kill a random rank at a random moment and return what it cost.

        Raises:
            JobError: the survivors did not all finish a step in time.
        """
        size = len(self.pids)
        time.sleep(_BETWEEN_S * (1 + self._rng.random()))
        pid = self._rng.choice(self.pids)
        self.pids.remove(pid)
        before = {p: len(self._logs.events().get(p, [])) for p in self.pids}
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        chaos = self._system == "chaos"
        return {"size": size, **split(killed, self._from_event_logs(before) if chaos else self._from_links(size - 1))}

    def step_ms(self) -> float:
        """Median time of an ordinary step so far, from the event log (NaN for the floor)."""
        gaps = []
        for events in self._logs.events().values():
            times = [e["mono"] for e in events if e["event"] == "step"]
            gaps += [1e3 * (b - a) for a, b in itertools.pairwise(times)]
        return report.quantile(gaps, 0.5)

    def _from_event_logs(self, before: dict[int, int]) -> list[Sight]:
        limit = time.monotonic() + _RECOVERY_LIMIT_S
        while time.monotonic() < limit:
            # Seldom, because the cores are the survivors'.
            time.sleep(0.1)
            events = self._logs.events()
            news = {p: events.get(p, [])[n:] for p, n in before.items()}
            if all(any(e["event"] == "recovered" for e in list_) for list_ in news.values()):
                return [_sight(list_) for list_ in news.values()]
        late = [p for p, list_ in news.items() if not any(e["event"] == "recovered" for e in list_)]
        raise JobError(f"{len(late)} of {len(before)} survivors did not recover in time; {self._job.output()}")

    def _from_links(self, survivors: int) -> list[Sight]:
        limit = time.monotonic() + _RECOVERY_LIMIT_S
        sights: list[Sight] = []
        with selectors.DefaultSelector() as selector:
            for rank, link in self._job.links.items():
                if self._job.hellos[rank]["pid"] in self.pids:
                    selector.register(link, selectors.EVENT_READ, link)
            while len(sights) < survivors:
                if time.monotonic() > limit:
                    raise JobError(f"{len(sights)} of {survivors} survivors recovered in time; {self._job.output()}")
                for key, _ in selector.select(0.5):
                    try:
                        told = key.data.receive(1.0)
                    except (EOFError, ConnectionError) as error:
                        raise JobError(f"a survivor ended; {self._job.output()}") from error
                    if told["size"] != survivors:
                        continue
                    sights.append(
                        {
                            "entered": told["entered"],
                            "detected": told["detected"],
                            "finished": told["finished"],
                            "revoke": 1e3 * (told["revoked"] - told["detected"]),
                            "shrink": 1e3 * (told["shrunk"] - told["revoked"]),
                            "exchange": 0.0,
                            "redo": 1e3 * (told["finished"] - told["shrunk"]),
                        }
                    )
        return sights


def _sight(events: Sequence[dict[str, Any]]) -> Sight:
    """One survivor's view, from the events it logged since the kill."""
    detected = next(e for e in events if e["event"] == "failure_detected")
    recovered = next(e for e in events if e["event"] == "recovered")
    return {
        "entered": detected["mono"] - recovered["detect_ms"] / 1e3,
        "detected": detected["mono"],
        "finished": recovered["mono"],
        **{part: recovered.get(f"{part}_ms", 0.0) for part in ("revoke", "shrink", "exchange", "redo")},
    }


def split(killed: float, sights: Sequence[Sight]) -> dict[str, float]:
    """The cost of one kill, in ms, from all survivors' views of it.

    ``total`` is the slowest survivor's time from the kill to its next finished step; ``net`` is without
    ``compute``; ``without_redo`` is ``net`` without the repeated reduction.
    """
    last = max(sights, key=lambda s: s["entered"])
    ready = max(last["entered"], killed)
    total = 1e3 * (max(s["finished"] for s in sights) - killed)
    compute = 1e3 * (ready - killed)
    return {
        "total": total,
        "net": total - compute,
        "without_redo": total - compute - last["redo"],
        "compute": compute,
        "detect": 1e3 * max(last["detected"] - ready, 0.0),
        **{part: last[part] for part in ("revoke", "shrink", "exchange", "redo")},
    }


def measure(
    model: str, most: int, least: int, repeats: int, fresh: bool, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Every kill as one record; a job that fails to recover is one too, with ``error``."""
    plans = [(size, size) for size in range(most, least - 1, -1)] if fresh else [(most, least)]
    for repeat in range(repeats):
        for start, end in plans:
            for system in rng.sample(sorted(SYSTEMS), len(SYSTEMS)):
                print(f"{SYSTEMS[system]}: {start} ranks, round {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
                record: dict[str, Any] = {"system": system, "repeat": repeat}
                try:
                    with Victim(system, model, start, rng) as victim:
                        step_ms = victim.step_ms()
                        for _ in range(start - end + 1):
                            yield {**record, **victim.kill_one()}
                        yield {**record, "size": start, "step_ms": step_ms}
                except jobs.FAILURES as error:
                    yield {**record, "size": start, **jobs.failed(error)}


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median, p90 and so on of every part, for each system and size."""
    rows = []
    for system in SYSTEMS:
        for size in sorted({r["size"] for r in records}):
            kills = [r for r in records if (r["system"], r["size"]) == (system, size) and "total" in r]
            if kills:
                names = ("total", "net", "without_redo", *PARTS)
                rows.append(
                    {"system": system, "size": size, **{n: report.summary([k[n] for k in kills]) for n in names}}
                )
    return rows


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    title = "From SIGKILL to the next finished step, ms; parts are medians"
    shown = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns are enough
    parts = [part for part in PARTS if part != "revoke"]  # always a fraction of a millisecond
    for name in ("ranks", "n", "total", *parts, "net", "p90", "-redo"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        net, floor = row["net"], "floor " if row["system"] == "floor" else ""
        shown.add_row(
            f"{floor}{row['size']}", str(net["n"]), f"{row['total']['median']:.0f}",
            *[f"{row[part]['median']:.1f}" for part in parts],
            f"{net['median']:.1f}", f"{net['p90']:.0f}", f"{row['without_redo']['median']:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(shown)
    console.print(
        "net: total less compute that the survivors had to do anyway; -redo: net less redo; the slowest survivor of "
        "each kill counts; floor: a bare ULFM loop"
    )
    target = result["target"]
    if target["median_ms"] is not None:
        word = "met" if target["met"] else "MISSED"
        console.print(
            f"target: net without redo below {TARGET_MS:.0f} ms (median) at {TARGET_RANKS} ranks: "
            f"{target['median_ms']:.1f} ms, {word}; with redo {target['with_redo_ms']:.1f} ms"
        )
    if result["failures"]:
        console.print(f"jobs that did not recover: {json.dumps(result['failures'])}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: net time of every kill. Right: median parts, ours beside the floor."""
    import matplotlib.pyplot as plt

    figure, (points, bars) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes = sorted({row["size"] for row in result["rows"]})
    colours = {"chaos": "C0", "floor": "C7"}
    for shift, system in zip((-0.15, 0.15), SYSTEMS, strict=True):
        for kill in result["kills"]:
            if kill["system"] == system and "net" in kill:
                points.plot(kill["size"] + shift, kill["net"], ".", color=colours[system], alpha=0.4)
        rows = [r for r in result["rows"] if r["system"] == system]
        places = [r["size"] + shift for r in rows]
        points.plot(
            places, [r["net"]["median"] for r in rows], "_-", color=colours[system], label=f"{SYSTEMS[system]}, median"
        )
    points.axhline(TARGET_MS, color="C3", linestyle="--", label=f"target at {TARGET_RANKS} ranks")
    points.set(
        xlabel="ranks before the kill",
        ylabel="ms, without the compute due anyway",
        xticks=sizes,
        title="kill to next finished step",
    )
    points.set_ylim(bottom=0)
    for shift, system in zip((-0.2, 0.2), SYSTEMS, strict=True):
        rows = [r for r in result["rows"] if r["system"] == system]
        places = [r["size"] + shift for r in rows]
        base = [0.0] * len(rows)
        for colour, part in enumerate(PARTS[1:]):
            heights = [r[part]["median"] for r in rows]
            bars.bar(places, heights, 0.36, bottom=base, color=f"C{colour}", alpha=1.0 if system == "chaos" else 0.45,
                     label=part if system == "chaos" else None)  # fmt: skip
            base = [b + h for b, h in zip(base, heights, strict=True)]
    bars.set(xlabel="ranks before the kill", ylabel="ms", xticks=sizes, title="median of each part (pale: the floor)")
    for axis in (points, bars):
        axis.legend(fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _target(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row = next((r for r in rows if (r["system"], r["size"]) == ("chaos", TARGET_RANKS)), None)
    median = row["without_redo"]["median"] if row else None
    return {
        "limit_ms": TARGET_MS,
        "ranks": TARGET_RANKS,
        "median_ms": median,
        "with_redo_ms": row["net"]["median"] if row else None,
        "met": median is not None and median < TARGET_MS,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="size that a job starts with")
    parser.add_argument("--least", type=int, default=2, help="size of the last kill")
    parser.add_argument("--repeats", type=int, default=15, help="kills of each system at each size")
    parser.add_argument("--model", choices=list(WORKLOADS), default="digits")
    parser.add_argument("--fresh", action="store_true", help="a fresh job for every kill (takes much longer)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--seed", type=int, default=0, help="of victims, moments and order")
    parser.add_argument("--quick", action="store_true", help="two kills at each size")
    given = parser.parse_args()
    if not 2 <= given.least <= given.ranks:
        parser.error("--least: from 2, one of which survives, to --ranks")
    report.refuse_unusable(given.out)
    jobs.prepare_driver()
    repeats = 2 if given.quick else given.repeats
    head = {"benchmark": "recovery", **report.started(), "model": WORKLOADS[given.model].title, "fresh": given.fresh}
    kills = measure(given.model, given.ranks, given.least, repeats, given.fresh, random.Random(given.seed))
    records = report.collected(kills)
    rows = summarise(records)
    result = {
        **head,
        "target": _target(rows),
        "step_ms": report.quantile([r["step_ms"] for r in records if r["system"] == "chaos" and "step_ms" in r], 0.5),
        "rows": rows,
        "failures": [r for r in records if "error" in r],
        "kills": [r for r in records if "total" in r],
    }
    report.publish(given.out, result, table, plot, records)


if __name__ == "__main__":
    main()
