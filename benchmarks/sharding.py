"""How good the shard schedulers are on unequal links, and what planning costs.

Three questions, all answered by the cost model of ``chaos_mpi.sharding``, without any network:

    schedulers  makespan over the fluid lower bound, for the baselines, Chaos v1 and v2, on random links
    guarantee   how often v1's greedy ("to the least loaded") misses the factor 4/3 - 1/(3 N) that is claimed
                for it, against the optimum at the same shard size, on small random instances
    planning    time to plan 10,000 shards

Links are random as follows: bandwidth log-uniform from 10 MB/s to 1 GB/s, latency log-uniform from 0.1 to 50 ms,
ready within 0.5 s, 50 to 500 microseconds for each shard.

    python benchmarks/sharding.py            # about half a minute
    python benchmarks/sharding.py --quick    # a look, not a result
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import report

from chaos_mpi import sharding
from chaos_mpi.sharding import Neighbour, Plan

MIB = 1 << 20
STATE_BYTES = 1000 * MIB
SIZES = (2, 4, 8, 16, 32)
#: Shard size of the round robin: one that the v2 scan often ends at.
_TURN_BYTES = 4 * MIB
SCHEDULERS: dict[str, tuple[str, Callable[[Sequence[Neighbour], int], Plan]]] = {
    "random": ("one at random (EDL)", lambda n, seed: sharding.single_random(STATE_BYTES, n, seed)),
    "nearest": ("the nearest (Elan)", lambda n, _: sharding.single_nearest(STATE_BYTES, n)),
    "equal": ("equal slices (all-gather)", lambda n, _: sharding.equal_slices(STATE_BYTES, n)),
    "turns": ("round robin, 4 MiB", lambda n, _: sharding.round_robin(STATE_BYTES, n, _TURN_BYTES)),
    "v1": ("Chaos v1", lambda n, _: sharding.bisected(STATE_BYTES, n)),
    "v2": ("Chaos v2 (ours)", lambda n, _: sharding.plan(STATE_BYTES, n)),
}


def links(count: int, rng: random.Random) -> list[Neighbour]:
    """Random links, as the module says."""
    return [
        Neighbour(
            f"n{i:04}",
            bandwidth_bytes_per_s=10 ** rng.uniform(7, 9),
            latency_s=10 ** rng.uniform(-4, -1.3),
            ready_s=rng.uniform(0, 0.5),
            shard_cost_s=rng.uniform(5e-5, 5e-4),
        )
        for i in range(count)
    ]


def schedulers(instances: int, rng: random.Random) -> list[dict[str, Any]]:
    """For each number of neighbours and scheduler, the makespans over the bound, and over v2's."""
    rows = []
    for count in SIZES:
        cases = [links(count, rng) for _ in range(instances)]
        plans = {name: [make(case, seed) for seed, case in enumerate(cases)] for name, (_, make) in SCHEDULERS.items()}
        best = [p.predicted_s for p in plans["v2"]]
        for name, made in plans.items():
            took = [p.predicted_s for p in made]
            rows.append(
                {
                    "neighbours": count,
                    "scheduler": name,
                    "over_bound": report.summary(report.paired_ratios(took, [p.bound_s for p in made])),
                    "over_v2": report.summary(report.paired_ratios(took, best)),
                    "shard_bytes": int(report.quantile([p.shard_bytes for p in made], 0.5)),
                }
            )
    return rows


def guarantee(instances: int, rng: random.Random) -> list[dict[str, Any]]:
    """Makespan of v1's greedy over the optimum, both at one size, for 2 to 5 neighbours and up to 12 shards."""
    rows = []
    for count in range(2, 6):
        claimed = 4 / 3 - 1 / (3 * count)
        ratios = []
        for _ in range(instances):
            case, total = links(count, rng), rng.randint(1, 12) * _TURN_BYTES
            v1 = sharding.bisected(total, case, shard_sizes=[_TURN_BYTES])
            ratios.append(v1.predicted_s / sharding.plan(total, case, shard_sizes=[_TURN_BYTES]).predicted_s)
        rows.append(
            {
                "neighbours": count,
                "claimed": claimed,
                "exceeded_fraction": sum(ratio > claimed for ratio in ratios) / len(ratios),
                "ratio": report.summary(ratios),
            }
        )
    return rows


