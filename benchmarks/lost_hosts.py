"""Time that a job on several hosts stands still when it loses hosts, or a link between two of them.

Each job trains the digits example with ``chaosrun --hosts`` on hosts of a network test bed (``launch/testbed``), over
real ssh; then, at a random moment, one thing happens:

    rank killed        SIGKILL; the host stays, and the connections are closed
    host vanishes      power off: its link is dead first, so that nobody is told of anything
    launcher, host     mpirun is killed; a second later a host vanishes
    two hosts vanish   at once; with five hosts or more
    link cut           between two hosts, which all others still reach; a detour over a third one heals it
    link down          by order, as with ``chaosctl link down``: it works, and is not to be used any more

*Detected* is from then until the last survivor knows that somebody has failed, or that the link is cut; *recovered*
until the last survivor has finished the step that was interrupted. Where a host vanishes, both contain the limit for
its silence. No step knows of a link that is put down by order: there it is *recovered* when the last member has heard
of the detour.

    sudo .venv/bin/python benchmarks/lost_hosts.py            # about an hour on two cores; needs root and sshd
    sudo .venv/bin/python benchmarks/lost_hosts.py --quick    # a look: three hosts, each once
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jobs
import psutil
import report
from jobs import JobError
from recovery import EventLogs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from chaos_mpi.cli.control import ask
from launch.testbed.sshd import SshServers, why_not
from launch.testbed.testbed import TestBed, TestBedError, check_platform

if TYPE_CHECKING:
    from rich.table import Table

_ROOT = Path(__file__).resolve().parents[1]
#: What may happen, and from how many hosts on.
KINDS = {
    "rank killed": 3,
    "host vanishes": 3,
    "launcher, host": 3,
    "two hosts vanish": 5,
    "link cut": 3,
    "link down": 3,
}
#: Beyond the limit for silence.
TARGET_MS = 50.0
#: From a cut to a step over the detour; from an order to the detour.
TARGET_LINK_MS = 1000.0
_LIMIT_S = 90.0
_LOOK_S = 0.02
#: Steps that all have made before it happens.
_BEFORE = 20
DIGITS = ("train_digits.py", "--epochs", "1000000")


class HostJob:
    """A job on all hosts of a bed.

    Args:
        bed: the hosts.
        ssh: how to get there.
        limit_s: for silence.
        scratch: a directory for it alone.
        program: the script in ``launch/examples``, and its arguments.
    """

    def __init__(
        self, bed: TestBed, ssh: SshServers, limit_s: float, scratch: Path, program: Sequence[str] = DIGITS
    ) -> None:
        self._bed, self._scratch = bed, scratch
        python = scratch / "python"
        python.write_text(f'#!/bin/sh\nTMPDIR={scratch} PYTHONPATH={_ROOT} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        command = [sys.executable, "-m", "chaos_mpi.cli.chaosrun", "--hosts", ",".join(bed.hosts)]
        command += ["--ssh-args", shlex.join(ssh.command[1:]), "--remote-python", str(python), "--network", bed.subnet]
        command += ["--heartbeat-limit", f"{limit_s:g}", "--event-log", str(scratch / "%m.jsonl")]
        command += ["--restarts", "0"]
        command += ["--log-dir", str(scratch / "logs")]
        command += [str(_ROOT / "launch" / "examples" / program[0]), *program[1:]]
        self._output = (scratch / "output").open("w+b")
        environ = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT, cwd=scratch
        )
        self.logs = EventLogs(scratch)
        self.pids: dict[str, int] = {}

    def __enter__(self) -> HostJob:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        self._process.kill()
        self._process.wait()
        for host in self._bed.hosts:
            for pid in self._bed.pids(host):
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if "sshd" not in process.name():
                        process.kill()
        self._output.close()

    def wait_for_training(self, least: int = _BEFORE) -> None:
        """Return when all ranks have made so many steps."""
        hosts = len(self._bed.hosts)

        def trained() -> bool:
            if self._process.poll() is not None:
                raise JobError(f"chaosrun ended with {self._process.returncode}; {self._last_words()}")
            events = self.logs.events()
            started = [e for own in events.values() for e in own if e["event"] == "session_started"]
            self.pids = {event["host"]: event["pid"] for event in started}
            steps = [max((e["step"] for e in own), default=0) for own in events.values()]
            return len(steps) == hosts and min(steps) >= least

        self.wait(trained, "all ranks train")

    def survived(self, since: float, survivors: Sequence[str]) -> dict[str, float]:
        """When the last of these had detected the failure and had recovered, ms after ``since``."""
        pids = [self.pids[host] for host in survivors]

        def first(name: str) -> list[float]:
            events = self.logs.events()
            times = ([e["mono"] for e in events[pid] if e["event"] == name and e["mono"] > since] for pid in pids)
            return [min(own) for own in times if own]

        self.wait(lambda: len(first("recovered")) == len(pids), "all survivors recovered")
        return {name: 1e3 * (max(first(event)) - since) for name, event in _TIMES.items()}

    def went_on(self, since: float) -> dict[str, float]:
        """When the last member knew of a cut link, and had finished the step after its longest pause, ms later."""
        pids = list(self.pids.values())

        def times(pid: int, name: str, **fields: str) -> list[float]:
            own = self.logs.events()[pid]
            chosen = (e for e in own if e["event"] == name and all(e[k] == v for k, v in fields.items()))
            return [e["mono"] for e in chosen if e["mono"] > since]

        def healed(pid: int) -> bool:
            detours = times(pid, "link_changed", state="detour")
            return bool(detours) and sum(t > detours[0] for t in times(pid, "step")) >= _BEFORE

        self.wait(lambda: all(healed(pid) for pid in pids), "all members train on over a detour")
        ends = []
        for pid in pids:
            steps = [since, *times(pid, "step")]
            ends.append(max(itertools.pairwise(steps), key=lambda pause: pause[1] - pause[0])[1])
        known = [times(pid, "link_changed", state="cut") or times(pid, "link_changed", state="detour") for pid in pids]
        return {"detected_ms": 1e3 * (max(t[0] for t in known) - since), "recovered_ms": 1e3 * (max(ends) - since)}

    def order_down(self, one: str, other: str) -> None:
        """Have a link not be used any more, as ``chaosctl link down`` does."""
        socket = next(self._scratch.rglob("control-*.sock"))
        (answer,) = ask(socket.parent, {"do": "link", "a": one, "b": other, "down": True}, limit_s=10.0)
        if answer["reason"]:
            raise JobError(answer["reason"])

    def obeyed(self, since: float) -> dict[str, float]:
        """When the last member had heard that a link is down, and that there is a detour, ms after ``since``."""

        def heard(state: str) -> list[float]:
            told = ([e["mono"] for e in own if e["event"] == "link_changed" and e["state"] == state]
                    for own in self.logs.events().values())  # fmt: skip
            return [times[0] for times in told if times]

        self.wait(lambda: len(heard("detour")) == len(self.pids), "all members have heard of the detour")
        return {"detected_ms": 1e3 * (max(heard("down")) - since), "recovered_ms": 1e3 * (max(heard("detour")) - since)}

    def kill_launcher(self) -> None:
        """End ``mpirun`` without a word."""
        for child in psutil.Process(self._process.pid).children():
            child.kill()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Look until it holds.

        Raises:
            JobError: that takes too long; with the job's last words.
        """
        limit = time.monotonic() + _LIMIT_S
        while not condition():
            if time.monotonic() > limit:
                raise JobError(f"waited {_LIMIT_S:.0f} s until {what}; {self._last_words()}")
            time.sleep(_LOOK_S)

    def _last_words(self) -> str:
        said = Path(self._output.name).read_text(errors="replace").strip().splitlines()[-10:]
        return "the job's last words:\n" + "\n".join(said)


