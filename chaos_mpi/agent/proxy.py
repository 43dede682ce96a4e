"""What ``mpirun`` sees as a rank: starts the real one where it belongs, and behaves as it does.

``python -m chaos_mpi.agent.proxy [--host HOST] -- COMMAND ...`` in the place of a rank's command line, for ``mpirun``
and for ``MPI_Comm_spawn``. The loss of a host is then the loss of a process to ``mpirun``, whose own daemons, which
it cannot lose, are not on other hosts at all. The rank itself is in the hands of a :mod:`chaos_mpi.agent.supervisor`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import select
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaos_mpi.agent.control import ControlListener
from chaos_mpi.agent.crashes import how_ended
from chaos_mpi.agent.dialling import Dialling, Errors
from chaos_mpi.agent.environment import SESSION_DIRECTORY, carried, server_endpoint
from chaos_mpi.agent.frames import MAGIC, Decoder, Frame, Kind, encode, encode_json
from chaos_mpi.agent.home import CRASH, LOST, RECORDS, TOLD, note_down
from chaos_mpi.agent.liaison import Liaison
from chaos_mpi.agent.placement import Placement, parser, placement_of, supervisor_command
from chaos_mpi.agent.processes import die_with_parent, end_like, start_time
from chaos_mpi.agent.registry import note_end, register
from chaos_mpi.agent.relay import Upstream
from chaos_mpi.agent.spawning import join_of
from chaos_mpi.errors import ChaosError

log = logging.getLogger("chaos_mpi.agent")

#: How long the last word to a supervisor may take.
FAREWELL_LIMIT_S = 5.0
#: How often it is looked whether mpirun is there. Not every Python has ``os.pidfd_open``, nor every kernel.
_PARENT_PERIOD_S = 0.05
#: Exit status when the rank could not be started.
EXIT_NOT_STARTED = 1
#: Tells this process to have the rank killed, and then end.
KILL_SIGNAL = signal.SIGALRM
_CHUNK_BYTES = 1 << 16
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_ENDS = (*_ENDING, signal.SIGKILL)
_FORWARDED = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2)


def order(
    placement: Placement, argv: Sequence[str], environ: Mapping[str, str], terminal: bool, job: str | None = None
) -> dict[str, Any]:
    """What the supervisor is told to run. Secrets may be in the environment, so it is never on a command line.

    Args:
        job: name of the job's private directory; None: it has none.
    """
    launcher = os.getppid()
    return {
        "argv": list(argv),
        "environ": dict(environ) if not placement.remote else carried(environ, placement.export),
        "directory": placement.directory or os.getcwd(),
        "prefix": sys.prefix,
        "python": sys.executable,
        "launcher": [launcher, start_time(launcher)] if not placement.remote else None,
        "log_directory": placement.log_directory,
        "terminal": terminal,
        "job": job,
        "host": placement.host,
        "neighbours": placement.neighbours,
        "watch": None if placement.watch is None else placement.watch.to_json(),
    }


class Proxy:
    """One rank elsewhere, as seen by ``mpirun``.

    Args:
        placement: where it is.
        argv: its command.
        environ: the environment that ``mpirun`` gave this process.
        run_dir: the job's private directory on this host, if it has one.
        liaison: what it does for the watch over the nodes; None where there is none.

    Attributes:
        failure: why the rank was not started; empty if it was.
    """

    def __init__(
        self,
        placement: Placement,
        argv: Sequence[str],
        environ: Mapping[str, str],
        run_dir: Path | None = None,
        liaison: Liaison | None = None,
    ) -> None:
        self._placement, self._argv, self._environ, self._run_dir = placement, argv, environ, run_dir
        self._liaison = liaison
        self._control: ControlListener | None = None
        self._decoder = Decoder()
        self._process: asyncio.subprocess.Process | None = None
        self._errors: Errors | None = None
        self._told_to_end = asyncio.Event()
        self._status: int | None = None
        self._refused: str | None = None
        self.failure = ""
        server = server_endpoint(environ)
        self._upstream = Upstream(server, self._send) if server is not None else None

    async def run(self) -> int:
        """Run the rank; returns how this process is to end: a status, or a negated signal number."""
        try:
            return await self._run()
        finally:
            self._close_errors()

    async def _run(self) -> int:
        watching = asyncio.create_task(_parent_ends(os.getppid()))
        command = supervisor_command(self._placement)
        dialling = Dialling()
        while True:
            try:
                await self._start(command)
            except OSError as error:
                return self._fail(f"'{command[0]}' cannot be run: {error.strerror}")
            reading = asyncio.create_task(self._read())
            await asyncio.wait({reading, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() or not await self._tries_again(reading, dialling, watching):
                break
        launcher_gone = watching.done()
        watching.cancel()
        if self._control is not None:
            await self._control.close()
        if launcher_gone:
            return await self._farewell(reading)
        if (failure := reading.exception()) is not None:
            return await self._break_off(failure)
        return await self._outcome(command)

    async def _start(self, command: Sequence[str]) -> None:
        """Start the supervisor, and tell it what to run.

        Raises:
            OSError: the command cannot be run.
        """
        remote = self._placement.remote
        self._close_errors()
        self._decoder = Decoder()
        self._errors = Errors(lambda data: _write(2, data)) if remote else None
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
                stderr=None if self._errors is None else self._errors.theirs,
                preexec_fn=die_with_parent(signal.SIGTERM) if remote else None,
            )  # fmt: skip
        finally:
            if self._errors is not None:
                self._errors.started()
        loop = asyncio.get_running_loop()
        for number in _FORWARDED:
            loop.add_signal_handler(number, self._forward, number)
        loop.add_signal_handler(KILL_SIGNAL, self._forward, signal.SIGKILL)
        assert self._process.stdin is not None
        job = self._run_dir.name if self._run_dir is not None else None
        message = order(self._placement, self._argv, self._environ, os.isatty(1), job)
        self._process.stdin.write(MAGIC + encode_json(Kind.START, message))

    async def _tries_again(self, reading: asyncio.Task[None], dialling: Dialling, watching: asyncio.Task[None]) -> bool:
        """After a pause: whether the host is to be tried once more, as the way broke before anything was said."""
        if self._errors is None or self._decoder.begun or reading.exception() is not None:
            return False
        assert self._process is not None
        status = await self._process.wait()
        self._close_errors()
        pause_s = dialling.pause_s(status, self._errors.said)
        if pause_s is None or self._told_to_end.is_set():
            return False
        log.warning("the connection to %s was dropped at its beginning; it is tried again", self._where())
        told = asyncio.create_task(self._told_to_end.wait())
        await asyncio.wait({told, watching}, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        return not (self._told_to_end.is_set() or watching.done())

    def _close_errors(self) -> None:
        if self._errors is not None:
            self._errors.close()

    async def _break_off(self, error: BaseException) -> int:
        """What comes from the other side is not understood: end the rank, of which nothing more will be heard."""
        assert self._process is not None
        self._forward(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), FAREWELL_LIMIT_S)
        return self._fail(f"{error}" or type(error).__name__)

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while data := await self._process.stdout.read(_CHUNK_BYTES):
            noise, frames = self._decoder.feed(data)
            _write(2, noise)
            for frame in frames:
                await self._heed(frame)
        _write(2, b"" if self._decoder.begun else self._decoder.rest())

    async def _heed(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.STDOUT:
                _write(1, frame.content)
            case Kind.STDERR:
                _write(2, frame.content)
            case Kind.EXIT:
                self._status = int(frame.json())
                if self._told_to_end.is_set():
                    self._note_own(TOLD)
            case Kind.TOLD if frame.json() in _ENDS:
                self._note_own(TOLD)
            case Kind.REFUSED:
                self._refused = str(frame.json())
            case Kind.RECORD:
                await self._note(**frame.json())
            case Kind.CONTROL_DATA | Kind.CONTROL_CLOSE if self._control is not None:
                self._control.deliver(frame)
            case Kind.OPEN | Kind.DATA | Kind.CLOSE if self._upstream is not None:
                self._upstream.deliver(frame)
            case Kind.CONTACT | Kind.FENCE if self._liaison is not None:
                self._liaison.heed(frame, self._write)
            case _:
                pass

    async def _note(self, kind: str, fields: dict[str, Any]) -> None:
        """Write down here what the rank has written down there: to the launcher, this process is the rank."""
        if self._run_dir is None or kind not in (*RECORDS, CRASH):
            return
        try:
            note_down(self._run_dir, kind, fields)
        except OSError as error:
            log.warning("could not write to %s for chaosrun: %s", self._run_dir, error)
        if kind == "member" and self._control is None:
            self._control = ControlListener(self._run_dir / f"control-{os.getpid()}.sock", self._send)
            try:
                await self._control.open()
            except OSError as error:
                log.warning("chaosctl cannot reach %s from here: %s", self._where(), error)

    def _note_own(self, kind: str) -> None:
        """Write down something of the way to the rank's host."""
        if self._run_dir is not None:
            with contextlib.suppress(OSError):
                note_down(self._run_dir, kind, {"host": self._where()})

    async def _outcome(self, command: Sequence[str]) -> int:
        """How to end, when nothing more comes from the supervisor."""
        assert self._process is not None
        if self._status is not None:
            return self._status
        if self._refused is not None:
            return self._fail(self._refused)
        status = await self._process.wait()
        if self._decoder.begun:
            log.error("the connection to %s is lost; its rank counts as dead", self._where())
            if self._placement.remote:
                self._note_own(LOST)
            return -signal.SIGKILL
        return self._fail(f"'{shlex.join(command)}' ended with status {status} before the rank was started; see above")

    async def _farewell(self, reading: asyncio.Task[None]) -> int:
        """``mpirun`` has gone: tell the supervisor, and leave when it has heard, which ends ssh as well.

        Nobody waits for this process any more.
        """
        if ended_in_good_order(self._environ):
            # So ends a job with fault tolerance that a rank aborts: the ranks are not told, but lose their server.
            self._forward(signal.SIGKILL)
        else:
            self._send(Frame(Kind.LAUNCHER_LOST))
        await asyncio.wait({reading}, timeout=FAREWELL_LIMIT_S)
        return 0

    def _forward(self, number: int) -> None:
        if number in _ENDS:
            self._told_to_end.set()
        self._write(encode_json(Kind.SIGNAL, number))

    def _send(self, frame: Frame) -> None:
        self._write(encode(frame))

    def _write(self, data: bytes) -> None:
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(data)

    def _fail(self, reason: str) -> int:
        self.failure = f"it cannot be started on {self._where()}: {reason}"
        log.error("rank %s: %s", self._environ.get("PMIX_RANK", "?"), self.failure)
        return EXIT_NOT_STARTED

    def _where(self) -> str:
        return self._placement.host or socket.gethostname()


