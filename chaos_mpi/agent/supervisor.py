"""Starts one rank on this host and stays beside it; ``python -m chaos_mpi.agent.supervisor``, started by a proxy.

It takes its orders as frames on standard input, and answers on standard output. When the proxy says that ``mpirun``
has gone, or the way to the proxy is lost, the rank lives on. It is killed when it has been told to end and the proxy
has gone, and when the proxy alone was killed: ``mpirun`` has then told the other ranks that this one is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tty
from pathlib import Path
from typing import Any

from chaos_mpi.agent.control import ControlConnector
from chaos_mpi.agent.crashes import how_it_crashed
from chaos_mpi.agent.environment import host_variables, moved, server_endpoint, through_relay
from chaos_mpi.agent.frames import MAGIC, Decoder, Frame, Kind, encode, encode_json
from chaos_mpi.agent.guard import Guard, Settings
from chaos_mpi.agent.home import CRASH, Home
from chaos_mpi.agent.launcher import LauncherPipe
from chaos_mpi.agent.output import Output, default_log_directory
from chaos_mpi.agent.processes import die_with_parent, is_running, kill_group, live_without_parent
from chaos_mpi.agent.relay import Relay
from chaos_mpi.agent.streams import PipeWriter, pipe_reader
from chaos_mpi.errors import ChaosError, EngineError

log = logging.getLogger("chaos_mpi.agent")

#: The proxy sends its order at once.
ORDER_LIMIT_S = 60.0
#: When proxy and launcher are killed together, the launcher may seem to live for a moment.
LAUNCHER_GRACE_S = 0.5
#: After the end of a rank, processes that it has left may hold its output open for so long.
DRAIN_LIMIT_S = 2.0
#: A launcher that does not take the last words within this time does not get them.
FLUSH_LIMIT_S = 10.0
_POLL_S = 0.02
#: Time between two looks at what the rank has written down.
_RECORDS_PERIOD_S = 0.1
_CHUNK_BYTES = 1 << 16
_CONTROL = frozenset({Kind.CONTROL_OPEN, Kind.CONTROL_DATA, Kind.CONTROL_CLOSE})
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Supervisor:
    """One rank, from its start to its end.

    Args:
        reader: frames from the proxy.
        writer: frames to it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: PipeWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = Decoder()
        self._early: list[Frame] = []
        self._relay = Relay(self._send)
        self._process: asyncio.subprocess.Process | None = None
        self._output: Output | None = None
        self._launcher: tuple[int, int] | None = None
        self._told_to_end = self._ended_from_here = False
        self._launcher_pipe = LauncherPipe()
        self._home: Home | None = None
        self._control: ControlConnector | None = None
        self._guard: Guard | None = None
        self._lost = False

    async def run(self) -> None:
        """Take the order, run the rank, report how it ended."""
        self._writer.write(MAGIC)
        try:
            order = await asyncio.wait_for(self._order(), ORDER_LIMIT_S)
            await self._start(order)
        except (ChaosError, OSError, TimeoutError, KeyError, TypeError) as error:
            self._write(encode_json(Kind.REFUSED, f"{error}" or type(error).__name__))
            self._leave_home()
            await self._leave_watch(None)
            return
        assert self._process is not None
        beside = [asyncio.create_task(self._listen()), asyncio.create_task(self._report())]
        status = await self._process.wait()
        if status != 0:  # what it has forked holds its connections, by which the others tell that it is dead
            kill_group(self._process.pid, signal.SIGKILL)
        crash = self._crash(status)
        announced = self._guard.rank_ended(crash) if self._guard is not None else None
        await self._finish_output()
        self._report_new()
        if crash:
            self._write(encode_json(Kind.RECORD, {"kind": CRASH, "fields": {"how": crash}}))
        await self._relay.close()
        for task in beside:
            task.cancel()
        self._leave_home()
        self._write(encode_json(Kind.EXIT, status))
        await self._leave_watch(announced)

    def forward(self, number: int) -> None:
        """Pass a signal on to the rank and its children, as ``mpirun`` does with its own."""
        if number in _ENDING_SIGNALS:
            self._told_to_end = True
        self._signal(number)

    # -- start ---------------------------------------------------------------------------------------------------

    async def _order(self) -> dict[str, Any]:
        frames: list[Frame] = []
        while not frames:
            data = await self._reader.read(_CHUNK_BYTES)
            if not data:
                raise EngineError("the proxy ended before it said what to run")
            _, frames = self._decoder.feed(data)
        self._early = frames[1:]
        if frames[0].kind is not Kind.START:
            raise EngineError(f"the proxy began with a {frames[0].kind.name} frame")
        order: dict[str, Any] = frames[0].json()
        return order

    async def _start(self, order: dict[str, Any]) -> None:
        environ = {**os.environ, **moved(order["environ"], order["prefix"], sys.prefix)}
        environ |= self._launcher_pipe.variables() | host_variables(order, environ, len(os.sched_getaffinity(0)))
        if order["job"] is not None:
            self._home = Home(order["job"])
            environ["CHAOS_RUN_DIR"] = str(self._home.path)
        if server_endpoint(environ) is not None:
            environ = through_relay(environ, await self._relay.listen())
        argv = [sys.executable if order["argv"][0] == order["python"] else order["argv"][0], *order["argv"][1:]]
        directory = order["directory"]
        if not Path(directory).is_dir():
            raise EngineError(f"there is no directory {directory}; name another with --wdir")
        if order["launcher"] is not None:
            self._launcher = (int(order["launcher"][0]), int(order["launcher"][1]))
        self._output = Output(self._writer, log_file(order, environ))
        environ |= await self._enter_watch(order, self._output)
        ours, theirs = os.openpty() if order["terminal"] else os.pipe()
        if order["terminal"]:
            tty.setraw(theirs)
        errors, their_errors = os.pipe()
        try:
            # Pipes that asyncio does not know of: with its own it takes a process for alive until the last child of
            # that has closed them, and the others would wait as long for a dead rank.
            self._process = await asyncio.create_subprocess_exec(
                *argv, env=environ, cwd=directory, stdin=asyncio.subprocess.DEVNULL, stdout=theirs,
                stderr=their_errors, process_group=0,
                pass_fds=[self._launcher_pipe.descriptor], preexec_fn=die_with_parent(signal.SIGKILL),
            )  # fmt: skip
        except OSError as error:
            os.close(ours)
            os.close(errors)
            raise EngineError(f"{argv[0]}: {error.strerror}") from error
        finally:
            os.close(theirs)
            os.close(their_errors)
            self._launcher_pipe.passed_on()
        self._pumps = [
            asyncio.create_task(self._output.pump(await pipe_reader(ours), Kind.STDOUT)),
            asyncio.create_task(self._output.pump(await pipe_reader(errors), Kind.STDERR)),
        ]
        if self._home is not None:
            self._control = ControlConnector(self._home.control_socket(self._process.pid), self._send)
        self._write(encode_json(Kind.STARTED, self._process.pid))
        if self._guard is not None:
            self._guard.started(f"{environ.get('CHAOS_HOST') or socket.gethostname()}:{self._process.pid}")

    # -- while the rank runs -------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        for frame in self._early:
            self._take(frame)
        with contextlib.suppress(OSError, ChaosError):
            while data := await self._reader.read(_CHUNK_BYTES):
                for frame in self._decoder.feed(data)[1]:
                    self._take(frame)
        await self._proxy_gone()

    def _take(self, frame: Frame) -> None:
        try:
            self._heed(frame)
        except Exception as error:  # what comes next may be a signal
            log.error("a %s frame of the proxy could not be heeded: %r", frame.kind.name, error)

    def _heed(self, frame: Frame) -> None:
        if frame.kind is Kind.SIGNAL:
            number = int(frame.json())
            self.forward(number)
            self._write(encode_json(Kind.TOLD, number))
        elif frame.kind is Kind.LAUNCHER_LOST:
            self._go_on_alone()
        elif frame.kind in _CONTROL:
            if self._control is not None:
                self._control.deliver(frame)
        elif frame.kind in (Kind.CONTACTS, Kind.FENCED):
            if self._guard is not None:
                self._guard.heed(frame)
        else:
            self._relay.deliver(frame)

    async def _report(self) -> None:
        while True:
            self._report_new()
            await asyncio.sleep(_RECORDS_PERIOD_S)

    def _report_new(self) -> None:
        """Tell the proxy what the rank has written down since the last look."""
        if self._home is not None and self._process is not None:
            for kind, fields in self._home.new_records(self._process.pid):
                self._write(encode_json(Kind.RECORD, {"kind": kind, "fields": fields}))

    def _leave_home(self) -> None:
        if self._home is not None:
            self._home.close(self._process.pid if self._process is not None else None)

    async def _proxy_gone(self) -> None:
        if self._lost:
            return
        if self._told_to_end or await self._launcher_lives():
            self._kill()
        else:
            self._go_on_alone()

    async def _launcher_lives(self) -> bool:
        """Whether ``mpirun`` outlives the proxy, as far as can be told: only where it is on this host."""
        if self._launcher is None:
            return False
        limit = asyncio.get_running_loop().time() + LAUNCHER_GRACE_S
        while is_running(*self._launcher):
            if asyncio.get_running_loop().time() > limit:
                return True
            await asyncio.sleep(_POLL_S)
        return False

    def _go_on_alone(self) -> None:
        """Let go of the way to the proxy, which waits for that. Output goes to the file from here on."""
        if self._lost:
            return
        self._lost = True
        self._launcher_pipe.close()
        if self._guard is not None:
            self._guard.launcher_lost()
        if self._output is not None:
            self._output.lost = True
        self._writer.abandon()
        _let_go()

    # -- the watch over the other nodes --------------------------------------------------------------------------

    async def _enter_watch(self, order: dict[str, Any], output: Output) -> dict[str, str]:
        """Get ready to watch, if so ordered; returns the variables that the rank is to have."""
        if order["watch"] is None:
            return {}
        directory = self._home.path if self._home is not None else None
        self._guard = Guard(Settings.from_json(order["watch"]), directory, self._write, output.say, self._kill)
        return await self._guard.open()

    async def _leave_watch(self, announced: asyncio.Task[None] | None) -> None:
        """Let the proxy go, which is not to wait until the others have agreed on a view without this node.

        Args:
            announced: ends when the others know that the rank has ended; None when it never began.
        """
        if self._guard is None:
            return
        if not self._lost:
            await self._writer.close(FLUSH_LIMIT_S)
            _let_go()
        if announced is not None:
            await announced
            await self._guard.linger()
        await self._guard.close()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            self._ended_from_here |= number in _ENDING_SIGNALS or number == signal.SIGKILL
            kill_group(self._process.pid, number)

    # -- the end -------------------------------------------------------------------------------------------------

    def _crash(self, status: int) -> str:
        """How the rank crashed; empty if it did not."""
        assert self._process is not None
        if self._ended_from_here or self._home is None:
            return ""
        pid = self._process.pid
        outcome = self._home.record("outcome", pid) or {}
        return how_it_crashed(status, self._home.record("member", pid) is not None, outcome.get("outcome"))

    async def _finish_output(self) -> None:
        _, left = await asyncio.wait(self._pumps, timeout=DRAIN_LIMIT_S)
        for pump in left:
            pump.cancel()
        if self._output is not None:
            self._output.close()

    def _send(self, frame: Frame) -> None:
        self._write(encode(frame))

    def _write(self, data: bytes) -> None:
        if not self._lost:
            self._writer.write(data)