_TIMES = {"detected_ms": "failure_detected", "recovered_ms": "recovered"}


def happen(kind: str, bed: TestBed, job: HostJob, rng: random.Random) -> tuple[float, list[str]]:
    """Let it happen; returns when, on the monotonic clock, and which hosts are left."""
    lost = rng.sample(bed.hosts, 2 if kind in ("two hosts vanish", "link cut", "link down") else 1)
    if kind == "launcher, host":
        job.kill_launcher()
        time.sleep(1.0)
    began = time.monotonic()
    if kind == "link cut":
        bed.cut(*lost)
        return time.monotonic(), bed.hosts
    if kind == "link down":
        job.order_down(*lost)
        return began, bed.hosts
    if kind == "rank killed":
        os.kill(job.pids[lost[0]], signal.SIGKILL)
    else:
        for host in lost:
            bed.power_off(host)
    return began, [host for host in bed.hosts if host not in lost]


def measure(kind: str, hosts: int, limit_s: float, rng: random.Random) -> dict[str, Any]:
    """One failure of one job."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        names = [f"h{i}" for i in range(hosts)]
        try:
            with (
                TestBed(names, rate_mbit=None) as bed,
                SshServers(bed, scratch) as ssh,
                HostJob(bed, ssh, limit_s, scratch) as job,
            ):
                job.wait_for_training()
                time.sleep(rng.random())
                began, survivors = happen(kind, bed, job, rng)
                if kind.startswith("link"):
                    return job.went_on(began) if kind == "link cut" else job.obeyed(began)
                return job.survived(began, survivors)
        except (*jobs.FAILURES, TestBedError) as error:
            return jobs.failed(error)


def sweep(
    kinds: Sequence[str], sizes: Sequence[int], repeats: int, limit_s: float, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Every failure as one record, in shuffled order."""
    cells = [(kind, size) for kind in kinds for size in sizes if size >= KINDS[kind]] * repeats
    for kind, size in rng.sample(cells, len(cells)):
        print(f"{size} hosts: {kind}", file=sys.stderr, flush=True)
        yield {"kind": kind, "hosts": size, **measure(kind, size, limit_s, rng)}


