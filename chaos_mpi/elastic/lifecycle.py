"""What a rank leaves behind: its records for the launcher, and its behaviour at the end of the process.

A process that ends by an exception must end at once and without ``MPI_Finalize``, which would wait for the
others; they then see a dead peer and train on. It ends itself by a signal: the launcher tells the others of a
process that was killed, but not of one that exits with a status above zero. A script that just ends without
:func:`chaos_mpi.finalize` is closed in good order.
"""

from __future__ import annotations

import atexit
import builtins
import fcntl
import gc
import hashlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from chaos_mpi.agent.home import note_down
from chaos_mpi.errors import ChaosError, NoSessionError, StopRequestedError, TooFewRanksError

log = logging.getLogger("chaos_mpi.elastic")

#: Exit status of a rank that stopped on purpose because the job cannot go on.
STOPPED_STATUS = 3


def write_record(run_dir: Path | None, kind: str, fields: dict[str, Any]) -> None:
    """Write ``<kind>-<pid>.json`` into the job's private directory, whole or not at all."""
    if run_dir is None:
        return
    try:
        note_down(run_dir, kind, fields)
    except OSError as error:
        log.warning("could not write to %s for the launcher: %s", run_dir, error)


def set_log_level(level: str | None) -> None:
    """Show this package's log from ``level`` on, on stderr if the script has set up nothing else."""
    if level is None:
        return
    logger = logging.getLogger("chaos_mpi")
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("chaos_mpi %(levelname)s: %(message)s"))
        logger.addHandler(handler)


def alike(text: str) -> str:
    """A message without its numbers: what several ranks say of one thing is the same but for their rank, for one."""
    return re.sub(r"\d+", "", text)


