"""Time from a join request to the newcomer's first step, and what it costs the members, beside other systems.

A job trains on hosts of a network test bed whose uplinks are shaped; one more rank joins. All systems run the same
steps on the same engine and differ in how the newcomer gets the training state:

    chaos_mpi overlap    shards from all members at once, by the speed of their links; the members train on
    chaos_mpi blocking   the same, while the members wait
    EDL                  one worker, chosen at random, sends everything
    Elan                 the worker with the fastest link sends everything
    Autoscaling          all-gather of slices over old and new workers (Or et al.)
    Pollux/AdaptDL       checkpoint to shared storage, all restart, all read it

    sudo .venv/bin/python benchmarks/scale_out.py            # about 35 minutes on two cores; needs root
    sudo .venv/bin/python benchmarks/scale_out.py --quick    # a look: one cell
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs
import report
from jobs import Job, JobError
from scale_out_cells import SYSTEMS, UNEQUAL, Cell
from scale_out_table import plot, summarise, table, targets
from scale_out_times import cost, joined_parts, noted, restarted_parts, steps_of
from synthetic import read_journal

from chaos_mpi.events import read_events
from chaos_mpi.mpi.launch import mpirun_command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.testbed.testbed import TestBed, TestBedError, check_platform, mpirun_options

_HERE = Path(__file__).resolve().parent
_SCRIPT = _HERE / "scale_out_rank.py"
#: Training before the request, seconds and steps at least.
_BEFORE_S, _BEFORE_STEPS = 2.0, 20
_LOOK_S = 0.02
_NEWCOMER, _STORAGE = "newcomer", "storage"


class Site:
    """The test bed and the shared storage on it.

    Args:
        bed: with the hosts h0, h1, ..., one for the newcomer and one for the storage.
    """

    def __init__(self, bed: TestBed) -> None:
        self.bed = bed
        command = [sys.executable, "-S", str(_HERE / "baselines" / "storage.py"), bed.address(_STORAGE)]
        self._storage = subprocess.Popen(
            bed.command(_STORAGE, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._storage.stdout is not None
        self.port = int(self._storage.stdout.readline())

    def close(self) -> None:
        """End the storage."""
        self._storage.kill()
        self._storage.wait(5.0)

    def shape(self, cell: Cell) -> None:
        """Give the uplinks their rates. Downlinks are not shaped."""
        for host, rate in zip(self.bed.hosts, cell.rates_mbit, strict=False):
            self.bed.set_host_rate(host, rate, down=False)
        self.bed.set_host_rate(_NEWCOMER, cell.mean_mbit, down=False)
        self.bed.set_host_rate(_STORAGE, sum(cell.rates_mbit), down=False)

    def unshape(self) -> None:
        """Take all limits away: jobs are to start quickly."""
        for host in self.bed.hosts:
            self.bed.set_host_rate(host, None)

    def job(self, cell: Cell, contender: str, source: int, directory: Path, *, restarted: bool = False) -> Job:
        """A job that is to be started."""
        hosts = self.bed.hosts[: cell.sources] + ([_NEWCOMER] if restarted else [])
        options = mpirun_options(self.bed)
        environ = {**options.environment, "CHAOS_EVENT_LOG": str(directory / "events-%m.jsonl")}
        if contender.startswith("chaos_"):
            environ["CHAOS_JOIN_POLICY"] = contender.removeprefix("chaos_")
        command = mpirun_command(len(hosts), [sys.executable, str(_SCRIPT)], environ={**os.environ, **environ})
        spec = {
            "contender": contender,
            "state_bytes": cell.state_bytes,
            "source": source,
            "storage": [self.bed.address(_STORAGE), self.port],
            "restarted": restarted,
            "bed": self.bed.prefix,
            "hosts": hosts,
            "newcomer_host": _NEWCOMER,
            "directory": str(directory),
            "limit_s": _limit_s(cell),
        }
        return Job(SYSTEMS[contender], lambda _: [(command, environ)], len(hosts), spec)


def measure(site: Site, cell: Cell, contender: str, source: int, scratch: Path) -> dict[str, Any]:
    """One join of one system.

    Raises:
        JobError: the job did not do it in time.
    """
    first, second = scratch / "first", scratch / "second"
    first.mkdir(parents=True)
    second.mkdir()
    site.unshape()
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(site.job(cell, contender, source, first))
        site.shape(cell)
        for link in job.links.values():
            link.send({"go": True})
        _wait(lambda: _trained(first), 60.0, job, "train for a while")
        requested = time.monotonic()
        job.links[0].send({"join": True})
        after = first
        if contender == "checkpoint":
            _wait(lambda: _has(first / "rank0.jsonl", "saved"), _limit_s(cell), job, "write the checkpoint")
            after, job = second, stack.enter_context(site.job(cell, contender, source, second, restarted=True))
        _wait(lambda: _has(after / "newcomer.jsonl", "contributed"), _limit_s(cell), job, "take the newcomer in")
        time.sleep(0.3)  # for the others to note that step, too
    return _evaluated(cell, contender, requested, first, second)


def _evaluated(cell: Cell, contender: str, requested: float, first: Path, second: Path) -> dict[str, Any]:
    before = {path.stem: read_journal(path) for path in first.glob("*.jsonl") if not path.stem.startswith("events-")}
    restarted = {path.stem: read_journal(path) for path in second.glob("*.jsonl")}
    newcomer = restarted["newcomer"] if restarted else before["newcomer"]
    contributed = noted(newcomer, "contributed")
    if not contributed["right"]:
        raise JobError(f"{SYSTEMS[contender]}: the newcomer trains from another state than the members had")
    total = contributed["at"] - requested
    found: dict[str, Any] = {}
    if restarted:
        parts = restarted_parts(requested, before["rank0"], restarted)
        ready = requested
    else:
        ready = noted(newcomer, "ready")["at"]
        if contender.startswith("chaos_"):
            events = read_events(str(first / "events-%m.jsonl"))
            active = noted(events, "join_active")
            found["events"] = {key: value for key, value in active.items() if key.endswith("_s")}
            received = noted(events, "shards_received")
            found["sent_bytes"], found["moved_shards"] = received["sources"], received["moved"]
            found["planned_bound_s"] = float(noted(events, "shard_plan")["bound_s"])
            parts = joined_parts(total, active)
        else:
            parts = joined_parts(total, noted(newcomer, "parts"))
    costs = [
        cost([*steps_of(journal), *steps_of(restarted.get(name, []))], requested, ready, contributed["at"])
        for name, journal in sorted(before.items())
        if name != "newcomer"
    ]
    steps = steps_of(before["rank0"])
    return {
        "delay_s": total,
        "parts": parts,
        "ratio": parts["transfer_s"] / cell.bound_s,
        "idle_sum_s": sum(c.idle_s for c in costs),
        "idle_max_s": max(c.idle_s for c in costs),
        "slowed_max_s": max(c.slowed_s for c in costs),
        "steps_meanwhile": min(c.steps for c in costs),
        "step_ms": 1e3 * report.quantile([end - begun for begun, end in steps if end < requested], 0.5),
        **found,
    }


def _limit_s(cell: Cell) -> int:
    """No system needs as long: the slowest is bounded by the slowest link, or by all reading from the storage."""
    return int(90 + 3 * cell.state_bytes / (min(cell.rates_mbit) * 125_000))


def _trained(directory: Path) -> bool:
    steps = steps_of(read_journal(directory / "rank0.jsonl"))
    return len(steps) > _BEFORE_STEPS and steps[-1][1] - steps[0][0] > _BEFORE_S


def _has(path: Path, event: str) -> bool:
    return any(line["event"] == event for line in read_journal(path))


def _wait(condition: Any, limit_s: float, job: Job, what: str) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > limit:
            raise JobError(f"{job.name} did not {what} within {limit_s:.0f} s; {job.output()}")
        time.sleep(_LOOK_S)


def sweep(cells: Sequence[Cell], systems: Sequence[str], repeats: int, seed: int) -> Iterator[dict[str, Any]]:
    """Every join as one record; one that failed has ``error``."""
    rng = random.Random(seed)
    hosts = [*(f"h{i}" for i in range(max(cell.sources for cell in cells))), _NEWCOMER, _STORAGE]
    with TestBed(hosts, rate_mbit=None) as bed, contextlib.closing(Site(bed)) as site:
        for repeat in range(repeats):
            for cell in cells:
                for system in rng.sample(list(systems), len(systems)):
                    rates = cell.rates_mbit
                    source = rng.randrange(cell.sources) if system == "random" else rates.index(max(rates))
                    print(f"{cell.title}: {SYSTEMS[system]}", file=sys.stderr, flush=True)
                    record = {
                        "state_mb": cell.state_mb, "sources": cell.sources, "links": cell.links, "system": system,
                        "repeat": repeat, "source": source if system in ("random", "nearest") else None,
                    }  # fmt: skip
                    yield {**record, **_attempted(site, cell, system, source)}


def _attempted(site: Site, cell: Cell, system: str, source: int) -> dict[str, Any]:
    """What was measured, or ``error``."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        try:
            return measure(site, cell, system, source, Path(scratch))
        except (*jobs.FAILURES, TestBedError) as error:
            return jobs.failed(error)


