"""Jobs under measurement: started, given turns, and ended whatever happens.

The driver listens on a socket of its own; every rank connects to it, says who it is, and then does what the
driver asks, one request at a time. While a rank has nothing to do it sleeps in ``recv`` and takes no
processor time. So several jobs can be up at the same time and take turns, seconds apart, which is what makes
a comparison on a noisy machine fair.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from chaos_mpi.mpi.launch import LAUNCHER_NOT_UP, mpirun_command

SOCKET_VARIABLE = "BENCH_SOCKET"
SPEC_VARIABLE = "BENCH_SPEC"
#: What ``--with-ft ulfm`` selects beside fault tolerance itself (Open MPI's ``amca-param-sets/ft-mpi``), as far as
#: the package's own settings do not select it anyway.
_ULFM_SELECTION = {"mtl": "^ofi,portals4,psm2", "threads": "pthreads"}


class JobError(RuntimeError):
    """A job under measurement did not do what it was asked to."""


#: What a job that goes wrong can raise in the driver: besides, a process or a line that should be there is not.
FAILURES = (JobError, LookupError, OSError, psutil.Error)


def failed(error: BaseException) -> dict[str, Any]:
    """The record of a job that has raised one of :data:`FAILURES`, after a line on the terminal."""
    print(f"  {error!r}" if not isinstance(error, JobError) else f"  {error}", file=sys.stderr)
    return {"error": (str(error) or repr(error)).splitlines()[0]}


class Link:
    """One end of the connection between the driver and a rank: JSON objects, one to a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one object."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, limit_s: float | None = None) -> dict[str, Any]:
        """The next object.

        Raises:
            EOFError: the other end is gone.
            TimeoutError: nothing came within ``limit_s`` seconds.
        """
        end = None if limit_s is None else time.monotonic() + limit_s
        while b"\n" not in self._rest:
            self._socket.settimeout(None if end is None else max(end - time.monotonic(), 0.001))
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise EOFError("the other end is gone")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def join_driver() -> tuple[Link, dict[str, Any]]:
    """In a rank: connect to the driver. Returns the link and what this job is to be."""
    spec: dict[str, Any] = json.loads(os.environ[SPEC_VARIABLE])
    # Should the driver be killed, this rank must not stay behind.
    signal.alarm(int(spec["limit_s"]))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SOCKET_VARIABLE])
    return Link(connection), spec


