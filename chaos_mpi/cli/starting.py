"""Whom a job on several hosts waits for while it starts, for the person who waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos_mpi.agent.exchange import posted
from chaos_mpi.agent.placement import is_here

#: A start that takes so long is spoken of, seconds; and again after as long.
PATIENCE_S = 10.0
#: So many hosts are named.
_NAMED = 8


class StartProgress:
    """Says which hosts have not started their ranks yet, again and again until all have.

    Args:
        run_dir: the job's private directory.
        hosts: of the ranks.
        now: the time, seconds.
        say: prints a line.
    """

    def __init__(self, run_dir: Path, hosts: Sequence[str], now: float, say: Callable[[str], None]) -> None:
        self._run_dir, self._say = run_dir, say
        self._wanted = Counter(map(_local, hosts))
        self._next_s = now + PATIENCE_S

    def look(self, now: float) -> None:
        """To be called now and then."""
        if now < self._next_s:
            return
        self._next_s = now + PATIENCE_S
        entries = (entry for entry in posted(self._run_dir) if entry.first_size is not None)
        started = Counter(_local(entry.contact.host) for entry in entries)
        if missing := self._wanted - started:
            ranks = self._wanted.total()
            where = sorted(host or "this host" for host in missing)
            self._say(f"{ranks - missing.total()} of {ranks} ranks have started; waiting for {names(where)}")
        else:
            self._next_s = float("inf")


def _local(host: str) -> str:
    """One name for this machine, which has several."""
    return "" if is_here(host) else host


def names(hosts: Sequence[str]) -> str:
    """Hosts by name, unless there are many."""
    more = len(hosts) - _NAMED
    return ", ".join(hosts[:_NAMED]) + (f" and {more} more" if more > 0 else "")
