"""``chaosctl log``: what happens to a running job, from what its members remember."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from chaos_mpi.cli.control import follow
from chaos_mpi.cli.status import NOBODY, Job, look
from chaos_mpi.cli.timeline import Event, Line, story

#: How often a log that is followed goes on, seconds.
PERIOD_S = 0.25
#: What was first heard of more recently than that may not have been told by all members, seconds.
SETTLE_S = 0.5
#: A job of which nobody has answered for so long has ended or hangs, seconds.
SILENT_S = 3.0
#: A member that is listened to, and says nothing for so long, hangs, seconds: when all is well it says so more often.
HANGS_S = 10.0
#: What a member that has reached the end of its job says of it. Others may go on without it.
_ENDINGS = ("finished", "stopped", "failed")


def told(events: Sequence[Event]) -> list[Line]:
    """The story of a job, as :func:`chaos_mpi.cli.timeline.story` tells it, with what was asked of it, by time."""
    ordered = sorted(events, key=lambda event: float(event["t"]))
    asked: dict[tuple[str, ...], Line] = {}
    for event in ordered:
        if (line := _asked(event)) is not None:
            asked.setdefault(line.key, line)  # what all have agreed on is told by all
    return sorted([*story(ordered), *asked.values()], key=lambda line: line.t)


def _asked(event: Event) -> Line | None:
    """What somebody wants of the job, in words; None for an event that says nothing of it."""
    name = event["event"]
    key = f"{event['epoch']} {event['step']}"
    if name == "join_requested":
        host = f" on {event['host']}" if event["host"] else ""
        text, key = f"one more rank{host} was asked for ({event['id']})", event["id"]
    elif name == "join_spawned":
        again = f", attempt {event['attempt']}" if event["attempt"] > 1 else ""
        text, key = f"{event['member']} starts a rank ({event['id']}{again})", f"{event['id']} {event['attempt']}"
    elif name == "join_failed":
        host = f" on {event['host']}" if event["host"] else ""
        text, key = f"no rank joins{host} ({event['id']}): {event['reason']}", event["id"]
    elif name == "rank_crashed":
        fate = f"not started again: {event['obstacle']}" if event["obstacle"] else "started again"
        text, key = (
            f"the rank on {event['host']} crashed ({event['how']}) and is {fate}",
            f"{key} {event['host']} {fate} {event.get('number')}",
        )
    elif name == "hosts_changed":
        hosts = ", ".join(f"{host}:{slots}" for host, slots in event["hosts"].items())
        text = f"the hosts are now {hosts or 'none'}"
    elif name == "scaled":
        text = f"the scale policy lets {len(event['joins'])} join and {len(event['leaves'])} leave"
    else:
        return None
    return Line((name, key), event["t"], event["step"], text)


def as_text(line: Line) -> str:
    """One line of the log."""
    return f"{time.strftime('%H:%M:%S', time.localtime(line.t))}  step {line.step:6d}  {line.text}"


class Listeners:
    """Take down what the members on this machine tell of, each in a thread; newcomers are found by :meth:`look`.

    Args:
        directory: the job's private directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._threads: dict[Path, threading.Thread] = {}
        self._heard: set[Path] = set()

    def look(self) -> bool:
        """Listen to whoever is not listened to yet; whether anybody is, and speaks."""
        for path in self._directory.glob("control-*.sock"):
            if path not in self._threads or not self._threads[path].is_alive():
                self._threads[path] = threading.Thread(target=self._listen, args=(path,), daemon=True)
                self._threads[path].start()
        return bool(self._heard)

    def _listen(self, path: Path) -> None:
        for event in follow(path, HANGS_S):
            self._heard.add(path)
            if event is not None:
                self._told.put(event)
        self._heard.discard(path)

    def events(self) -> list[Event]:
        """What has been told since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._told.get_nowait())
        return found


class Following:
    """Tells each thing once, when all members have had time to tell of it.

    That is by the clock of who listens: those of other machines may be ahead of it.
    """

    def __init__(self) -> None:
        self._events: dict[tuple[str, float, str], Event] = {}
        self._told: set[tuple[str, ...]] = set()
        self._heard_at: dict[tuple[str, ...], float] = {}
        self._waits = False

    @property
    def ended(self) -> bool:
        """Whether a member has told of the end of the job."""
        return any(e["event"] == "session_ended" and e["outcome"] in _ENDINGS for e in self._events.values())

    def feed(self, events: Sequence[Event], now: float, until: float = -math.inf) -> list[Line]:
        """The lines that are new, and of which all members have told, or can have.

        Args:
            events: what was heard since the last call.
            now: monotonic seconds.
            until: all have been asked for what happened up to this time (Unix seconds, as in the events).
        """
        if not events and not self._waits:
            return []
        for event in events:
            self._events.setdefault((event["member"], event["mono"], event["event"]), event)
        lines = [line for line in told(list(self._events.values())) if line.key not in self._told]
        new = [
            line for line in lines
            if self._heard_at.setdefault(line.key, now) <= now - SETTLE_S or line.t <= until
        ]  # fmt: skip
        self._waits = len(new) < len(lines)
        self._told.update(line.key for line in new)
        return new


def member_id(job: Job, member: str) -> str:
    """The id of the member that is meant, by its id or its rank.

    Raises:
        click.ClickException: nobody has told of such a member.
    """
    if member.isdigit() and int(member) < len(job["members"]):
        return str(job["members"][int(member)])
    if member in job["members"] or any(event["member"] == member for event in job["events"]):
        return member
    raise click.ClickException(f"there is no member {member}; see chaosctl status")


def show(directory: Path, member: str | None, last: int | None, following: bool) -> Iterator[str]:
    """The lines of a running job's log, the ``last`` ones only if given; then those that come, if ``following``.

    Raises:
        click.ClickException: nobody answers, or there is no such member.
    """
    if (job := look(directory)) is None:
        raise click.ClickException(NOBODY)
    chosen = member_id(job, member) if member is not None else None
    seen, newest = Following(), max((float(event["t"]) for event in job["events"]), default=0.0)
    until = max(newest, time.time()) - SETTLE_S if following else math.inf
    lines = seen.feed(_of(chosen, job["events"]), time.monotonic(), until)
    yield from map(as_text, lines if last is None else lines[max(0, len(lines) - last) :])
    if following:
        yield from _follow(directory, chosen, seen)


def _follow(directory: Path, member: str | None, seen: Following) -> Iterator[str]:
    listeners, heard_at = Listeners(directory), time.monotonic()
    while directory.is_dir() and time.monotonic() < heard_at + SILENT_S:
        if listeners.look():
            heard_at = time.monotonic()
        time.sleep(PERIOD_S)
        yield from map(as_text, seen.feed(_of(member, listeners.events()), time.monotonic()))
    yield from map(as_text, seen.feed(_of(member, listeners.events()), time.monotonic(), math.inf))
    if seen.ended:
        yield "the job has ended"
    elif not directory.is_dir():
        yield "nothing of the job is left on this machine; it may go on elsewhere"
    else:
        yield "nobody answers any more: the job has ended, or hangs"


def _of(member: str | None, events: Sequence[Event]) -> list[Event]:
    return [event for event in events if member in (None, event["member"])]
