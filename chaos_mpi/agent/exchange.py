"""How agents learn of each other: each proxy notes its agent's contact down beside its entry in the job's registry.

The witness, which is on the launch host, does so itself.

The directory is on the launch host and only its owner can enter it. To and from the agents the contacts go through the
streams of :mod:`chaos_mpi.agent.frames`, so a stranger can neither read nor add any.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.processes import is_running, start_time
from chaos_mpi.agent.registry import Ends
from chaos_mpi.errors import ConfigError

log = logging.getLogger("chaos_mpi.agent")

#: How often the directory is looked at, at first and later, seconds.
_EAGER_S, _CALM_S = 0.2, 1.0
#: When "later" begins.
_EAGER_FOR_S = 60.0


class Posted(NamedTuple):
    """A contact as its proxy has noted it down.

    Attributes:
        contact: of the agent.
        job: the PMIx namespace of its rank; every spawn makes a new one.
        rank: its number in that.
        pid: of the proxy.
        started: when the proxy was started.
        first_size: how many ranks the job has begun with, if this is one of them; else None.
    """

    contact: Contact
    job: str
    rank: int
    pid: int
    started: int
    first_size: int | None

    @property
    def is_there(self) -> bool:
        """Whether the proxy still runs."""
        return is_running(self.pid, self.started)


class Exchange:
    """The part of one proxy, or of the witness.

    Args:
        directory: of the job's registry.
        job: the PMIx namespace of this proxy's rank; None for the witness.
        rank: its number in that.
        first_size: how many ranks the job has begun with, if this rank is one of them; else None.
        send: takes what the agent is to be told, as JSON: all contacts, and the names of the first members once these
            are known (None until then, and for a newcomer). Joins whose processes have ended, see :mod:`.registry`. And
            the members whose proxies have ended: ``mpirun``, as long as it lives, has told the others that they are
            dead.
        launcher: process id of ``mpirun``, this proxy's parent; None for the witness, which has another.
    """

    def __init__(
        self,
        directory: Path,
        job: str | None,
        rank: int,
        first_size: int | None,
        send: Callable[[dict[str, Any]], None],
        launcher: int | None = None,
    ) -> None:
        self._directory, self._job, self._rank, self._launcher = directory, job, rank, launcher
        self._first_size, self._send = first_size, send
        self._known: dict[str, Posted] = {}
        self._ends = Ends(directory)
        self._sent: dict[str, Any] | None = None

    def post(self, contact: Contact) -> None:
        """Note the contact of this proxy's agent down.

        Raises:
            OSError: the directory cannot be written to.
        """
        pid = os.getpid()
        entry = {
            "contact": contact.to_json(), "job": self._job or "", "rank": self._rank, "pid": pid,
            "started": start_time(pid), "first_size": self._first_size,
        }  # fmt: skip
        new = self._directory / f"contact-{pid}.new"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(entry, file)
        new.rename(self._directory / f"contact-{pid}.json")

    async def follow(self) -> None:
        """Tell the agent of all others, as they come; does not return."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while True:
            self.look()
            await asyncio.sleep(_EAGER_S if loop.time() - began_s < _EAGER_FOR_S else _CALM_S)

    def look(self) -> None:
        """Read the directory, and tell the agent if there is news."""
        for entry in posted(self._directory, {known.pid for known in self._known.values()}):
            member = entry.contact.member
            # A newcomer whose proxy has gone before anybody knew it is no use. The first members all count: each of
            # them must begin with the same ones.
            if member not in self._known and (entry.first_size is not None or entry.is_there):
                self._known[member] = entry
        job, size = self._beginning()
        first = None if size is None else first_members(self._known.values(), job, size)
        contacts = [entry.contact.to_json() for entry in self._known.values()]
        gone = [entry.contact.member for entry in self._known.values() if not entry.is_there]
        # Only now: the proxies end as well when mpirun has ended, and their ranks go on then.
        disowned = gone if self._launcher == os.getppid() else []
        news = {"contacts": contacts, "first": first, "ended": self._ends.look(), "disowned": disowned}
        if news != self._sent:
            self._sent = news
            self._send(news)

    def _beginning(self) -> tuple[str, int | None]:
        """The namespace of the first ranks, and their number; the witness takes it from what they have noted down."""
        if self._job is not None:
            return self._job, self._first_size
        begun = (entry for entry in self._known.values() if entry.first_size is not None)
        return next(((entry.job, entry.first_size) for entry in begun), ("", None))


def posted(directory: Path, without: Collection[int] = ()) -> Iterable[Posted]:
    """All contacts in a directory but those of the proxies with these numbers; what cannot be read is passed over."""
    skipped = {f"contact-{pid}.json" for pid in without}
    for path in sorted(directory.glob("contact-*.json")):
        if path.name in skipped:
            continue
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            fields = json.loads(path.read_text())
            yield Posted(
                Contact.from_json(fields["contact"]), str(fields["job"]), int(fields["rank"]), int(fields["pid"]),
                int(fields["started"]), None if fields["first_size"] is None else int(fields["first_size"]),
            )  # fmt: skip


def is_taken(directory: Path, contact: Contact) -> bool:
    """Whether another agent was there under this name: a container that is started again may give the same numbers."""
    return any(
        entry.contact.member == contact.member and entry.contact.key != contact.key for entry in posted(directory)
    )


def first_members(entries: Iterable[Posted], job: str, size: int) -> list[str] | None:
    """The names of the ranks that a job begins with, in order of rank; None while some are missing.

    Raises:
        ConfigError: there are more than there should be.
    """
    found = {entry.rank: entry.contact.member for entry in entries if entry.job == job}
    if len(found) > size or any(not 0 <= rank < size for rank in found):
        raise ConfigError(f"the job {job} begins with {size} ranks, but the contacts are of ranks {sorted(found)}")
    return [found[rank] for rank in range(size)] if len(found) == size else None
