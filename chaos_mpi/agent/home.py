"""The private directory of a job on the host of a rank.

There the rank writes down how it fares, and has its control socket; ``chaosctl`` finds the job by it. All ranks of a
job on one host share it. It is named after the host as well: several may share their directory for temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos_mpi.agent.marks import here, may_live, started
from chaos_mpi.errors import EngineError

#: What a rank writes down, in the order in which it does.
RECORDS = ("starting", "connected", "member", "ready", "outcome", "leaving")
#: What its agent writes down when it has crashed.
CRASH = "crash"
#: What a proxy writes down when the connection with the host of its rank broke.
LOST = "lost"
#: What a proxy writes down when the host of its rank has heard that the rank is to end, or it has ended since.
TOLD = "told"


def note_down(directory: Path, kind: str, fields: dict[str, Any]) -> None:
    """Write ``<kind>-<pid>.json`` for this process into a job's private directory, whole or not at all.

    Besides these fields it says when this process was ``started``.

    Raises:
        OSError: it cannot be written.
    """
    path = directory / f"{kind}-{os.getpid()}.json"
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps({**fields, **started()}), encoding="utf-8")
    new.replace(path)


def refuse_foreign(path: Path) -> None:
    """Make sure that a directory is this user's alone.

    Raises:
        EngineError: it is not, or is no directory.
        OSError: it is not there.
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EngineError(f"{path} is there already, and is not this user's alone")


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep what removes old temporary files off a job's private directory and all in it, however long the job takes.

    systemd-tmpfiles leaves a directory alone on which another process has a lock (tmpfiles.d(5)).

    Raises:
        OSError: the directory is not there.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # there are file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class Home:
    """The directory, as one supervisor sees it.

    Args:
        job: name of the job's directory on the launch host, which begins with ``chaosrun-``.

    Attributes:
        path: of the directory.

    Raises:
        EngineError: there is something else in its place, or it cannot be made.
    """

    def __init__(self, job: str) -> None:
        self.path = Path(tempfile.gettempdir()) / f"{job}-{socket.gethostname()}"
        self._mark = self.path / f"supervisor-{os.getpid()}.json"
        self._seen: dict[str, bytes] = {}
        self._held = contextlib.ExitStack()
        for _ in range(3):  # another supervisor may be removing it at this very moment
            try:
                self.path.mkdir(mode=0o700, exist_ok=True)
                refuse_foreign(self.path)
                self._mark.write_text(json.dumps({**here(), **started()}))
                self._held.enter_context(held(self.path))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise EngineError(f"the job's directory {self.path} cannot be used: {error.strerror}") from error
            return
        raise EngineError(f"the job's directory {self.path} is removed again and again")

    def control_socket(self, pid: int) -> Path:
        """Where a rank listens to ``chaosctl``."""
        return self.path / f"control-{pid}.sock"

    def new_records(self, pid: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """What a rank has written down since the last call: kind, and fields."""
        for kind in RECORDS:
            with contextlib.suppress(OSError, ValueError):
                text = self._record_of(kind, pid).read_bytes()
                if text != self._seen.get(kind):
                    self._seen[kind] = text
                    yield kind, json.loads(text)

    def record(self, kind: str, pid: int) -> dict[str, Any] | None:
        """The fields of what a rank has written down; None if it has not."""
        try:
            fields: dict[str, Any] = json.loads(self._record_of(kind, pid).read_bytes())
        except (OSError, ValueError):
            return None
        return fields

    def close(self, pid: int | None) -> None:
        """Remove what one rank has left, and with the last living supervisor the directory."""
        self._held.close()
        if pid is not None:
            self.control_socket(pid).unlink(missing_ok=True)
            for kind in RECORDS:
                self._record_of(kind, pid).unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)
        if any(map(may_live, self.path.glob("supervisor-*.json"))):
            return
        for left in list(self.path.glob("*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a supervisor that has come meanwhile keeps it
            self.path.rmdir()

    def _record_of(self, kind: str, pid: int) -> Path:
        return self.path / f"{kind}-{pid}.json"
