"""The ranks' output on its way to the user: rank prefixes rewritten, and Open MPI's harmless noise left out."""

from __future__ import annotations

import re

_TAG = re.compile(rb"^\[\d+,(?P<rank>\d+)\]<(?:stdout|stderr|stddiag)>: ?")
# How Open MPI's non-blocking collectives comment on a dead peer or a revoked communicator, at every survivor and
# for every operation in flight, followed by an empty line. The session handles it, so it says nothing to a user.
_NBC = re.compile(
    rb"^NBC_Progress: an error \d+ was found during schedule \S+ at row-offset \d+ - aborting the schedule\s*$"
)
# Open MPI's event library, where Open MPI has closed a broken connection before it has let the library know.
_EVENT = re.compile(rb"^\[warn\] Epoll [A-Z]+\(\d+\) on fd \d+ failed\..*: Bad file descriptor\s*$")
_RULE = re.compile(rb"^-{40,}\s*$")
# PRRTE's boxed notices about the end of a rank or of the job; chaosrun says what became of the job itself.
_BOXED_NOISE = re.compile(
    rb"noticed that process rank \d+|exited on signal \d+|detected that one or more processes exited with non-zero"
    rb"|has exited improperly|MPI_ABORT was invoked on rank"
    rb"|process rank \d+ with PID \d+ on node \S+ exiting|Primary job\s+terminated normally"
)
_NOISE_STARTS = (
    b"NBC_Progress:",
    b"-" * 40,
    b"[warn] Epoll ",
    b"Abort is in progress...hit ctrl-c again",
    b"LAUNCHER JOB OBJECT NOT FOUND",
    b"Error in NBC_Start_round()",
    b"MPI Error in NBC subrequest",
)
_BOX_LINES = 40
_FATAL = b"*** MPI_ERRORS_ARE_FATAL"


class OutputFilter:
    """Turns what ``mpirun`` writes into what the user is shown; one for each of stdout and stderr.

    Args:
        tagged: ``mpirun`` was started with ``--output tag``; its tags become ``[rank] ``.
        drop_noise: leave the known noise out.
    """

    def __init__(self, *, tagged: bool, drop_noise: bool) -> None:
        self._tagged, self._drop_noise = tagged, drop_noise
        self._rest = b""
        self._begun = False  # a line has been shown in part
        self._box: list[bytes] | None = None
        self._empty_lines_owed = 0
        #: Lines of the package itself that were shown, so that chaosrun does not say the same again.
        self.own_lines: set[str] = set()
        #: Whether Open MPI has said that it ends the job, because of an error that the script does not handle.
        self.mpi_gave_up = False
        self._last = b""  # of what was read

    def feed(self, data: bytes) -> bytes:
        """What is to be shown after ``data`` was read."""
        self._last += data
        self.mpi_gave_up |= _FATAL in self._last
        self._last = self._last[-len(_FATAL) :]
        if not self._tagged and not self._drop_noise:
            return data
        # mpirun ends its own messages with a zero byte behind the end of the line.
        lines = [line.lstrip(b"\0") for line in (self._rest + data).split(b"\n")]
        self._rest = lines.pop()
        shown: list[bytes] = []
        for line in lines:
            # The rest of a line that was begun is no line of its own, whatever it looks like.
            if self._begun:
                self._note_own(line)
                shown.append(line + b"\n")
            else:
                shown += self._line(line + b"\n")
            self._begun = False
        # A prompt or a progress bar has no line end and must not wait for one, unless it may become noise or a tag.
        open_line = self._begun or (self._box is None and not _may_be_noise(self._rest))
        if not self._tagged and self._rest and open_line:
            shown.append(self._rest)
            self._rest = b""
            self._begun = True
        return b"".join(shown)

    def idle(self) -> bytes:
        """What was held back only to see what follows, when nothing has followed for a while."""
        box, self._box = self._box, None
        return b"".join(box or [])

    def finish(self) -> bytes:
        """What is left at the end of the stream."""
        kept = self._line(self._rest) if self._rest else []
        self._rest = b""
        return b"".join(kept) + self.idle()

    def _line(self, line: bytes) -> list[bytes]:
        prefix = b""
        if self._tagged and (tag := _TAG.match(line)):
            prefix, line = b"[" + tag["rank"] + b"] ", line[tag.end() :]
        if not self._drop_noise:
            return [prefix + line]
        if self._box is not None:
            return self._boxed(prefix + line, line)
        if _RULE.match(line):
            self._box = [prefix + line]
            return []
        if _NBC.match(line):
            self._empty_lines_owed += 1
            return []
        if _EVENT.match(line):
            return []
        if not line.strip() and self._empty_lines_owed:
            self._empty_lines_owed -= 1
            return []
        if line.startswith(_NOISE_STARTS[3:]):
            return []
        self._note_own(line)
        return [prefix + line]

    def _note_own(self, line: bytes) -> None:
        _, own, text = line.partition(b"chaos_mpi: ")  # which may stand behind a progress bar
        if own and len(self.own_lines) < 100:
            self.own_lines.add((own + text).decode(errors="replace").strip())

    def _boxed(self, shown: bytes, line: bytes) -> list[bytes]:
        assert self._box is not None
        self._box.append(shown)
        if not _RULE.match(line) and len(self._box) < _BOX_LINES:
            return []
        box, self._box = self._box, None
        return [] if any(_BOXED_NOISE.search(text) for text in box) else box


def _may_be_noise(rest: bytes) -> bool:
    return any(rest.startswith(start[: len(rest)]) for start in _NOISE_STARTS)