def planning(repeats: int, rng: random.Random) -> list[dict[str, Any]]:
    """Milliseconds to plan 10,000 shards of 1 MiB, at that size and over the whole chain."""
    rows = []
    total = 10_000 * MIB
    for count in (10, 100, 1000):
        case = links(count, rng)
        ways: dict[str, Callable[[], Plan]] = {
            "v2, 1 MiB": partial(sharding.plan, total, case, shard_sizes=[MIB]),
            "v2, all sizes": partial(sharding.plan, total, case),
            "v2, all sizes, shared downlink": partial(sharding.plan, total, case, downlink_bytes_per_s=1e9),
            "v1, 1 MiB": partial(sharding.bisected, total, case, shard_sizes=[MIB]),
            "v1, bisection": partial(sharding.bisected, total, case),
        }
        for way, make in ways.items():
            took = []
            for _ in range(repeats):
                begun = time.perf_counter()
                make()
                took.append(1e3 * (time.perf_counter() - begun))
            rows.append({"neighbours": count, "way": way, "ms": report.summary(took)})
    return rows


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = Table(title="Makespan over the fluid lower bound, by number of neighbours: median (p90)")
    shown.add_column("scheduler")
    for count in SIZES:
        shown.add_column(str(count), justify="right")
    for name, (title, _) in SCHEDULERS.items():
        ratios = [row["over_bound"] for row in result["schedulers"] if row["scheduler"] == name]
        shown.add_row(title, *[f"{r['median']:.3f} ({r['p90']:.3f})" for r in ratios])
    console.print(shown)
    shown = Table(title="v1's greedy over the optimum at the same shard size")
    for name in ("neighbours", "claimed at most", "exceeded", "median", "p90", "max"):
        shown.add_column(name, justify="right")
    for row in result["guarantee"]:
        numbers = [row["claimed"], row["ratio"]["median"], row["ratio"]["p90"], row["ratio"]["max"]]
        claimed, *rest = [f"{number:.3f}" for number in numbers]
        shown.add_row(str(row["neighbours"]), claimed, f"{100 * row['exceeded_fraction']:.1f} %", *rest)
    console.print(shown)
    shown = Table(title="Time to plan 10,000 MiB, ms")
    shown.add_column("way")
    for name in ("neighbours", "median", "p90", "max"):
        shown.add_column(name, justify="right")
    for row in result["planning"]:
        numbers = [row["ms"][name] for name in ("median", "p90", "max")]
        shown.add_row(row["way"], str(row["neighbours"]), *[f"{number:.2f}" for number in numbers])
    console.print(shown)


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: all schedulers, log scale. Right: v1 and v2 alone. Medians with quartiles."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, names in zip(axes, (tuple(SCHEDULERS), ("v1", "v2")), strict=True):
        for place, name in enumerate(SCHEDULERS):
            if name in names:
                ratios = [row["over_bound"] for row in result["schedulers"] if row["scheduler"] == name]
                medians = [r["median"] for r in ratios]
                spread = [
                    [m - r["q25"] for m, r in zip(medians, ratios, strict=True)],
                    [r["q75"] - m for m, r in zip(medians, ratios, strict=True)],
                ]
                axis.errorbar(SIZES, medians, yerr=spread, fmt="o-", capsize=3, color=f"C{place}",
                              label=SCHEDULERS[name][0])  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(count) for count in SIZES])
        axis.set(xlabel="neighbours", ylabel="makespan / fluid lower bound")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_yscale("log")
    axes[0].set_title("all schedulers (log scale), median and quartiles")
    axes[1].set_title("v1 and v2")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--instances", type=int, default=300, help="random instances for each number of neighbours")
    parser.add_argument("--repeats", type=int, default=30, help="plans for each timing")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--seed", type=int, default=0, help="of the random links")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    given = parser.parse_args()
    report.refuse_unusable(given.out)
    share = 10 if given.quick else 1
    instances, repeats = max(given.instances // share, 2), max(given.repeats // share, 2)
    rng = random.Random(given.seed)
    result = {
        "benchmark": "sharding",
        **report.started(),
        "state_bytes": STATE_BYTES,
        "instances": instances,
        "schedulers": schedulers(instances, rng),
        "guarantee": guarantee(10 * instances, rng),
        "planning": planning(repeats, rng),
    }
    report.publish(given.out, result, table, plot, report.Records(), rows="schedulers")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
