"""Horovod jobs that lose a rank and get one: Elastic Horovod, the drop-in, and real Horovod with the callback.

    gloo      Elastic Horovod: ``horovodrun`` with a host discovery script
    dropin    the same script, with ``import chaos_mpi.horovod.torch as hvd``, under ``chaosrun``
    callback  real Horovod on MPI in an ordinary loop with ``ChaosCallback``, under ``chaosrun``

All train the same model and log each step that a rank has finished; nothing else is measured. In shuffled order, each
job anew:

    step      median time of a step before anything happens, ms
    kill      from SIGKILL of a random rank until the last survivor has finished a step without it, s
    caught up the same, until the last survivor has finished a step that nobody had finished before the kill, s
    again     steps that had been finished before the kill and were made again
    join      from one more line in the file of hosts until the newcomer has finished its first step, s
    stall     the longest time that a member finished no step meanwhile, less that of an ordinary step, s

Elastic Horovod looks for hosts once a second. So does ``chaosrun --hosts-from``, which waits for a second look to
agree. It commits every ten steps, and takes no host back on which a rank has failed; so each of its ranks has a host
name of its own here, all of them names of this machine.

    python benchmarks/horovod.py            # about 40 minutes on two cores; needs launch/install_horovod.sh
    python benchmarks/horovod.py --quick    # a look: 2 ranks, the small model, each once
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs
import psutil
import report
from jobs import JobError
from models import WORKLOADS
from recovery import EventLogs

_ROOT = Path(__file__).resolve().parents[1]
_SCRIPT = Path(__file__).resolve().with_name("horovod_rank.py")
SYSTEMS = {"gloo": "Elastic Horovod", "dropin": "drop-in", "callback": "callback"}
MODELS = ("10m", "50m")
SIZES = (2, 3, 4)
FIGURES = ("step_ms", "kill_s", "caught_up_s", "again", "join_s", "stall_s")
#: Names of this machine; Elastic Horovod takes each for a host of its own.
HOSTS = ("localhost", "127.0.0.1", "127.1", "127.0.1", "0x7f000001")
#: Steps that all have finished before anything happens, and after a newcomer has come.
_BEFORE, _AFTER = 12, 3
_LIMIT_S = 150.0
_LOOK_S = 0.02
_MARK = "BENCH_HOROVOD_JOB"

#: A step that a rank has finished: see ``horovod_rank.StepLog``.
Step = dict[str, Any]


class HorovodJob:
    """A job under measurement. A context manager: at its end no process of it is left.

    Args:
        system: one of :data:`SYSTEMS`.
        model: one of :data:`MODELS`.
        ranks: how many it starts with.
        grows: whether a rank will be added, by one more line in the file of hosts.
    """

    def __init__(self, system: str, model: str, ranks: int, *, grows: bool) -> None:
        self.system, self.ranks = system, ranks
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._directory = Path(tempfile.mkdtemp(prefix="bench-"))
        self._steps = self._directory / "steps"
        self._steps.mkdir()
        self._hosts = self._directory / "hosts"
        self._logs = EventLogs(self._steps)
        self._list_hosts(ranks)
        discover = self._directory / "discover"
        discover.write_text(f"#!/bin/sh\ncat {self._hosts}\n")
        discover.chmod(0o755)
        script = [str(_SCRIPT), system, model, str(self._steps)]
        if system == "gloo":
            command = [horovodrun(), "-np", str(ranks), "--min-np", "1", "--max-np", "8"]
            command += ["--gloo", "--network-interface", "lo"]
            command += ["--host-discovery-script", str(discover), sys.executable, *script]
        else:
            command = [sys.executable, "-m", "chaos_mpi.cli.chaosrun", "--restarts", "0"]
            command += ["--hosts-from", str(discover), "--max-ranks", "8"] if grows else ["-n", str(ranks)]
            command += script
        environ = {**os.environ, _MARK: self._mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
        self._output = (self._directory / "output").open("wb")
        self._process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT,
            cwd=self._directory, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> HorovodJob:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.kill()
        self._process.wait()
        self._output.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def steps(self) -> dict[int, list[Step]]:
        """All steps so far, by process id."""
        return self._logs.events()

    def wait_for_training(self) -> None:
        """Return when all ranks have finished some steps together."""

        def trained() -> bool:
            together = [own for own in self.steps().values() if sum(s["size"] == self.ranks for s in own) >= _BEFORE]
            return len(together) == self.ranks

        self.wait(trained, f"{self.ranks} ranks train")

    def add_host(self) -> float:
        """One more line in the file of hosts; when, on the monotonic clock."""
        self._list_hosts(self.ranks + 1)
        return time.monotonic()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Return when the condition holds.

        Raises:
            JobError: the job has ended, or the limit is over.
        """
        limit = time.monotonic() + _LIMIT_S
        while not condition():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > limit:
                self._output.flush()
                said = (self._directory / "output").read_text(errors="replace").strip().splitlines()[-12:]
                why = f"ended with {self._process.returncode}" if ended else f"did not within {_LIMIT_S:.0f} s"
                raise JobError(f"{SYSTEMS[self.system]} {why}: {what}; its last words:\n" + "\n".join(said))
            time.sleep(_LOOK_S)  # seldom, because the cores are the ranks'

    def _list_hosts(self, ranks: int) -> None:
        lines = [f"{host}:1\n" for host in HOSTS[:ranks]] if self.system == "gloo" else [f"localhost:{ranks}\n"]
        new = self._hosts.with_suffix(".new")
        new.write_text("".join(lines))
        new.replace(self._hosts)

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    yield process


