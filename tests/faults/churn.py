"""Joins, leaves and deaths, one after the other, drawn at random, in a job that trains all the while.

Everything is done from outside, as a user or a failing machine would do it: requests go to the control sockets, deaths
are SIGKILL, or are armed at a point of the training processes (:func:`fault_points.arm`). The number of ranks that are
certain to stay is kept between :data:`LEAST` and :data:`MOST`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_points import arm
from jobs import Job, JobError

LEAST, MOST = 2, 6
#: Training has to go on within this time, whatever has happened.
STALL_LIMIT_S = 25.0
#: What a newcomer has until it is ready, and three of them, and a request all in all.
JOIN_TIMEOUT_S = 30.0
JOIN_LIMIT_S = 3 * JOIN_TIMEOUT_S + 30.0
#: So many newcomers at most die before MPI knows them, since nobody notices before :data:`JOIN_TIMEOUT_S`.
EARLY_DEATHS = 2
#: How long after an armed point a process dies, in the mean, if not at once.
DELAY_S = 0.01
#: Points at which it dies at once or not at all. Right after them all make a communicator, and a death in these few
#: milliseconds can leave the others in a call to Open MPI that nothing ends, or end them by a segmentation fault: the
#: new communicator is in Open MPI's table before it can be told of a failure (5.0, ``ompi_comm_set_rank_failed``).
AT_ONCE = (
    "newcomer:register", "newcomer:enter", "members:invite", "members:grow", "members:part", "phase:agree",
    "phase:shrink",
)  # fmt: skip
#: Longest pause between two events.
PAUSE_S = 1.0

IN_JOIN = "death of a newcomer in its join"
#: Where a member may die in a join, or a leave, or another one's death.
IN_JOINS = ("members:invite", "members:grow", "members:replicate", "members:serve", "members:change_view")
IN_OVERLAPS = ("members:grow", "members:cut", "members:activate", "members:serve")
IN_LEAVES = ("members:part", "members:change_view")
IN_RECOVERIES = ("phase:agree", "phase:shrink", "phase:exchange", "phase:commit")
#: Where a newcomer may die.
OF_NEWCOMERS = ("newcomer:register", "newcomer:enter", "newcomer:fetch", "newcomer:verify", "newcomer:enter_view")
OF_FOLLOWERS = ("newcomer:measure", "newcomer:await_cut", "newcomer:fetch_planned", "newcomer:follow")


class Logs:
    """What the job's members have logged so far.

    Attributes:
        step: the last finished one.
        members: those of the newest view.
        started: process ids of those that have opened a session.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._read: Counter[Path] = Counter()
        self._epoch = -1
        self.step = 0
        self.members: tuple[str, ...] = ()
        self.started: set[int] = set()

    def update(self) -> None:
        """Read on."""
        for path in self._folder.glob("events-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read[path])
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] += len(whole)
            for line in whole.splitlines():
                self._note(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        name = event["event"]
        self.started.add(_pid(event["member"]))
        starts = name == "session_started" and event["size"] == self._ranks
        if (starts or name == "view_committed") and event["epoch"] > self._epoch:
            self._epoch, self.members = event["epoch"], tuple(event["members"])
        elif name == "step":
            self.step = max(self.step, event["step"])


@dataclass
class Request:
    """A request that was sent to a member's control socket.

    Attributes:
        words: what became of it so far: ``starting``, ``active``, ``left``, ``refused``, or ``lost`` when the
            member that was asked has gone.
    """

    path: Path
    request: dict[str, Any]
    words: list[str] = field(default_factory=list)

    def begin(self) -> Request:
        """Send it, in a thread that waits for the answers."""
        threading.Thread(target=self._converse, daemon=True).start()
        return self

    def _converse(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for answer in converse(self.path, self.request):
                self.words.append(answer.get("what", "refused"))
        self.words.append("lost")


def converse(path: Path, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Send a request to a control socket and yield the answers."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rwb") as stream:
        connection.settimeout(JOIN_LIMIT_S)
        connection.connect(str(path))
        stream.write(json.dumps(request).encode() + b"\n")
        stream.flush()
        stream.readline()  # whom this is
        for line in stream:
            yield json.loads(line)


class Churn:
    """Lets ranks join, leave and die in a job.

    Args:
        job: it runs ``train.py``.
        ranks: how many it started with.
        overlap: whether its newcomers catch up while the members train on.
        seed: what is drawn depends on it, and on how fast the job is.

    Attributes:
        done: how often each kind of event was caused.
        told_to_leave: members that were asked to go.
    """

    def __init__(self, job: Job, ranks: int, *, overlap: bool, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.told_to_leave: set[str] = set()
        self._job, self._rng = job, random.Random(seed)
        self._logs = Logs(job.folder, ranks)
        self._overlap = overlap
        self._armed: dict[Path, str] = {}  # and what they are called
        self._joins: list[tuple[Request, float]] = []
        self._early_deaths = 0
        self._moved = time.monotonic(), -1

    def run(self, events: int) -> None:
        """Cause so many events, then wait until all is quiet and have the training end.

        Raises:
            JobError: the job has ended, or stands still.
        """
        self._await(lambda: self._logs.step > 0, "the first step", JOIN_LIMIT_S)
        while self.done.total() < events:
            self._one()
            until = time.monotonic() + self._rng.uniform(0.0, PAUSE_S)
            self._await(lambda: time.monotonic() > until, "a pause", PAUSE_S + STALL_LIMIT_S)  # noqa: B023
        self._disarm()
        self._await(lambda: not self._pending(), "the last joins were over", JOIN_LIMIT_S)
        (self._job.folder / "stop").touch()

    # -- events ----------------------------------------------------------------------------------------

    def _one(self) -> None:
        """Cause one of the events that are possible now."""
        taken_in = self._being_taken_in()
        staying, pending = self._staying(), self._pending()
        spare = len(staying) - LEAST - sum(IN_JOIN not in kind for kind in self._armed.values())
        room = MOST - len(self._living()) - pending
        kinds: dict[str, tuple[int, Callable[[], None]]] = {}
        if room > 0:
            kinds["joins"] = 40, lambda: self._join(self._rng.randint(1, min(room, 3)))
        if spare > 0:
            kinds["leave"] = 20, lambda: self._leave(self._rng.choice(staying))
        if taken_in:
            spare = 0  # deaths at any moment of it are armed
        if spare > 0:
            kinds["death"] = 20, lambda: self._kill(self._rng.choice(staying))
            kinds["death of rank 0"] = 10, lambda: self._kill(staying[0])
            if not self._armed:
                kinds["leave, and a death in it"] = 10, lambda: self._leave_with_a_death(staying)
                if room > 0:
                    kinds["join, and a death in it"] = 20, lambda: self._join_with_a_death()
        if spare > 1:
            kinds["two deaths at once"] = 10, lambda: self._kill(*self._rng.sample(staying, 2))
            kinds["death, and one in the recovery"] = 10, lambda: self._kill_with_a_death(staying)
        if pending and spare > 0 and (sponsors := self._sponsors() & set(staying)):
            kinds["death of a sponsor"] = 20, lambda: self._kill(self._rng.choice(sorted(sponsors)))
        if pending and self._early_deaths < EARLY_DEATHS and (early := self._newcomers()):
            kinds["death of a newcomer without MPI"] = 2, lambda: self._kill_early(early)
        if pending and not self._armed:
            points = OF_NEWCOMERS + OF_FOLLOWERS if self._overlap else OF_NEWCOMERS
            kinds[f"{IN_JOIN} is armed"] = 20, lambda: self._arm(IN_JOIN, points)
        if not kinds:
            if not pending:
                self._disarm()
            return
        kind = self._rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        print(f"{time.monotonic():.3f} {kind}: {len(staying)} staying, {pending} on their way", flush=True)
        kinds[kind][1]()

    def _join(self, n: int) -> None:
        living = self._living()
        for _ in range(n if living else 0):
            request = Request(self._socket(self._rng.choice(living)), {"do": "add", "n": 1}).begin()
            self._joins.append((request, time.monotonic()))
            self.done["join"] += 1

    def _leave(self, member: str) -> None:
        self.told_to_leave.add(member)
        if self._rng.random() < 0.5:
            os.kill(_pid(member), signal.SIGTERM)
        else:
            Request(self._socket(member), {"do": "remove", "member": member}).begin()
        self.done["leave"] += 1

    def _kill(self, *members: str) -> None:
        for member in members:
            self._kill_pid(_pid(member))

    def _kill_pid(self, pid: int) -> None:
        (self._job.folder / f"died-{pid}").touch()
        with contextlib.suppress(ProcessLookupError):
            self._job.kill(pid)
        self.done["death"] += 1

    def _kill_early(self, pids: list[int]) -> None:
        self._early_deaths += 1
        self._kill_pid(self._rng.choice(pids))

    def _join_with_a_death(self) -> None:
        self._arm("death of a member in a join", IN_OVERLAPS if self._overlap else IN_JOINS)
        self._join(1)

    def _leave_with_a_death(self, staying: list[str]) -> None:
        self._arm("death of a member in a leave", IN_LEAVES)
        if len(staying) - 1 > LEAST:
            self._leave(self._rng.choice(staying))

    def _kill_with_a_death(self, staying: list[str]) -> None:
        self._arm("death of a member in a recovery", IN_RECOVERIES)
        self._kill(self._rng.choice(staying))

    def _arm(self, what: str, points: tuple[str, ...]) -> None:
        point = self._rng.choice(points)
        delay_s = 0.0 if point in AT_ONCE else self._rng.choice((0.0, self._rng.expovariate(1 / DELAY_S)))
        self._armed[arm(self._job.folder, point, delay_s)] = what

    def _disarm(self) -> None:
        for path in self._armed:
            path.unlink(missing_ok=True)
        self._armed.clear()

    # -- what there is ---------------------------------------------------------------------------------

    def _living(self) -> list[str]:
        """Members of the newest view that live."""
        return [member for member in self._logs.members if self._lives(_pid(member))]

    def _staying(self) -> list[str]:
        """Those of them that were not told to go."""
        return [member for member in self._living() if member not in self.told_to_leave]

    def _pending(self) -> int:
        """How many newcomers may be on their way."""
        return max(len(self._status_joins()), sum(not ({"active", "refused"} & set(r.words)) for r, _ in self._joins))

    def _lives(self, pid: int) -> bool:
        if (self._job.folder / f"died-{pid}").exists():
            return False
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        except OSError:
            return False

    def _sponsors(self) -> set[str]:
        return {join["sponsor"] for join in self._status_joins()}

    def _newcomers(self) -> list[int]:
        """Process ids of those that have not opened a session yet."""
        pids = [int(path.read_text()) for path in self._job.folder.glob("mark-pid.*00")]
        return sorted(pid for pid in pids if pid not in self._logs.started and self._lives(pid))

    def _being_taken_in(self) -> bool:
        """Whether a newcomer is up that is no member yet, so that it may be connected with all at any moment.

        A death in the very milliseconds of that can leave all others in a call to Open MPI that nothing ends.
        """
        pids = [int(path.read_text()) for path in self._job.folder.glob("mark-pid.*00")]
        members = {_pid(member) for member in self._logs.members}
        return any(pid in self._logs.started and pid not in members and self._lives(pid) for pid in pids)

    def _status_joins(self) -> list[dict[str, Any]]:
        for member in self._living():
            with contextlib.suppress(OSError, ValueError):
                for answer in converse(self._socket(member), {"do": "status"}):
                    joins: list[dict[str, Any]] = answer["joins"]
                    return joins
        return []

    def _socket(self, member: str) -> Path:
        (run_dir,) = (self._job.folder / "t").resolve().glob("chaosrun-*")
        return run_dir / f"control-{_pid(member)}.sock"

    # -- waiting ---------------------------------------------------------------------------------------

    def _await(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        limit = time.monotonic() + limit_s

        def looked() -> bool:
            self._logs.update()
            self._forget()
            now = time.monotonic()
            if self._logs.step != self._moved[1]:
                self._moved = now, self._logs.step
            stalled = self._logs.step > 0 and now - self._moved[0] > STALL_LIMIT_S
            if stalled or now > limit:
                raise JobError(f"waited {limit_s:.0f} s for {what} at step {self._logs.step}\n{self._stacks()}")
            return condition()

        self._job.wait_until(looked, what)

    def _forget(self) -> None:
        """Armed deaths that have happened, and requests that are over or were lost with the member that had them."""
        happened = [path for path in self._armed if not path.exists()]
        self.done.update(self._armed.pop(path) for path in happened)
        now = time.monotonic()
        self._joins = [
            (r, at) for r, at in self._joins
            if not ({"active", "refused"} & set(r.words)) and not ("lost" in r.words and now - at > 1.0)
        ]  # fmt: skip

    def _stacks(self) -> str:
        """Have every training process print its Python stacks into the job's output."""
        for path in self._job.folder.glob("mark-pid.*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGUSR1)
        time.sleep(1.0)  # for them to do it
        return "the stacks of all ranks are in the output of the job; the control socket says: " + json.dumps(
            self._status_joins()
        )


def _pid(member: str) -> int:
    return int(member.rpartition(":")[2])
