"""Time of a step where one link is slow, before and after the members have changed their order because of it.

Each job trains a GPT with ``chaosrun --hosts`` on hosts of a network test bed (``launch/testbed``), over real ssh. All
hosts have the same rate, but for the link between the first two: there all of the gradients go at first. The job finds
out by itself, from what it sends anyway, and puts the members in another order (``chaos_mpi/monitor/order.py``).
*Before* and *after* are medians of the steps of the first rank in the one and in the other.

    sudo .venv/bin/python benchmarks/order.py            # about 25 minutes on two cores; needs root and sshd
    sudo .venv/bin/python benchmarks/order.py --quick    # a look: four hosts, once
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs
import report
from lost_hosts import HostJob, refuse_without_bed, show

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.testbed.sshd import SshServers
from launch.testbed.testbed import TestBed, TestBedError

#: Parameters of the model; its gradients are four bytes for each.
PARAMS = 1_000_000
#: Steps at the least that a median is taken of.
_STEPS = 12
_HEARTBEAT_LIMIT_S = 2.0  # the hosts share two cores


def measure(hosts: int, rate_mbit: float, slow_mbit: float) -> dict[str, Any]:
    """One job, until it has trained for some steps in another order."""
    program = ("train_lm.py", "--params", str(PARAMS), "--steps", "1000000", "--batch-size", "1", "--block-size", "16")
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        names = [f"h{i}" for i in range(hosts)]
        try:
            with (
                TestBed(names, rate_mbit=rate_mbit) as bed,
                SshServers(bed, scratch) as ssh,
                HostJob(bed, ssh, _HEARTBEAT_LIMIT_S, scratch, program) as job,
            ):
                bed.set_pair_rate("h0", "h1", slow_mbit)
                job.wait_for_training(1)
                job.wait(lambda: len(_steps(job, 1)) > _STEPS, "the members train on in another order")
                first = job.logs.events()[job.pids["h0"]]
                times = {epoch: [b - a for a, b in itertools.pairwise(_steps(job, epoch))] for epoch in (0, 1)}
                changed, stalled = (
                    next(e for e in first if e["event"] == name) for name in ("view_committed", "stalled")
                )
                if not changed["cause"] == stalled["cause"] == "order":
                    raise jobs.JobError(f"the first change was no change of the order: {changed['cause']}")
                order = [member.partition(":")[0] for member in changed["members"]]
                known_s = changed["mono"] - _steps(job, 0)[0]
        except (*jobs.FAILURES, TestBedError) as error:
            return jobs.failed(error)
    before, after = (1e3 * report.summary(times[epoch][1:])["median"] for epoch in (0, 1))
    return {
        "before_ms": before, "after_ms": after, "ratio": before / after, "order": order,
        "after_s": known_s, "stalled_ms": 1e3 * stalled["seconds"],
    }  # fmt: skip


def _steps(job: HostJob, epoch: int) -> list[float]:
    """When the first rank had finished each step in a view."""
    own = job.logs.events()[job.pids["h0"]]
    return [e["mono"] for e in own if e["event"] == "step" and e["epoch"] == epoch]


def sweep(cells: Sequence[tuple[int, float]], rate_mbit: float) -> Iterator[dict[str, Any]]:
    """Every job as one record."""
    for hosts, slow_mbit in cells:
        print(f"{hosts} hosts, {rate_mbit:g} Mbit/s, one link {slow_mbit:g} Mbit/s", file=sys.stderr, flush=True)
        yield {"hosts": hosts, "slow_mbit": slow_mbit, **measure(hosts, rate_mbit, slow_mbit)}


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of every cell."""
    rows = []
    for hosts, slow_mbit in sorted({(r["hosts"], r["slow_mbit"]) for r in records}):
        cell = [r for r in records if (r["hosts"], r["slow_mbit"]) == (hosts, slow_mbit) and "error" not in r]
        if cell:
            names = ("before_ms", "after_ms", "ratio", "after_s", "stalled_ms")
            figures = {name: report.summary([r[name] for r in cell]) for name in names}
            rows.append({"hosts": hosts, "slow_mbit": slow_mbit, "orders": [r["order"] for r in cell], **figures})
    return rows


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.table import Table

    shown = Table(title=f"a step of {PARAMS / 1e6:g} M parameters, ms; other links {result['rate_mbit']:g} Mbit/s")
    for name in ("hosts", "slow link, Mbit/s", "n", "before", "after", "before : after", "known after, s", "stalled"):
        shown.add_column(name, justify="right")
    for row in result["rows"]:
        shown.add_row(
            str(row["hosts"]), f"{row['slow_mbit']:g}", str(row["ratio"]["n"]), f"{row['before_ms']['median']:.0f}",
            f"{row['after_ms']['median']:.0f}", f"{row['ratio']['median']:.1f}", f"{row['after_s']['median']:.0f}",
            f"{row['stalled_ms']['median']:.0f}",
        )  # fmt: skip
    show(shown, result["records"])


def plot(result: dict[str, Any], path: Path) -> None:
    """Each cell as two bars."""
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for shift, name, label in ((-0.2, "before_ms", "before"), (0.2, "after_ms", "after")):
        axis.bar([i + shift for i in range(len(rows))], [row[name]["median"] for row in rows], 0.38, label=label)
    axis.set_xticks(range(len(rows)), [f"{row['hosts']} hosts\n{row['slow_mbit']:g} Mbit/s" for row in rows])
    axis.set(ylabel="ms per step", yscale="log")
    axis.legend()
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--hosts", type=int, nargs="+", default=[3, 4, 5, 6], help="numbers of hosts")
    parser.add_argument("--rate", type=float, default=500.0, metavar="MBIT", help="of every host, Mbit/s")
    parser.add_argument("--slow", type=float, nargs="+", default=[20.0, 50.0], metavar="MBIT", help="of the slow link")
    parser.add_argument("--repeats", type=int, default=3, help="jobs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the jobs")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--quick", action="store_true", help="four hosts, one link of 20 Mbit/s, once")
    given = parser.parse_args()
    if min(given.hosts) < 3:
        parser.error("--hosts: of two hosts there is but one order")
    refuse_without_bed(parser)
    report.refuse_unusable(given.out)
    jobs.prepare_driver()
    cells = [(4, 20.0)] if given.quick else [*itertools.product(given.hosts, given.slow)] * given.repeats
    head = {"benchmark": "order", **report.started(), "rate_mbit": given.rate}
    records = report.collected(sweep(random.Random(given.seed).sample(cells, len(cells)), given.rate))
    result = {**head, "rows": summarise(records), "records": records}
    report.publish(given.out, result, table, plot, records)


if __name__ == "__main__":
    main()