async def _parent_ends(pid: int) -> None:
    while os.getppid() == pid:
        await asyncio.sleep(_PARENT_PERIOD_S)


def ended_in_good_order(environ: Mapping[str, str]) -> bool:
    """Whether ``mpirun``, which has ended, ended on purpose: it has removed its directory then.

    Args:
        environ: what it gave its ranks.
    """
    directory = environ.get(SESSION_DIRECTORY)
    return directory is not None and not os.path.exists(directory)


def liaison_of(options: argparse.Namespace, host: str, environ: Mapping[str, str]) -> Liaison | None:
    """What this proxy does for the watch; None where there is none."""
    if options.heartbeat_limit is None:
        return None
    job, rank = environ.get("PMIX_NAMESPACE", ""), int(environ.get("PMIX_RANK", "0"))
    size = len(options.hosts.split(",")) if options.hosts else None
    return Liaison(options.register, host, job, rank, size)


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it. What nobody takes any more is dropped."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:
            return


def main() -> None:
    """Run a rank elsewhere and end as it ends."""
    logging.basicConfig(format="chaos_mpi: %(message)s")
    options = parser().parse_args()
    try:
        placement = placement_of(options, os.environ)
        if options.register is not None:
            job, rank = os.environ.get("PMIX_NAMESPACE", ""), int(os.environ.get("PMIX_RANK", "0"))
            register(options.register, placement.host or "", job, rank)
        liaison = liaison_of(options, placement.host or "", os.environ)
        proxy = Proxy(placement, options.argv, os.environ, options.register, liaison)
        status = asyncio.run(proxy.run())
        ended = f"its process ended ({how_ended(status)}) before it was connected; its output says why"
        how = proxy.failure or ended
    except ChaosError as error:
        log.error("%s", error)
        status, how = EXIT_NOT_STARTED, f"it cannot be started: {error}"
    if options.register is not None and (join := join_of(options.argv)):
        note_end(options.register, join, how)
    sys.stderr.flush()
    end_like(status)


if __name__ == "__main__":
    main()
