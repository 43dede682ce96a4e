"""Jobs whose ranks are started by proxies, for the tests of what becomes of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos_mpi.agent.environment import LAUNCHER_SETTINGS, network_settings

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(__file__).with_name("agent_program.py"))
LIMIT_S = 60.0


def wait_for(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


class Job:
    """``mpirun`` with a proxy for each rank.

    Args:
        directory: for all that the job leaves; ``launcher`` in it is for ``mpirun``.
        ranks: how many.
        network: what Open MPI is to use.
        where: options of the proxies that say where the ranks are.
        way: options that say how to get there.
    """

    def __init__(self, directory: Path, ranks: int, network: str, where: Sequence[str], way: Sequence[str]) -> None:
        self.directory = directory / "job"
        self.directory.mkdir()
        self.logs, self.proxies = directory / "logs", directory / "proxies"
        self.proxies.mkdir()
        self._way = list(way)
        self._output = (directory / "output").open("w+")
        command = [str(Path(sys.executable).with_name("mpirun")), "--with-ft", "ulfm", "-n", str(ranks)]
        command += ["--oversubscribe", "--bind-to", "none"]
        if os.geteuid() == 0:
            command.append("--allow-run-as-root")
        settings = network_settings(network) | {"pml": "ob1", "coll": "^han,hcoll,portals4,cuda"}
        for name, value in settings.items():
            command += ["--mca", name, value]
        environ = os.environ | LAUNCHER_SETTINGS | {"PYTHONPATH": str(ROOT), "SECRET": "x", "CHAOS_TEST": "y"}
        environ["PRTE_MCA_prte_tmpdir_base"] = str(directory / "launcher")
        self.mpirun = subprocess.Popen(
            [*command, *self.proxy(*where)], env=environ, stdout=self._output, stderr=self._output
        )

    def proxy(self, *where: str) -> list[str]:
        argv = [sys.executable, "-P", "-m", "chaos_mpi.agent.proxy", *where, *self._way]
        argv += ["--log-dir", str(self.logs), "--register", str(self.proxies)]
        return [*argv, "--", sys.executable, PROGRAM, str(self.directory)]

    def events(self, rank: int | str, event: str) -> list[dict[str, object]]:
        path = self.directory / f"{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def up(self, rank: int | str) -> dict[str, object]:
        wait_for(f"rank {rank}; output: {self.output()}", lambda: self.events(rank, "up"))
        return self.events(rank, "up")[0]

    def wait_for_sums(self, rank: int | str, more: int = 20) -> None:
        """Wait until a rank has done so many more sums."""
        before = self._sums(rank)
        wait_for(f"sums of rank {rank}", lambda: self._sums(rank) >= before + more)

    def wait_for_event(self, rank: int | str, event: str) -> dict[str, object]:
        wait_for(f"{event} of rank {rank}", lambda: self.events(rank, event))
        return self.events(rank, event)[-1]

    def stop(self) -> None:
        (self.directory / "stop").touch()

    def output(self) -> str:
        self._output.flush()
        return Path(self._output.name).read_text()

    def _sums(self, rank: int | str) -> int:
        found = self.events(rank, "sums")
        return int(str(found[-1]["sums"])) if found else 0

    def close(self) -> None:
        self.stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.mpirun.wait(10)
        self.mpirun.kill()
        self.mpirun.wait()
        self._output.close()


def pid_in(job: Job, rank: int | str) -> int:
    """Process id of a rank; hosts of a bed share the numbers."""
    return int(str(job.up(rank)["pid"]))


def give(job: Job, order: str, content: object) -> None:
    """Put an order where the ranks see it, at once and whole."""
    new = job.directory / "new"
    new.write_text(json.dumps(content))
    new.rename(job.directory / order)
