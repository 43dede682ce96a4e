"""Jobs of proxies, supervisors and ranks without MPI, whose agents watch each other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chaos_mpi.agent.processes import is_running, start_time

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "faults" / "watched_program.py"
LIMIT_S = 40.0


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """Wait until the condition gives something, and return that."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)
    return found


class Rank:
    """One rank with its proxy, which this process starts in the place of mpirun."""

    def __init__(self, job: WatchedJob, namespace: str, number: int, where: Sequence[str]) -> None:
        self._file = job.directory / f"rank-{number}.jsonl"
        environ = os.environ | {
            "PYTHONPATH": str(ROOT), "PMIX_NAMESPACE": namespace, "PMIX_RANK": str(number)
        }  # fmt: skip
        command = [
            sys.executable, "-P", "-m", "chaos_mpi.agent.proxy", *where, *job.options, "--register", str(job.register),
            "--log-dir", str(job.directory / "logs"), "--heartbeat-limit", "2", "--wdir", str(job.directory),
            "--", sys.executable, "-P", str(PROGRAM), str(job.directory),
        ]  # fmt: skip
        self.log = job.directory / f"proxy-{number}.log"
        with self.log.open("wb") as log:
            self.proxy = subprocess.Popen(command, env=environ, stdout=log, stderr=log)

    def told(self, event: str) -> list[Any]:
        """What the rank has written down of this kind."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [entry[event] for entry in map(json.loads, lines) if event in entry]

    def wait_for(self, event: str, count: int = 1) -> Any:
        """The last of so many entries of this kind."""
        return wait_for(
            f"{event} in {self._file}: {self.log.read_text()}", lambda: self.told(event)[count - 1 : count]
        )[0]

    @property
    def member(self) -> str:
        return str(self.wait_for("ready"))


class WatchedJob:
    """All ranks of a job, which end with it.

    Args:
        directory: for all that is written.
        hosts: of the first ranks.
        options: of the proxies: how to get to the hosts.
    """

    def __init__(self, directory: Path, hosts: Sequence[str], options: Sequence[str]) -> None:
        self.directory, self.register, self.options = directory, directory / "chaosrun-register", tuple(options)
        self.register.mkdir(mode=0o700)
        self._stack = contextlib.ExitStack()
        where = ("--hosts", ",".join(hosts))
        self.ranks = [Rank(self, "job@1", number, where) for number in range(len(hosts))]

    def add(self, host: str) -> Rank:
        """A newcomer."""
        rank = Rank(self, f"job@{len(self.ranks)}", len(self.ranks), ("--host", host))
        self.ranks.append(rank)
        return rank

    def ask(self, *members: str) -> None:
        """Have all ranks ask whether they may go on without these."""
        new = self.directory / "ask.new"
        new.write_text(" ".join(members) + "\n")
        new.rename(self.directory / "ask")

    def stop(self) -> None:
        """Have all ranks end."""
        (self.directory / "stop").touch()

    def close(self) -> None:
        """End what is left."""
        self.stop()
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.proxy.wait(10)
            rank.proxy.kill()
            rank.proxy.wait()


class Processes:
    """A rank and its supervisor on this machine, as processes."""

    def __init__(self, member: str) -> None:
        self.rank = int(member.rpartition(":")[2])
        self.supervisor = int(Path(f"/proc/{self.rank}/stat").read_text().rpartition(")")[2].split()[1])
        self._started = {pid: start_time(pid) for pid in (self.rank, self.supervisor)}

    def signal(self, number: signal.Signals) -> None:
        """To both, the supervisor first: with it stopped nobody tells the rank anything."""
        for pid in (self.supervisor, self.rank):
            os.kill(pid, number)

    def kill_rank(self) -> None:
        """As if it had crashed."""
        os.kill(self.rank, signal.SIGKILL)

    @property
    def live(self) -> bool:
        """Whether one of them does."""
        return any(is_running(pid, started) for pid, started in self._started.items())