def main() -> None:
    """Measure, print, write."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--states", type=int, nargs="+", default=[10, 100], metavar="MB",
                        help="sizes of the training state, millions of bytes; 300 and 1000 take longer")  # fmt: skip
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 4, 6], choices=sorted(UNEQUAL),
                        help="members before the join")  # fmt: skip
    parser.add_argument("--links", nargs="+", default=["equal", "unequal"], choices=["equal", "unequal"])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM",
                        help=f"of {', '.join(SYSTEMS)}")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1, help="joins of each system in each setting")
    parser.add_argument("--seed", type=int, default=0, help="of the order, and of EDL's source")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--quick", action="store_true", help="10 MB from 4 sources over unequal links only")
    given = parser.parse_args()
    try:
        check_platform()
    except TestBedError as error:
        parser.exit(1, f"scale_out.py: {error}\n")
    cells = [Cell(s, n, links) for s in given.states for n in given.sources for links in given.links]
    if given.quick:
        cells = [Cell(10, 4, "unequal")]
    report.refuse_unusable(given.out)
    jobs.prepare_driver()
    head = {"benchmark": "scale_out", **report.started()}
    records = report.collected(sweep(cells, given.systems, given.repeats, given.seed))
    rows = [row for row in summarise(cells, records) if row["systems"]]
    result = {**head, "missed": targets(rows), "rows": rows, "records": records}
    report.publish(given.out, result, table, plot, records)


if __name__ == "__main__":
    main()