def _let_go() -> None:
    """Close the streams to the proxy: the way there ends with the last copy of them."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def log_file(order: dict[str, Any], environ: dict[str, str]) -> Path:
    """The file for what the rank prints when the launcher does not take it."""
    directory = Path(order["log_directory"]) if order["log_directory"] else default_log_directory()
    job = re.sub(r"[^A-Za-z0-9.-]+", "-", environ.get("PMIX_NAMESPACE", "job"))
    return directory / job / f"rank-{environ.get('PMIX_RANK', '0')}.log"


async def _main() -> None:
    loop = asyncio.get_running_loop()
    reader, writer = await pipe_reader(os.dup(0)), await PipeWriter.open(os.dup(1))
    supervisor = Supervisor(reader, writer)
    # Handlers also for what is ignored: to be ignored would be handed on to the rank.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, supervisor.forward, number)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # the end of an ssh session is not the end of the rank
    await supervisor.run()
    await writer.close(FLUSH_LIMIT_S)


def main() -> None:
    """Run one rank, as ordered on standard input."""
    live_without_parent()  # where ssh is a program that becomes this one
    logging.basicConfig(format=f"chaos_mpi on {socket.gethostname()}: %(message)s")
    asyncio.run(_main())


if __name__ == "__main__":
    main()
