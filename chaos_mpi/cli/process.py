"""The ``mpirun`` of one job: its output, its signals, and that nothing of it is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from chaos_mpi.agent import registry
from chaos_mpi.agent.proxy import KILL_SIGNAL
from chaos_mpi.agent.spawning import JOIN_OPTION
from chaos_mpi.cli.control import end_ranks
from chaos_mpi.cli.outcome import RecordReader, Records, describe_status, lives
from chaos_mpi.cli.output import OutputFilter
from chaos_mpi.cli.terminal import say, write
from chaos_mpi.elastic.lifecycle import alike, write_record
from chaos_mpi.errors import ChaosError, EngineError

#: After a signal, the ranks get this long to end before everything is killed, if nothing else was chosen.
GRACE_S = 10.0
#: A shorter line of a rank is no message, but a script's own that only looks like one.
_TELLING = 15
#: What the ranks have printed gets so long to come through.
_OUTPUT_LIMIT_S = 10.0
#: When a job has failed, what is left of it may hold ``mpirun`` up for so long.
LINGER_S = 15.0
#: The same when the scripts have come to their end: what they have asked for at the end of the process is still done.
EXIT_LIMIT_S = 60.0
#: The same when none of its ranks is left, but a process that never became one, or ``mpirun`` by itself.
LEFT_ALONE_S = 2.0
#: Ranks that are still starting so long after another one died wait for it, and would for ever.
START_GRACE_S = 5.0
_POLL_S = 0.1
#: Output that may be the beginning of a launcher's notice is shown when nothing follows for so long.
_QUIET_S = 1.0
#: When ranks are told to end through their proxies, these get so long to see it done.
_PROXIES_LIMIT_S = 3.0
#: When ``mpirun`` was lost, the proxies get so long to tell the ranks.
_FAREWELL_LIMIT_S = 10.0
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LauncherLostError(ChaosError):
    """``mpirun`` was killed, and the ranks train on without it."""


class MpirunJob:
    """Starts ``mpirun`` in a process group of its own; to be used from the main thread.

    Args:
        line: its command line.
        environment: for it.
        run_dir: the job's private directory.
        ranks: how many it starts.
        tagged: whether it says which rank each line is from.
        drop_noise: leave out what Open MPI remarks.
        outlived: the ranks are started by proxies, and train on when ``mpirun`` is killed, or this process.
        grace_s: after a signal, they have so long to end.

    Raises:
        EngineError: it cannot be started.

    Attributes:
        interrupted_by: the first signal that was forwarded, or None.
        overdue: why ranks were killed then; empty if they were not.
        told: other hosts that ranks were on then, by the process id of the proxy.
    """

    def __init__(
        self,
        line: list[str],
        environment: dict[str, str],
        run_dir: Path,
        *,
        ranks: int,
        tagged: bool,
        drop_noise: bool,
        outlived: bool = False,
        grace_s: float = GRACE_S,
    ) -> None:
        self.interrupted_by: signal.Signals | None = None
        self.overdue, self._grace_s = "", grace_s
        self.told: dict[int, str] = {}
        self._run_dir, self._outlived = run_dir, outlived
        self._records = RecordReader(run_dir)
        self._deadline: float | None = None
        self._killed = False
        self._around: dict[int, list[psutil.Process]] = {}
        # Handlers first: a signal that comes while mpirun starts is remembered and forwarded.
        self._process: subprocess.Popen[bytes] | None = None
        # What is ignored stays so: who starts a job with nohup means it.
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._on_signal) for number in heeded}
        try:
            self._process = subprocess.Popen(
                line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                preexec_fn=_prepared(signal.SIGKILL if outlived else signal.SIGINT),  # noqa: PLW1509 - no thread yet
            )  # fmt: skip
        except OSError as error:  # with very many hosts the line is too long
            self._restore_handlers()
            raise EngineError(f"{line[0]} cannot be started for {ranks} ranks: {error.strerror}") from error
        self._filters = [OutputFilter(tagged=tagged, drop_noise=drop_noise) for _ in range(2)]
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        streams = zip(
            (self._process.stdout, self._process.stderr), (sys.stdout, sys.stderr), self._filters, strict=True
        )
        self._pumps = [threading.Thread(target=_pump, args=stream, daemon=True) for stream in streams]
        for pump in self._pumps:
            pump.start()
        self._forward_early_signal()
        self._start = _StartWatch(self._process.pid, ranks)

    def wait(self, meanwhile: Callable[[float], None] = lambda _: None) -> int:
        """Wait for the end, end what does not end by itself, and return ``mpirun``'s exit status.

        Args:
            meanwhile: is called several times a second with the time.

        Raises:
            LauncherLostError: it was killed by something else, and the ranks train on.
        """
        assert self._process is not None
        over_at: float | None = None
        while self._process.poll() is None:
            now = time.monotonic()
            meanwhile(now)
            if self._deadline is not None and now > self._deadline:
                self.overdue = self.overdue or f"{self._grace_s:g} s later (--grace)"
                self._kill_everything()
            records = self._records.read()
            if (loss := self._start.loss(records, now)) is not None:
                write_record(self._run_dir, "outcome", {"outcome": "failed", "message": loss})
                self._kill_everything()
            if (allowance_s := self._allowance_s(records)) is None:
                over_at = None
            else:
                over_at = over_at or now
                if now - over_at > allowance_s:
                    if not self._killed:
                        say(f"what was left of the job {allowance_s:.0f} s after its end was killed")
                    self._kill_everything()
            try:
                self._process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
        records = self._records.read()
        under_way = bool(records.members.keys() - records.outcomes.keys())
        crashed = self._process.returncode < 0 and under_way and self.interrupted_by is None
        lost = self._outlived and (crashed or self._process.returncode == -signal.SIGKILL) and not self._killed
        if lost:
            # They tell the loss of mpirun from its end by its directory, which goes when this process ends.
            registry.wait_for_end(self._run_dir, _FAREWELL_LIMIT_S)
        else:
            self._kill_ranks()
        for pump in self._pumps:
            pump.join(_OUTPUT_LIMIT_S)
        self._restore_handlers()
        if lost:
            raise LauncherLostError(
                f"mpirun {describe_status(self._process.returncode)}; the ranks train on without it. None can be added "
                "before 'chaosctl takeover' is run on one of their hosts. chaosctl works on each of these, and what "
                "they print goes to the directory of --log-dir there"
            )
        return self._process.returncode

    @property
    def mpi_gave_up(self) -> bool:
        """Whether Open MPI has said that it ends the job, because of an error that the script does not handle."""
        return any(output.mpi_gave_up for output in self._filters)

    def has_shown(self, message: str) -> bool:
        """Whether a rank has printed what this message tells, if with other numbers."""
        told = (line.removeprefix("chaos_mpi:").strip() for output in self._filters for line in output.own_lines)
        return any(len(alike(text)) >= _TELLING and alike(text) in alike(message) for text in told)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.interrupted_by is not None:
            if number != signal.SIGHUP:  # which comes twice from a terminal, and after SIGTERM when a machine goes down
                self._deadline, self.overdue = 0.0, "at a second signal"
            return
        self.interrupted_by = signal.Signals(number)
        if self._process is not None:
            self._forward(self.interrupted_by)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward_early_signal(self) -> None:
        if self.interrupted_by is not None:
            self._forward(self.interrupted_by)

    def _forward(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._deadline is None:  # another signal may have come already
            self._deadline = time.monotonic() + self._grace_s
        self.told = {entry.pid: entry.host for entry in registry.registered(self._run_dir) if entry.host}
        if not end_ranks(self._run_dir, number.name, self._grace_s) and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def _allowance_s(self, records: Records) -> float | None:
        """How long the job may go on; None if it is not over.

        It is when all ranks have ended, or one has ended the whole job: mpirun waits for ever for a stopped process.
        What a script does after the training takes as long as it takes, and so does a program around it.
        """
        alive = [pid for pid, record in records.members.items() if lives(pid, record)]
        self._note_programs(records)
        if records.members and not alive and any(_runs(p) for programs in self._around.values() for p in programs):
            return None
        # Ranks that have started MPI may end before they are members: of too small a job, for one.
        up = {**records.starting, **records.connected} if records.connected and not records.members else {}
        if (records.members and not alive) or (up and not any(lives(*rank) for rank in up.items())):
            return LEFT_ALONE_S
        failed = any(record.get("outcome") == "failed" for record in records.outcomes.values())
        ended = bool(records.members) and all(_is_through(pid, records) for pid in alive)
        if failed:
            return LINGER_S
        return EXIT_LIMIT_S if ended else None

    def _note_programs(self, records: Records) -> None:
        """Note what new ranks run within, as a shell script: when they have ended it cannot be found any more."""
        assert self._process is not None
        for pid in records.members.keys() - self._around.keys():
            self._around[pid] = _programs_between(self._process.pid, pid)

    def _kill_everything(self) -> None:
        assert self._process is not None
        first, self._killed = not self._killed, True
        # The ranks first: those that lose mpirun before would train on, and the kernel wakes those that are stopped.
        self._kill_ranks(newcomers=first)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._kill_ranks(newcomers=False)

    def _kill_ranks(self, *, newcomers: bool = True) -> None:
        """Ranks that outlived mpirun; only those that carry this job's directory in their environment.

        Args:
            newcomers: look at all processes for those as well that are still starting.
        """
        if self._outlived:
            registry.end(self._run_dir, KILL_SIGNAL, _PROXIES_LIMIT_S)
            return
        records = self._records.read()
        for pid in {*records.starting, *records.members, *(_newcomers() if newcomers else ())}:
            try:
                process = psutil.Process(pid)
                if process.environ().get("CHAOS_RUN_DIR") == str(self._run_dir):
                    process.kill()
            except psutil.Error:
                continue


def _newcomers() -> Iterator[int]:
    """Ranks that were started to join some job. Until they load this package, nothing tells that they are there."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(word.startswith(f"{JOIN_OPTION}=") for word in process.cmdline()):
                yield process.pid