def horovodrun() -> str:
    """Elastic Horovod's launcher, of this Python's environment if it has one; empty if there is none."""
    own = Path(sys.executable).with_name("horovodrun")
    return str(own) if own.exists() else shutil.which("horovodrun") or ""


def step_ms(steps: Sequence[Step]) -> float:
    """Median time between two of them."""
    return report.quantile([1e3 * (b["mono"] - a["mono"]) for a, b in itertools.pairwise(steps)], 0.5)


def kill(job: HorovodJob, rng: random.Random) -> dict[str, float]:
    """Kill a rank, and what it costs the others."""
    time.sleep(rng.random())
    before = {pid: list(own) for pid, own in job.steps().items()}
    victim = rng.choice(sorted(before))
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    survivors = [pid for pid in before if pid != victim]
    furthest = 0

    def firsts(wanted: Callable[[Step], bool]) -> list[float]:
        found = ([s["mono"] for s in job.steps()[pid] if s["mono"] > killed and wanted(s)] for pid in survivors)
        return [min(own) for own in found if own]

    def without(step: Step) -> bool:
        return bool(step["size"] == job.ranks - 1)

    def is_new(step: Step) -> bool:
        return without(step) and bool(step["step"] > furthest)

    job.wait(lambda: len(firsts(without)) == len(survivors), "the survivors have finished a step")
    furthest = max(s["step"] for own in job.steps().values() for s in own if s["mono"] < killed or not without(s))
    job.wait(lambda: len(firsts(is_new)) == len(survivors), "the survivors have finished a new step")
    resumed = min(min(s["step"] for s in job.steps()[pid] if without(s)) for pid in survivors)
    return {
        "step_ms": step_ms(before[survivors[0]]),
        "kill_s": max(firsts(without)) - killed,
        "caught_up_s": max(firsts(is_new)) - killed,
        "again": max(furthest + 1 - resumed, 0),
    }


def join(job: HorovodJob) -> dict[str, float]:
    """Add a rank, and what it costs the others."""
    members = list(job.steps())
    usual_s = step_ms(job.steps()[members[0]]) / 1e3
    asked = job.add_host()

    def of_newcomers() -> list[Step]:
        return [s for pid, own in job.steps().items() if pid not in members for s in own]

    job.wait(lambda: len(of_newcomers()) >= _AFTER, "the newcomer has finished its first steps")
    came = min(s["mono"] for s in of_newcomers())
    gaps = [
        b["mono"] - a["mono"]
        for pid in members
        for a, b in itertools.pairwise(job.steps()[pid])
        if asked < b["mono"] and a["mono"] < came
    ]
    return {"join_s": came - asked, "stall_s": max(max(gaps) - usual_s, 0.0)}


def measure(system: str, model: str, ranks: int, what: str, rng: random.Random) -> dict[str, Any]:
    """One job, and one thing that happens to it."""
    try:
        with HorovodJob(system, model, ranks, grows=what == "join") as job:
            job.wait_for_training()
            return join(job) if what == "join" else kill(job, rng)
    except jobs.FAILURES as error:
        return jobs.failed(error)


