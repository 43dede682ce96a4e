"""Step time of chaos_mpi's DDP against torch's DDP over Gloo and against bare MPI without fault tolerance.

For each model and number of ranks, the jobs of all systems are up at the same time, asleep, and take turns of
about a second, in an order shuffled anew in every round. A ratio is taken within a round, so that what else
goes on on the machine hits both sides. "Bare MPI" is the faster of two hand-written mpi4py loops (see
``overhead_rank.py``), started without ULFM, with the same transport.

    python benchmarks/overhead.py            # about ten minutes on two cores
    python benchmarks/overhead.py --quick    # a look, not a result
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import psutil
import report
from jobs import Job, JobError
from models import WORKLOADS, parameters

_SCRIPT = Path(__file__).resolve().with_name("overhead_rank.py")
#: A rank ends with the driver, since it waits for it most of the time; if it hangs, it ends after so long.
_JOB_LIMIT_S = 3600
_TURN_LIMIT_S = 120.0
_CHECK_STEPS = 3
#: What each rank of each system needs beside its tensors: the Python process with torch, in bytes.
_PROCESS_BYTES = 250 << 20
#: Parameter-sized tensors of a rank: parameters, gradients, buckets (two sets of them in ours).
_COPIES = {"chaos": 4, "gloo": 4, "mpi": 3}


@dataclass(frozen=True, slots=True)
class Contender:
    """A system, as one of its variants."""

    key: str
    title: str
    system: str
    variant: str


CONTENDERS = (
    Contender("chaos", "chaos_mpi DDP", "chaos", ""),
    Contender("gloo", "torch DDP, Gloo", "gloo", ""),
    Contender("mpi_overlap", "bare MPI, overlapped buckets", "mpi", "overlap"),
    Contender("mpi_flat", "bare MPI, one Allreduce", "mpi", "flat"),
)


def measure(model: str, ranks: int, steps: int, rounds: int, launches: int, rng: random.Random) -> dict[str, Any]:
    """All systems on one model and one number of ranks.

    Args:
        steps: timed steps of a turn.
        rounds: turns of each contender, over all launches.
        launches: how many times the jobs are started afresh.
    """
    turns: dict[str, list[float]] = {c.key: [] for c in CONTENDERS}
    all_steps: dict[str, list[float]] = {c.key: [] for c in CONTENDERS}
    parts: dict[str, dict[str, float]] = {}
    for launch in range(launches):
        group = {system: _job(system, model, ranks) for system in ("chaos", "gloo", "mpi")}
        with jobs.started_together(list(group.values())):
            refuse_different({c.key: _ask(group[c.system], c, "check", _CHECK_STEPS) for c in CONTENDERS})
            for _ in range(rounds // launches + (launch < rounds % launches)):
                for c in rng.sample(CONTENDERS, len(CONTENDERS)):
                    seconds = _over_ranks(_ask(group[c.system], c, "run", steps))
                    all_steps[c.key] += seconds
                    turns[c.key].append(statistics.median(seconds))
            if launch == launches - 1:
                for c in CONTENDERS:
                    parts[c.key] = _ask(group[c.system], c, "breakdown", steps)[0]
    best = min(("mpi_overlap", "mpi_flat"), key=lambda key: statistics.median(all_steps[key]))
    return {
        "model": model,
        "title": WORKLOADS[model].title,
        "parameters": parameters(WORKLOADS[model].build()),
        "ranks": ranks,
        "steps_per_turn": steps,
        "rounds": rounds,
        "launches": launches,
        "systems": {c.key: {"title": c.title, "step_ms": _ms(all_steps[c.key])} for c in CONTENDERS},
        "bare_mpi": best,
        "ratio_to_gloo": _ratio(turns["chaos"], turns["gloo"]),
        "ratio_to_bare_mpi": _ratio(turns["chaos"], turns[best]),
        # The same system against itself in the round after: how far two equal things are apart here.
        "noise": _ratio(turns[best][1:], turns[best][:-1]),
        "parts_us_per_step": {k: {n: 1e6 * s for n, s in p.items()} for k, p in parts.items() if p},
        "turn_ms": {key: [1e3 * s for s in values] for key, values in turns.items()},
    }


def refuse_different(sums: Mapping[str, Sequence[float]]) -> None:
    """Compare what all systems have trained, by a sum over the parameters of each rank.

    Raises:
        JobError: a rank of one has other parameters than the first one of bare MPI.
    """
    reference = sums["mpi_flat"][0]
    differing = [key for key, own in sums.items() if any(abs(v - reference) > 1e-5 * abs(reference) for v in own)]
    if differing:
        raise JobError(f"{', '.join(differing)} trained to other parameters than bare MPI: the comparison is void")


def _job(system: str, model: str, ranks: int) -> Job:
    def commands(directory: Path) -> list[tuple[list[str], dict[str, str]]]:
        if system == "gloo":
            return jobs.gloo_commands(_SCRIPT, ranks, directory / "rendezvous")
        return [jobs.mpirun(_SCRIPT, ranks, fault_tolerant=system == "chaos")]

    spec = {"system": system, "model": model, "limit_s": _JOB_LIMIT_S}
    return Job(f"{system}, {model}, {ranks} ranks", commands, ranks, spec)


def _ask(job: Job, contender: Contender, do: str, steps: int) -> list[Any]:
    answers = job.ask({"do": do, "variant": contender.variant, "steps": steps}, _TURN_LIMIT_S)
    return [answer["result"] for answer in answers]


def _over_ranks(seconds: list[list[float]]) -> list[float]:
    """The mean over the ranks of each step; they wait for one another in every step, so they differ little."""
    return [statistics.fmean(step) for step in zip(*seconds, strict=True)]


def _ms(seconds: list[float]) -> dict[str, float]:
    return report.summary([1e3 * s for s in seconds])


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = report.paired_ratios(ours, theirs)
    low, high = report.median_interval(ratios)
    return {**report.summary(ratios), "ci_low": low, "ci_high": high}


def verdict(ratio: dict[str, float], target: float) -> str:
    """``met`` or ``missed`` by the median, and whether the confidence interval of the median leaves a doubt."""
    word = "met" if ratio["median"] <= target else "missed"
    return word if (ratio["ci_low"] > target) == (ratio["ci_high"] > target) else f"{word}?"


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    def tabulated(title: str, left: int, *columns: str) -> Table:
        made = Table(title=title)
        for place, name in enumerate(columns):
            made.add_column(name, justify="left" if place < left else "right")
        return made

    cases = [(f"{c['title']} x {c['ranks']}", c) for c in result["cases"]]
    times = tabulated("Training step, ms (median)", 1, "model x ranks", "chaos_mpi", "Gloo", "MPI overlap", "MPI flat")
    ratios = tabulated(
        "chaos_mpi against the others, within a round", 2,
        "model x ranks", "against", "ratio", "quartiles", "95 % interval", "target",
    )  # fmt: skip
    parts = tabulated(
        "Communication of a step, us (parts may contain one another)", 3, "model x ranks", "system", "parts"
    )
    for name, case in cases:
        times.add_row(name, *[f"{case['systems'][c.key]['step_ms']['median']:.2f}" for c in CONTENDERS])
        for against, key, target in (("Gloo", "ratio_to_gloo", 1.0), ("bare MPI", "ratio_to_bare_mpi", 1.02)):
            r = case[key]
            ratios.add_row(
                name, against, f"{r['median']:.3f}", f"{r['q25']:.3f} {r['q75']:.3f}",
                f"{r['ci_low']:.3f} {r['ci_high']:.3f}", verdict(r, target),
            )  # fmt: skip
        noise = case["noise"]
        ratios.add_row("", "(noise)", f"{noise['median']:.3f}", f"{noise['q25']:.3f} {noise['q75']:.3f}", "", "")
        for key, spent in case["parts_us_per_step"].items():
            parts.add_row(name, key, ", ".join(f"{part} {us:.0f}" for part, us in spent.items()))
    console = Console()
    console.print(times)
    console.print(ratios)
    console.print(
        "Targets: at most 1.00 against Gloo, 1.02 against bare MPI (the faster of the two); judged by the median, "
        "'?' when its 95 % interval spans the target. noise: bare MPI against itself one round later."
    )
    console.print(parts)
    if result["failures"]:
        console.print(f"jobs that failed: {json.dumps(result['failures'])}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Ratios of every round, as boxes, with the two targets."""
    import matplotlib.pyplot as plt

    cases = result["cases"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.6 * len(cases) + 2), sharey=True, layout="constrained")
    labels = [f"{c['title']}, {c['ranks']} ranks" for c in cases]
    sides = (
        ("against torch DDP over Gloo", 1.0, "target: never slower", ["gloo"] * len(cases)),
        ("against bare MPI without fault tolerance", 1.02, "target: within 2 %", [c["bare_mpi"] for c in cases]),
    )
    for axis, (title, target, words, others) in zip(axes, sides, strict=True):
        ratios = [
            report.paired_ratios(c["turn_ms"]["chaos"], c["turn_ms"][o]) for c, o in zip(cases, others, strict=True)
        ]
        axis.boxplot(ratios, orientation="horizontal", widths=0.5, showfliers=False, medianprops={"color": "C1"})
        for place, values in enumerate(ratios, start=1):
            axis.plot(values, [place] * len(values), ".", color="C0", alpha=0.35, markersize=5)
        axis.axvline(target, color="C3", linestyle="--", label=words)
        axis.set_title(f"step time {title}", fontsize=10)
        axis.set_xlabel("ratio of step times, one point per round (lower is better)")
        axis.legend(loc="best", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(1, len(cases) + 1), labels)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _enough_memory(model: str, ranks: int) -> bool:
    tensors = sum(_COPIES.values()) * 4 * parameters(WORKLOADS[model].build())
    needed = ranks * (tensors + len(_COPIES) * _PROCESS_BYTES)
    free: int = psutil.virtual_memory().available
    if needed > free:
        print(f"{model} on {ranks} ranks is left out: it needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    return needed <= free


def sweep(given: argparse.Namespace, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every model on every number of ranks, as :func:`measure` returns it, or ``error``."""
    for model, ranks in itertools.product(given.models, given.ranks):
        if (given.quick and model == "50m") or not _enough_memory(model, ranks):
            continue
        workload = WORKLOADS[model]
        print(f"{workload.title} on {ranks} ranks ...", file=sys.stderr, flush=True)
        rounds = given.rounds or (4 if given.quick else workload.rounds)
        launches = 1 if given.quick else min(given.launches, rounds)
        try:
            yield measure(model, ranks, given.steps or workload.turn_steps, rounds, launches, rng)
        except jobs.FAILURES as error:
            yield {"model": model, "ranks": ranks, **jobs.failed(error)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=["digits", "10m", "50m"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--steps", type=int, help="timed steps of a turn (default: about a second's worth)")
    parser.add_argument("--rounds", type=int, help="turns of each system (default: by model)")
    parser.add_argument("--launches", type=int, default=2, help="fresh starts of the jobs for each case")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--quick", action="store_true", help="one launch, few rounds, no 50 M model")
    given = parser.parse_args()
    report.refuse_unusable(given.out)
    jobs.prepare_driver()
    head = {"benchmark": "overhead", **report.started()}
    cases = report.collected(sweep(given, random.Random(given.seed)))
    failures = [case for case in cases if "error" in case]
    result = {**head, "cases": [case for case in cases if "error" not in case], "failures": failures}
    report.publish(given.out, result, table, plot, cases, rows="cases")


if __name__ == "__main__":
    main()
