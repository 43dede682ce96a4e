"""What a rank leaves behind: its records for the launcher, and its behaviour at the end of the process.

A process that ends by an exception must end at once and without ``MPI_Finalize``, which would wait for the
others; they then see a dead peer and train on. It ends itself by a signal: the launcher tells the others of a
process that was killed, but not of one that exits with a status above zero. A script that just ends without
:func:`chaos_mpi.finalize` is closed in good order.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from chaos_mpi.errors import ChaosError, NoSessionError, TooFewRanksError

log = logging.getLogger("chaos_mpi.elastic")

#: Exit status of a rank that stopped on purpose because the job cannot go on.
STOPPED_STATUS = 3


def write_record(run_dir: Path | None, kind: str, fields: dict[str, Any]) -> None:
    """Write ``<kind>-<pid>.json`` into the job's private directory, whole or not at all."""
    if run_dir is None:
        return
    path = run_dir / f"{kind}-{os.getpid()}.json"
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(fields), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        log.warning("could not write %s for the launcher: %s", path, error)


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


class ExitGuard:
    """Ends the process the right way, whichever way it ends.

    Args:
        close: ends the session in good order.
        crashed: records that this rank ends by an exception, given as text.
        watched: whether other members are to see the end of this process.
    """

    def __init__(
        self, close: Callable[[], object], crashed: Callable[[str], None], watched: Callable[[], bool]
    ) -> None:
        self._close, self._crashed, self._watched = close, crashed, watched
        self._previous, self._exit = sys.excepthook, sys.exit
        self._status: object = None
        sys.excepthook = self._on_exception
        sys.exit = self._noting_exit
        atexit.register(self._at_exit)

    def release(self) -> None:
        """The session is over; the process may end as any other."""
        sys.excepthook, sys.exit = self._previous, self._exit
        atexit.unregister(self._at_exit)

    def _noting_exit(self, status: str | int | None = None) -> NoReturn:
        # The exit status is not to be had when the process ends, and it tells an end from a failure.
        self._status = status
        self._exit(status)

    def _at_exit(self) -> None:
        if self._status not in (None, 0):
            self._end(f"the script called sys.exit({self._status!r})", 1)
        log.warning("the script ended without chaos_mpi.finalize(); closing the session now")
        try:
            self._close()
        except NoSessionError:
            return  # it has ended already, and has said why
        except ChaosError as error:
            self._on_exception(type(error), error, None)

    def _on_exception(self, kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        stopped = isinstance(value, ChaosError)
        if stopped:
            # Written for the person who reads it; a traceback through the engine adds nothing.
            if str(value):
                print(f"chaos_mpi: {value}", file=sys.stderr)
        else:
            self._previous(kind, value, traceback)
        message = str(value) if stopped else f"{kind.__name__}: {value}"
        status = STOPPED_STATUS if stopped else 130 if issubclass(kind, KeyboardInterrupt) else 1
        self._end(message, status, together=isinstance(value, TooFewRanksError))

    def _end(self, message: str, status: int, *, together: bool = False) -> NoReturn:
        """End the process now; ``together`` with all others, who need not be told of it."""
        self._crashed(message)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        if self._watched() and not together:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(status)