def say_once(run_dir: Path | None, said: BaseException | str) -> None:
    """Print a message of this package; an error without a traceback through the engine, which would add nothing.

    What several ranks of a job have to say :func:`alike` only the first one says. The others wait until it has, so
    that they do not end the job before.
    """
    text = str(said)
    if not text:
        return
    # Without chaosrun, the directory that the launcher keeps for the job on each machine.
    meeting_place = run_dir or os.environ.get("PMIX_SERVER_TMPDIR")
    descriptor = -1
    if meeting_place is not None:
        name = hashlib.sha256(alike(f"{type(said).__name__} {text}").encode()).hexdigest()[:16]
        try:
            descriptor = os.open(Path(meeting_place, f"said.{name}"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # the kernel gives it back if its holder dies before it has spoken
            if os.read(descriptor, 1):
                log.debug("said by another rank, too: %s", text)
                return
        except OSError:
            pass  # better twice than never
    try:
        # In one piece, which print() does not do with PYTHONUNBUFFERED: what MPI says next must not come between.
        sys.stderr.write(f"chaos_mpi: {text}\n")
        sys.stderr.flush()
        if descriptor >= 0:
            os.write(descriptor, b"1")
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def end_quickly() -> None:
    """From here on the process does not search for garbage when it ends.

    The interpreter collects twice while it goes, over everything that torch has loaded: half a second of a core
    that a member which leaves would take from those that train on beside it.
    """
    atexit.register(gc.freeze)  # what the script registers later runs before this


def tidy_uncaught() -> None:
    """From here on an error of this package that nobody catches ends the process with one line."""
    previous = sys.excepthook
    run_dir = Path(os.environ["CHAOS_RUN_DIR"]) if os.environ.get("CHAOS_RUN_DIR") else None

    def on_exception(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(value, ChaosError):
            previous(kind, value, traceback)
            return
        say_once(run_dir, value)
        _flush()
        os._exit(STOPPED_STATUS)  # what else holds the process, as MPI half started, is not waited for

    sys.excepthook = on_exception


def _flush() -> None:
    """Have all that was printed come out, before the process ends in the middle of things.

    The hook of ``torch.distributed`` collects what the hook before it prints on stderr, to put the rank in front of it,
    and would never come to print it.
    """
    logging.shutdown()
    sys.stdout.flush()
    if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:
        sys.__stderr__.write(sys.stderr.getvalue())
        sys.__stderr__.flush()
    sys.stderr.flush()


class ExitGuard:
    """Ends the process the right way, whichever way it ends.

    Args:
        close: ends the session in good order.
        crashed: records that this rank ends by an exception, given as text.
        watched: whether other members are to see the end of this process.
        run_dir: the job's private directory, if it has one.

    Attributes:
        is_quiet: whether a script that ends without closing the session is not told so.
    """

    def __init__(
        self,
        close: Callable[[], object],
        crashed: Callable[[str], None],
        watched: Callable[[], bool],
        run_dir: Path | None,
    ) -> None:
        self._close, self._crashed, self._watched, self._run_dir = close, crashed, watched, run_dir
        self._previous, self._exit, self._exit_at_once = sys.excepthook, sys.exit, os._exit
        self._pid = os.getpid()
        self._status: object = None
        self._unhandled_before = getattr(sys, "last_value", None)
        self._exits: dict[str, object] = {n: vars(builtins)[n] for n in ("exit", "quit") if n in vars(builtins)}
        vars(builtins).update(dict.fromkeys(self._exits, lambda code=None: self._noting_exit(code)))
        self.is_quiet = False
        atexit.register(self._note_leaving)  # so early that it is called after most of what the script has asked for
        sys.excepthook = self._on_exception
        sys.exit = self._noting_exit
        os._exit = self._noting_exit_at_once
        atexit.register(self._at_exit)

    @property
    def is_at_home(self) -> bool:
        """Whether this is the rank's own process, and none that it has forked, which may end as it likes."""
        return os.getpid() == self._pid

    @property
    def failing(self) -> bool:
        """Whether the script has called ``sys.exit``, ``exit`` or ``quit`` with a status that tells of a failure, or
        ends by an exception that another hook has dealt with."""
        return self._status not in (None, 0) or self._unhandled is not None

    @property
    def _unhandled(self) -> BaseException | None:
        if sys.excepthook == self._on_exception:
            return None  # it would have been told
        error: BaseException | None = getattr(sys, "last_value", None)
        return error if error is not self._unhandled_before else None

    def release(self) -> None:
        """The session is over; the process may end as any other."""
        sys.excepthook, sys.exit, os._exit = self._previous, self._exit, self._exit_at_once
        vars(builtins).update(self._exits)
        atexit.unregister(self._at_exit)

    def release_finished(self, failed: Callable[[str], None]) -> None:
        """Training is finished; ``failed`` is told, as text, if the script fails in what it does after it."""
        self.release()

        def on_exception(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
            if self.is_at_home:
                failed(f"{kind.__name__}: {value}")
            self._previous(kind, value, traceback)

        def noting_exit(status: str | int | None = None) -> NoReturn:
            if status not in (None, 0) and self.is_at_home:
                failed(f"it called sys.exit({status!r})")
            self._exit(status)

        sys.excepthook, sys.exit = on_exception, noting_exit

    def fail(self, error: Exception) -> NoReturn:
        """End the process, which is the rank's own, by this error."""
        self._on_exception(type(error), error, error.__traceback__)
        raise AssertionError("an exception ends the rank's own process")

    def _noting_exit(self, status: str | int | None = None) -> NoReturn:
        # The exit status is not to be had when the process ends, and it tells an end from a failure.
        self._status = status
        self._exit(status)

    def _noting_exit_at_once(self, status: int) -> NoReturn:
        if status != 0 and self.is_at_home:
            self._end(f"it called os._exit({status})", status)
        self._exit_at_once(status)

    def _note_leaving(self) -> None:
        """The script is at its end: from here on the launcher need not wait for this process for long."""
        if self.is_at_home:
            write_record(self._run_dir, "leaving", {})

    def _at_exit(self) -> None:
        if not self.is_at_home:
            return
        if (unhandled := self._unhandled) is not None:
            self._end(f"{type(unhandled).__name__}: {unhandled}", 1)
        if self.failing:
            self._end(f"the script called sys.exit({self._status!r})", 1)
        if not self.is_quiet:
            say_once(
                self._run_dir,
                "the script ended without chaos_mpi.finalize() (or the destroy_process_group() or close() of what it "
                "uses); closing the session now",
            )
        try:
            self._close()
        except NoSessionError:
            return  # it has ended already, and has said why
        except ChaosError as error:
            self._on_exception(type(error), error, None)

    def _on_exception(self, kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        if not self.is_at_home:
            self._previous(kind, value, traceback)
            return
        stopped = isinstance(value, ChaosError)
        if stopped:
            say_once(self._run_dir, value)
        else:
            self._previous(kind, value, traceback)
        message = str(value) if stopped else f"{kind.__name__}: {value}"
        status = STOPPED_STATUS if stopped else 130 if issubclass(kind, KeyboardInterrupt) else 1
        by_all = isinstance(value, StopRequestedError) and value.by_all
        self._end(message, status, together=by_all or isinstance(value, TooFewRanksError))

    def _end(self, message: str, status: int, *, together: bool = False) -> NoReturn:
        """End the process now; ``together`` with all others, who need not be told of it."""
        self._crashed(message)
        _flush()
        if self._watched() and not together:
            os.kill(os.getpid(), signal.SIGKILL)
        self._exit_at_once(status)
