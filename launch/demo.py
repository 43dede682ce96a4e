"""The demonstration: a real training job, a real SIGKILL, a rank that joins, one that leaves, and a look at it all.

Run through launch/demo.sh, which installs what it needs first.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from chaos_mpi.events import read_events

ROOT = Path(__file__).resolve().parent
#: The job is over long before; one that is not is ended.
TIME_LIMIT_S = 600.0
#: Steps that the newcomer and all others make together.
SHARED_STEPS = 150
WANTED_ACCURACY_PERCENT = 95.0


def out_of_time(job: subprocess.Popen[str]) -> None:
    """End a job that takes too long."""
    print(f"The demonstration ends its job after {TIME_LIMIT_S:.0f} s: is the machine very busy?", file=sys.stderr)
    job.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--kill-rank", type=int, default=1, help="which rank is killed (0 works as well)")
    parser.add_argument("--kill-at-step", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="where event log and picture go")
    args = parser.parse_args()
    if not 0 <= args.kill_rank < args.ranks or args.ranks < 2:
        parser.error("--kill-rank must be one of at least two ranks")
    args.out.mkdir(parents=True, exist_ok=True)
    log, picture = args.out / "events.jsonl", args.out / "demo.png"
    log.unlink(missing_ok=True)

    command = [program("chaosrun"), "-n", str(args.ranks), "--event-log", str(log)]
    command += [str(ROOT / "examples" / "train_digits.py"), "--epochs", str(args.epochs)]
    print(f"$ chaosrun {' '.join(os.path.relpath(p) if os.path.isabs(p) else p for p in command[1:])}\n", flush=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the job is ended, too
    # One thread for each rank: more would only be in each other's way on a small machine.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": tempfile.mkdtemp(prefix="chaos-demo-")}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    limit = threading.Timer(TIME_LIMIT_S, out_of_time, [job])
    limit.start()
    try:
        accuracy = follow(job, Script(log, environment, args.kill_rank, args.kill_at_step))
        status: int | None = job.wait(timeout=60)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        limit.cancel()
        end(job)
        shutil.rmtree(environment["TMPDIR"], ignore_errors=True)

    print(flush=True)
    if log.exists():
        subprocess.run([program("chaosctl"), "timeline", str(log), "--plot", str(picture)], check=True, timeout=120)
    return judge(status, accuracy, read_events(log) if log.exists() else [], picture)


def program(name: str) -> str:
    """A program of this package, of the environment that runs the demonstration."""
    return str(Path(sys.executable).with_name(name))


class Script:
    """What is done to the job, one thing after the other, each once the event log shows that its time has come."""

    def __init__(self, log: Path, environment: dict[str, str], victim: int, kill_at_step: int) -> None:
        self._log, self._environment = log, environment
        self._victim, self._kill_at_step = victim, kill_at_step
        self._acts = [self._kill, self._add, self._remove]

    def go_on(self) -> None:
        """Do what is due."""
        events = read_events(self._log) if self._log.exists() else []
        if self._acts and self._acts[0](events):
            self._acts.pop(0)

    def _kill(self, events: list[dict[str, Any]]) -> bool:
        if max((e["step"] for e in events if e["event"] == "step"), default=0) < self._kill_at_step:
            return False
        started = (e for e in events if e["event"] == "session_started")
        pid = next(e["pid"] for e in started if e["rank"] == self._victim)
        print(f"\n*** SIGKILL to rank {self._victim} (pid {pid}) ***\n", flush=True)
        os.kill(pid, signal.SIGKILL)
        return True

    def _add(self, events: list[dict[str, Any]]) -> bool:
        if not any(e["event"] == "recovered" for e in events):
            return False
        self._tell("add")
        return True

    def _remove(self, events: list[dict[str, Any]]) -> bool:
        joined_at = next((e["step"] for e in events if e["event"] == "join_active"), None)
        if joined_at is None or max(e["step"] for e in events) < joined_at + SHARED_STEPS:
            return False
        self._tell("remove", "0")
        return True

    def _tell(self, *arguments: str) -> None:
        print(f"\n*** chaosctl {' '.join(arguments)} ***\n", flush=True)
        subprocess.Popen([program("chaosctl"), *arguments], env=self._environment, stdout=subprocess.DEVNULL)


def follow(job: subprocess.Popen[str], script: Script) -> float:
    """Pass the job's output on, do to it what the script says, and return the last accuracy."""
    accuracy = 0.0
    assert job.stdout is not None
    for line in job.stdout:
        print(line, end="", flush=True)
        if found := re.search(r"test accuracy ([\d.]+) %", line):
            accuracy = float(found[1])
        script.go_on()
    return accuracy


def judge(status: int | None, accuracy: float, events: list[dict[str, Any]], picture: Path) -> int:
    """Say whether everything held that the README promises."""
    ended = [e for e in events if e["event"] == "session_ended" and e["outcome"] == "finished"]
    digests = {e["params_digest"] for e in ended}
    if status is None:
        return fail("chaosrun did not end within a minute of its last line")
    if status != 0:
        return fail(f"chaosrun ended with status {status}; what it printed says why")
    if not any(e["event"] == "recovered" for e in events):
        return fail("no rank was killed: the job ended too early; give it more --epochs")
    for wanted in ("join_active", "leave_committed"):
        if not any(e["event"] == wanted for e in events):
            return fail(f"there is no {wanted}: the job ended too early; give it more --epochs")
    if len(digests) != 1:
        return fail(f"the {len(ended)} replicas are not identical: {', '.join(sorted(digests))}")
    if accuracy <= WANTED_ACCURACY_PERCENT:
        return fail(f"the test accuracy is {accuracy:.2f} %, and should be above {WANTED_ACCURACY_PERCENT:.0f} %")
    print(
        f"\nA rank was killed, one joined, one left, and nothing was lost: {len(ended)} replicas are bitwise "
        f"identical, test accuracy {accuracy:.2f} %.\nPicture: {os.path.relpath(picture)}"
    )
    return 0


def fail(reason: str) -> int:
    """Report why the demonstration failed."""
    print(f"\nThe demonstration failed: {reason}.", file=sys.stderr)
    return 1


def end(job: subprocess.Popen[str]) -> None:
    """Leave nothing behind."""
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(timeout=20)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()


if __name__ == "__main__":
    sys.exit(main())