def summarise(records: Sequence[dict[str, Any]], limit_s: float) -> list[dict[str, Any]]:
    """Medians and more of every cell, and whether the target is met."""
    rows = []
    for kind in KINDS:
        for size in sorted({r["hosts"] for r in records}):
            cell = [r for r in records if (r["kind"], r["hosts"]) == (kind, size) and "error" not in r]
            if not cell:
                continue
            figures = {name: report.summary([r[name] for r in cell]) for name in _TIMES}
            allowed = TARGET_MS + (0.0 if kind == "rank killed" else 1e3 * limit_s)
            allowed = TARGET_LINK_MS if kind.startswith("link") else allowed
            met = figures["recovered_ms"]["median"] <= allowed
            rows.append({"kind": kind, "hosts": size, **figures, "target_ms": allowed, "met": met})
    return rows


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.table import Table

    shown = Table(title=f"from the loss to the last survivor, ms; silence is allowed for {result['limit_s']:g} s")
    for name in ("what happens", "hosts", "n", "detected", "recovered", "worst", "target"):
        shown.add_column(name, justify="left" if name == "what happens" else "right")
    for row in result["rows"]:
        shown.add_row(
            row["kind"], str(row["hosts"]), str(row["recovered_ms"]["n"]), f"{row['detected_ms']['median']:.0f}",
            f"{row['recovered_ms']['median']:.0f}", f"{row['recovered_ms']['max']:.0f}",
            f"{row['target_ms']:.0f} {'met' if row['met'] else 'MISSED'}",
        )  # fmt: skip
    show(shown, result["records"])


def plot(result: dict[str, Any], path: Path) -> None:
    """Every failure as a point, by kind and number of hosts."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, kind in enumerate(KINDS):
        points = [r for r in result["records"] if r["kind"] == kind and "error" not in r]
        shift = (index - 2) * 0.12
        axis.plot([r["hosts"] + shift for r in points], [r["recovered_ms"] for r in points], ".", label=kind)
    axis.axhline(1e3 * result["limit_s"], color="C7", linestyle="--", label="limit for silence")
    axis.set(xlabel="hosts", ylabel="ms until the last survivor has recovered", ylim=(0, None))
    axis.set_xticks(sorted({r["hosts"] for r in result["records"]}))
    axis.legend(fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def refuse_without_bed(parser: argparse.ArgumentParser) -> None:
    """End the script where there can be no hosts with ssh."""
    try:
        check_platform()
    except TestBedError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if (reason := why_not()) is not None:
        parser.exit(1, f"{parser.prog}: {reason}\n")


def show(shown: Table, records: Sequence[dict[str, Any]]) -> None:
    """Print a table, and which jobs are not in it."""
    from rich.console import Console

    console = Console()
    console.print(shown)
    if failures := [r for r in records if "error" in r]:
        console.print(f"jobs that failed: {failures}")


def main() -> None:
    """Measure, print, write."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--hosts", type=int, nargs="+", default=[3, 4, 5, 6], help="numbers of hosts")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS], help="what happens")
    parser.add_argument("--repeats", type=int, default=5, help="failures of each kind at each number of hosts")
    parser.add_argument("--heartbeat-limit", type=float, default=0.5, metavar="S", help="for silence")
    parser.add_argument("--seed", type=int, default=0, help="of the order, the moments, and who is lost")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--quick", action="store_true", help="three hosts, each kind once")
    given = parser.parse_args()
    refuse_without_bed(parser)
    report.refuse_unusable(given.out)
    jobs.prepare_driver()
    sizes, repeats = ([3], 1) if given.quick else (given.hosts, given.repeats)
    head = {"benchmark": "lost_hosts", **report.started(), "limit_s": given.heartbeat_limit}
    records = report.collected(sweep(given.kinds, sizes, repeats, given.heartbeat_limit, random.Random(given.seed)))
    result = {**head, "rows": summarise(records, given.heartbeat_limit), "records": records}
    report.publish(given.out, result, table, plot, records)


if __name__ == "__main__":
    main()
