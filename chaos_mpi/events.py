"""The event log: what happened when, one JSON object per line, written without ever holding up a step."""

from __future__ import annotations

import atexit
import glob
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("chaos_mpi.events")

#: The names that an event can have; everything that reads the log relies on them.
EVENTS = frozenset(
    {
        "session_started",
        "step",
        "failure_detected",
        "view_committed",
        "recovered",
        "hosts_changed",
        "rank_crashed",
        "scaled",
        "join_requested",
        "join_spawned",
        "join_cut",
        "shard_plan",
        "shards_received",
        "join_active",
        "join_failed",
        "leave_committed",
        "link_changed",
        "detour_failed",
        "witness_changed",
        "stalled",
        "resumed",
        "session_ended",
    }
)

#: Keys that every line has; a field of an event cannot have one of these names.
RESERVED = frozenset({"t", "mono", "member", "rank", "size", "epoch", "step", "event"})

#: Events waiting for a file system that hangs; more are dropped, so that memory stays bounded.
MAX_WAITING = 100_000

#: Events that are kept in memory for people who look at the running job.
RECENT = 20


class RecentEvents:
    """The last events of this member, steps left out; kept whether or not there is a log. For any thread to read.

    Attributes:
        stalled_s: the ``seconds`` of all ``stalled`` events so far, by their cause.
    """

    def __init__(self) -> None:
        self.stalled_s: dict[str, float] = {}
        self._lines: deque[str] = deque(maxlen=RECENT)
        self._followers: list[queue.SimpleQueue[str | None]] = []
        self._ended = False

    def add(self, record: dict[str, Any], line: str) -> None:
        """Keep an event, given also as its line of the log."""
        self._lines.append(line)
        for follower in tuple(self._followers):
            follower.put(line)
        if record["event"] == "stalled":
            cause = str(record.get("cause", ""))
            self.stalled_s[cause] = self.stalled_s.get(cause, 0.0) + float(record.get("seconds", 0.0))

    def events(self) -> list[dict[str, Any]]:
        """At most the last :data:`RECENT` events, oldest first."""
        return [json.loads(line) for line in list(self._lines)]

    def follow(self, pause_s: float) -> Iterator[str]:
        """The last events, and then each as it happens, as lines of the log, until :meth:`end`. One may come twice.

        Where nothing happens for ``pause_s`` seconds an empty line comes, so that who follows can be looked after.
        """
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # Without a lock, which a signal handler could find taken: rather one event twice than one left out.
        self._followers.append(lines)
        try:
            yield from list(self._lines)
            while not (self._ended and lines.empty()):
                try:
                    line = lines.get(timeout=pause_s)
                except queue.Empty:
                    line = ""
                if line is None:
                    return
                yield line
        finally:
            self._followers.remove(lines)

    def end(self) -> None:
        """Nothing comes any more."""
        self._ended = True
        for follower in tuple(self._followers):
            follower.put(None)