class Job:
    """A group of ranks. Use as a context manager: its processes are gone at the end of the block.

    Args:
        name: for messages.
        commands: given the job's private directory, the processes to start (one ``mpirun``, or one process for
            each rank), each with what it needs in its environment.
        ranks: how many ranks will connect.
        spec: told to every rank; ``limit_s`` in it bounds a rank's whole life.
        start_limit_s: how long the ranks may take to connect and say they are ready.
    """

    def __init__(
        self,
        name: str,
        commands: Callable[[Path], Sequence[tuple[Sequence[str], Mapping[str, str]]]],
        ranks: int,
        spec: Mapping[str, Any],
        start_limit_s: float = 120.0,
    ) -> None:
        self.name, self.ranks, self.spec = name, ranks, dict(spec)
        self._commands, self._start_limit_s = commands, start_limit_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._started: list[tuple[list[str], dict[str, str]]] = []
        self._starts_left = 3
        self._directory = tempfile.TemporaryDirectory(prefix="bench-")
        self._listener = socket.socket(socket.AF_UNIX)
        self._members: list[psutil.Process] = []
        self._output = (Path(self._directory.name) / "output").open("wb")
        self.links: dict[int, Link] = {}
        self.hellos: dict[int, dict[str, Any]] = {}

    @property
    def directory(self) -> Path:
        """A private directory that lives as long as the job."""
        return Path(self._directory.name)

    def __enter__(self) -> Self:
        self.begin()
        try:
            self.wait_ready()
        except BaseException:
            self.end()
            raise
        return self

    def begin(self) -> None:
        """Start the processes; :meth:`wait_ready` must follow."""
        path = self.directory / "socket"
        self._listener.bind(str(path))
        self._listener.listen(self.ranks)
        told = {SOCKET_VARIABLE: str(path), SPEC_VARIABLE: json.dumps(self.spec)}
        atexit.register(self.end)
        self._started = [(list(command), {**environ, **told}) for command, environ in self._commands(self.directory)]
        self._processes = [self._start(*started) for started in self._started]

    def _start(self, command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _start_again(self) -> bool:
        """Once more start what ``mpirun`` could not, if that is why it has ended."""
        failed = [i for i, process in enumerate(self._processes) if process.poll() == LAUNCHER_NOT_UP]
        for i in failed:
            self._processes[i] = self._start(*self._started[i])
        self._starts_left -= 1
        return bool(failed) and self._starts_left > 0

    def wait_ready(self) -> None:
        """Return when every rank has connected and said hello.

        Raises:
            JobError: a process ended early, or the ranks took too long.
        """
        end = time.monotonic() + self._start_limit_s
        waiting: list[Link] = []
        while len(self.links) < self.ranks:
            if time.monotonic() > end:
                raise JobError(
                    f"{self.name}: {len(self.links)} of {self.ranks} ranks are ready in time; {self.output()}"
                )
            if any(p.poll() is not None for p in self._processes) and not self._start_again():
                raise JobError(f"{self.name}: a process ended while the job started; {self.output()}")
            with selectors.DefaultSelector() as selector:
                sources: list[socket.socket | Link] = [self._listener, *waiting]
                for source in sources:
                    selector.register(source.fileno(), selectors.EVENT_READ, source)
                events = selector.select(0.5)
            for key, _ in events:
                if isinstance(key.data, Link):
                    waiting.remove(key.data)
                    hello = self._heard(key.data, 5.0)
                    self.links[hello["rank"]] = key.data
                    self.hellos[hello["rank"]] = hello
                    self._members.append(psutil.Process(hello["pid"]))
                else:
                    waiting.append(Link(self._listener.accept()[0]))

    def ask(self, request: Mapping[str, Any], limit_s: float) -> list[dict[str, Any]]:
        """Send ``request`` to every rank and return their answers in rank order.

        Raises:
            JobError: a rank ended or did not answer within ``limit_s`` seconds.
        """
        for link in self.links.values():
            link.send(request)
        end = time.monotonic() + limit_s
        return [self._heard(self.links[r], end - time.monotonic()) for r in sorted(self.links)]

    def output(self) -> str:
        """The last lines the job printed."""
        self._output.flush()
        text = Path(self._output.name).read_text(encoding="utf-8", errors="replace").strip()
        return "its output ends with:\n" + "\n".join(text.splitlines()[-30:]) if text else "it printed nothing"

    def end(self) -> None:
        """Hang up, and see that every process of the job is gone."""
        family = [*self._members, *_family(self._processes)]
        for link in self.links.values():
            link.close()
        self.links.clear()
        self._listener.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(8.0)
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()
        psutil.wait_procs(family, 5.0)
        self._output.close()
        self._directory.cleanup()
        atexit.unregister(self.end)  # and not before: Ctrl-C may end this as well

    def __exit__(self, *_: object) -> None:
        self.end()

    def _heard(self, link: Link, limit_s: float) -> dict[str, Any]:
        try:
            return link.receive(limit_s)
        except TimeoutError as error:
            raise JobError(f"{self.name}: a rank did not answer in time; {self.output()}") from error
        except (EOFError, ConnectionError) as error:
            time.sleep(0.5)  # for the reason to reach the output
            raise JobError(f"{self.name}: a rank ended; {self.output()}") from error


@contextlib.contextmanager
def started_together(jobs: Sequence[Job]) -> Iterator[None]:
    """All jobs up at once; they start at the same time, and all end with the block."""
    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.callback(job.end)
            job.begin()
        for job in jobs:
            job.wait_ready()
        yield


def prepare_driver() -> None:
    """One thread for each rank; SIGTERM and SIGHUP end the driver as Ctrl-C does, so that its jobs end, too."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: sys.exit(128 + n))


def mpirun(script: Path, ranks: int, *, fault_tolerant: bool) -> tuple[list[str], dict[str, str]]:
    """One ``mpirun`` for all ranks.

    Args:
        fault_tolerant: as ``chaosrun`` starts it; else without ULFM, and with the same transport otherwise.
    """
    command = mpirun_command(ranks, [sys.executable, str(script)])
    if not fault_tolerant:
        at = command.index("--with-ft")
        del command[at : at + 2]
        for name, value in _ULFM_SELECTION.items():
            command[at:at] = ["--mca", name, value]
    return command, {}


def gloo_commands(script: Path, ranks: int, rendezvous: Path) -> list[tuple[list[str], dict[str, str]]]:
    """One process for each rank, meeting through a file, talking over the loopback interface."""
    return [
        (
            [sys.executable, str(script)],
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "BENCH_RENDEZVOUS": rendezvous.as_uri(),
                "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for rank in range(ranks)
    ]


def _family(processes: Sequence[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    family: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(process.pid)
            family += [*top.children(recursive=True), top]
    return family