def _programs_between(launcher_pid: int, pid: int) -> list[psutil.Process]:
    """What ``mpirun`` has started to run this rank; nothing if another program, as that of a container, has it run."""
    try:
        parents = psutil.Process(pid).parents()
    except psutil.Error:
        return []
    pids = [parent.pid for parent in parents]
    return parents[: pids.index(launcher_pid)] if launcher_pid in pids else []


def _runs(program: psutil.Process) -> bool:
    try:
        return bool(program.is_running() and program.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_through(pid: int, records: Records) -> bool:
    """Whether nothing more is to be expected of a process that was a rank."""
    outcome = records.outcomes.get(pid)
    if outcome is None or outcome.get("outcome") != "finished" or pid in records.leaving:
        return outcome is not None
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return True


class _StartWatch:
    """Notices a rank that died before MPI was up: all others are in ``MPI_Init``, which waits for it without limit.

    Args:
        mpirun_pid: the ranks are its children.
        ranks: how many there are to be.
    """

    def __init__(self, mpirun_pid: int, ranks: int) -> None:
        self._mpirun_pid, self._ranks = mpirun_pid, ranks
        self._seen: set[int] = set()
        self._noticed: float | None = None

    def loss(self, records: Records, now: float) -> str | None:
        """What happened, in words, once it is certain that the job cannot start; else None."""
        if records.members or records.connected:
            return None  # the ranks have met: from now on they deal with deaths themselves
        try:
            children = psutil.Process(self._mpirun_pid).children()
            alive = {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}
        except psutil.Error:
            return None
        self._seen |= alive | set(records.starting)
        dead = self._seen - alive
        missing = self._ranks - len(alive)
        # Some wait for the missing ones, or all are gone and mpirun has not noticed.
        waiting = bool(alive & set(records.starting)) or not alive
        if not self._seen or missing <= 0 or not waiting:
            return None
        self._noticed = self._noticed or now
        if now - self._noticed < START_GRACE_S:
            return None
        return (
            f"{missing} of the {self._ranks} ranks died before MPI was up "
            f"(pid {', '.join(map(str, sorted(dead))) or 'unknown'}); a job can only start with all of its ranks. "
            "Look above for their error, and start the job again"
        )


def _prepared(number: signal.Signals) -> Callable[[], None]:
    """In the new process: have the kernel send it a signal when chaosrun dies, whatever kills that; hold SIGTERM off.

    With SIGINT ``mpirun`` ends its ranks. With SIGKILL (prctl(2)) those that can do without it train on. A machine that
    goes down sends SIGTERM to all processes: ``mpirun`` would kill its ranks half a second later, which have a state to
    save; it does not pass on to them that the signal is blocked.
    """
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    return prepare


def _pump(source: IO[bytes], target: IO[str], output: OutputFilter) -> None:
    while True:
        readable, _, _ = select.select([source], [], [], _QUIET_S)
        if not readable:
            write(target, output.idle())
            continue
        data = os.read(source.fileno(), 65536)
        if not data:
            break
        write(target, output.feed(data))
    write(target, output.finish())