class EventLog:
    """Appends events to a file from a background thread.

    Several processes may share one file: it is opened with ``O_APPEND``, and every event is one ``write``.

    Args:
        path_template: the file, with ``%h`` and ``%m`` standing for host and member; None or "" for no log.
        member: id of this member, "host:pid".
        host: name of this host.

    Attributes:
        recent: the last events, also where there is no log.
    """

    def __init__(self, path_template: str | os.PathLike[str] | None, member: str, host: str) -> None:
        self.path = expand(os.fspath(path_template), member, host) if path_template else None
        self.recent = RecentEvents()
        self._member = member
        self._queue: queue.SimpleQueue[str | threading.Event | None] = queue.SimpleQueue()
        self._open = self.path is not None
        self._overflowed = False
        self._thread: threading.Thread | None = None
        if self._open:
            self._owner = os.getpid()
            self._thread = threading.Thread(target=self._write_all, name="chaos_mpi-events", daemon=True)
            self._thread.start()
            atexit.register(self._close_at_exit)

    def emit(self, event: str, *, rank: int, size: int, epoch: int, step: int, **fields: Any) -> None:
        """Log one event; time is taken here, writing happens later. Without a log it is kept as a recent one only.

        Values may be anything that JSON knows, and numpy or torch numbers; NaN and infinity become null.

        Raises:
            ValueError: the event's name is not in :data:`EVENTS`, or a field has a name in :data:`RESERVED`.
        """
        if event not in EVENTS:
            raise ValueError(f"unknown event {event!r}; the event log knows: {', '.join(sorted(EVENTS))}")
        if not self._open and event == "step":
            return  # nobody wants it, and steps are to cost nothing
        if not RESERVED.isdisjoint(fields):
            taken = sorted(RESERVED & fields.keys())
            raise ValueError(f"a field of event {event!r} has a reserved name: {taken}")
        record: dict[str, Any] = {
            "t": time.time(),
            "mono": time.monotonic(),
            "member": self._member,
            "rank": rank,
            "size": size,
            "epoch": epoch,
            "step": step,
            "event": event,
            **fields,
        }
        # Made into text at once, so that a list which the caller changes later is logged as it is now.
        line = _to_line(record)
        if event != "step":
            self.recent.add(record, line)
        if self._open:
            self._enqueue(line)

    def _enqueue(self, line: str) -> None:
        if self._queue.qsize() < MAX_WAITING:
            self._queue.put(line)
        elif not self._overflowed:
            self._overflowed = True
            log.warning("the event log %s cannot keep up; events are being dropped", self.path)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all events so far are in the file; False if that takes longer than ``timeout_s``."""
        thread = self._thread
        if thread is None or not thread.is_alive() or os.getpid() != self._owner:
            return True
        written = threading.Event()
        self._queue.put(written)
        return written.wait(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Write what is waiting and stop; later events are ignored. False if it takes over ``timeout_s``."""
        thread, self._thread, self._open = self._thread, None, False
        if thread is None or os.getpid() != self._owner:
            return True
        atexit.unregister(self._close_at_exit)
        self._queue.put(None)
        thread.join(timeout_s)
        return not thread.is_alive()

    def _close_at_exit(self) -> None:
        self.close(2.0)

    def _write_all(self) -> None:
        """The thread: everything that touches the file happens here."""
        descriptor: int | None = None
        while (entry := self._queue.get()) is not None:
            if isinstance(entry, threading.Event):
                entry.set()
            else:
                try:
                    if descriptor is None:
                        descriptor = self._open_file()
                    line = entry.encode()
                    if os.write(descriptor, line) != len(line):
                        raise OSError("the disk took only a part of an event; it is probably full")
                except OSError as error:
                    log.error("the event log %s cannot be written and is off now: %s", self.path, error)
                    self._open = False
                    break
        if descriptor is not None:
            os.close(descriptor)
        self._release_waiting()

    def _open_file(self) -> int:
        assert self.path is not None
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _release_waiting(self) -> None:
        """Let go of whoever waits in flush() although nothing more will be written."""
        while True:
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                return
            if isinstance(entry, threading.Event):
                entry.set()


def expand(path_template: str, member: str, host: str) -> str:
    """The path with ``%h`` and ``%m`` replaced by host and member, made fit for a file name."""
    values = {"%h": _for_file_name(host), "%m": _for_file_name(member)}
    return re.sub("%[hm]", lambda match: values[match.group()], path_template)


def read_events(path_or_glob: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All events of a file, or of the files that a pattern matches, in the order of their time ``t``.

    ``%h`` and ``%m`` in the pattern stand for any host and member. Lines that are not whole, as a crash of
    the machine can leave them, are skipped; with a warning, unless it is the last line of a file.

    Raises:
        FileNotFoundError: there is no such file, and the name is not a pattern.
    """
    name = os.fspath(path_or_glob)
    pattern = re.sub("%[hm]", "*", name)
    is_file = os.path.exists(name) or not glob.has_magic(pattern)
    paths = [name] if is_file else sorted(glob.glob(pattern))
    events = [event for path in paths for event in _read_one(Path(path))]
    return sorted(events, key=lambda event: float(event.get("t", 0.0)))


def _read_one(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number != len(lines):
                log.warning("%s, line %d, is not an event and is skipped: %s", path, number, error)
            continue
        yield event


def _for_file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)


def _to_line(record: dict[str, Any]) -> str:
    try:
        text = json.dumps(record, allow_nan=False, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError, RecursionError):
        # Rare: NaN, odd keys, cycles. Cleaning every event would cost more than the event itself.
        text = json.dumps(_clean(record, 0), allow_nan=False, separators=(",", ":"))
    return text + "\n"


def _plain(value: Any) -> Any:
    """What JSON does not know: numpy's and torch's numbers become numbers, sets lists, the rest text."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _clean(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth > 20:
        return "..."
    if isinstance(value, dict):
        return {str(key): _clean(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(entry, depth + 1) for entry in value]
    plain = _plain(value)
    return plain if isinstance(plain, str) else _clean(plain, depth + 1)