def sweep(
    systems: Sequence[str], models: Sequence[str], sizes: Sequence[int], repeats: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Every job as one record, in shuffled order."""
    cells = list(itertools.product(systems, models, sizes, ("kill", "join"))) * repeats
    for number, (system, model, ranks, what) in enumerate(rng.sample(cells, len(cells)), start=1):
        title = f"{SYSTEMS[system]}, {WORKLOADS[model].title}, {ranks} ranks: {what}"
        print(f"{number} of {len(cells)}: {title}", file=sys.stderr, flush=True)
        cell = {"system": system, "model": model, "ranks": ranks, "what": what}
        yield {**cell, **measure(system, model, ranks, what, rng)}


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and more of every figure, for each model, size and system."""
    rows = []
    cells = dict.fromkeys((r["model"], r["ranks"], r["system"]) for r in records)
    for model, ranks, system in sorted(cells, key=lambda c: (MODELS.index(c[0]), c[1], list(SYSTEMS).index(c[2]))):
        own = [r for r in records if (r["model"], r["ranks"], r["system"]) == (model, ranks, system)]
        figures = {name: report.summary([r[name] for r in own if name in r]) for name in FIGURES}
        rows.append({"model": model, "ranks": ranks, "system": system, **figures})
    return rows


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        title="Horovod jobs that lose a rank and get one: medians, s; step ms",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("model", "ranks", "system"):
        shown.add_column(name, no_wrap=True)
    for name in ("step", "kill", "caught up", "again", "n", "join", "stall", "n"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        words = [f"{row[name]['median']:.{0 if name in ('step_ms', 'again') else 2}f}" for name in FIGURES]
        kills, joins = str(row["kill_s"]["n"]), str(row["join_s"]["n"])
        shown.add_row(
            WORKLOADS[row["model"]].title, str(row["ranks"]), SYSTEMS[row["system"]],
            *words[:4], kills, *words[4:], joins,
        )  # fmt: skip
    console = Console()
    console.print(shown)
    if result["failures"]:
        console.print(f"jobs that failed: {json.dumps(result['failures'])}")


def plot(result: dict[str, Any], path: Path) -> None:
    """The median and the range of each system, at each size and model: kill, join, stall.

    No bars, as the axis is logarithmic: these have no foot to be long from.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.5), layout="constrained")
    cells = list(dict.fromkeys((row["model"], row["ranks"]) for row in result["rows"]))
    titles = {
        "kill_s": "SIGKILL to the next step",
        "join_s": "new host to its first step",
        "stall_s": "members stand still for it",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for shift, system in enumerate(SYSTEMS):
            rows = [r for r in result["rows"] if r["system"] == system and r[name]["n"]]
            places = [cells.index((r["model"], r["ranks"])) + 0.27 * (shift - 1) for r in rows]
            medians = [r[name]["median"] for r in rows]
            below = [r[name]["median"] - r[name]["min"] for r in rows]
            above = [r[name]["max"] - r[name]["median"] for r in rows]
            axis.errorbar(places, medians, (below, above), fmt="o", capsize=4, label=SYSTEMS[system])
        axis.set_xticks(range(len(cells)), [f"{WORKLOADS[m].title}\n{n} ranks" for m, n in cells], fontsize=7)
        axis.set(title=title, ylabel="s, median and range", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3, help="jobs for each figure")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--seed", type=int, default=0, help="of victims, moments and order")
    parser.add_argument("--quick", action="store_true", help="2 ranks, the small model, each once")
    given = parser.parse_args()
    if "gloo" in given.systems and not horovodrun():
        parser.exit(1, "horovod.py: horovodrun is not there: run launch/install_horovod.sh, or leave gloo out\n")
    report.refuse_unusable(given.out)
    jobs.prepare_driver()
    if given.quick:
        given.models, given.ranks, given.repeats = MODELS[:1], [2], 1
    head = {"benchmark": "horovod", **report.started(), "repeats": given.repeats}
    cells = sweep(given.systems, given.models, given.ranks, given.repeats, random.Random(given.seed))
    records = report.collected(cells)
    failures = [r for r in records if "error" in r]
    result = {**head, "rows": summarise(records), "failures": failures, "jobs": records}
    report.publish(given.out, result, table, plot, records)


if __name__ == "__main__":
    main()
