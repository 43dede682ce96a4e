"""A job that runs under another launcher is handed over to this one, when its new ranks are up."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import click

from chaos_mpi.agent.marks import may_live
from chaos_mpi.cli.control import RefusedError, ask, ask_all
from chaos_mpi.cli.outcome import lives, read_records
from chaos_mpi.cli.terminal import say
from chaos_mpi.config import load_settings
from chaos_mpi.elastic import kept
from chaos_mpi.membership import MOVES

_POLL_S = 0.05
#: How long one rank may take to answer, and how often those that do not are told again, seconds.
_ANSWER_LIMIT_S, _TELL_LIMIT_S = 5.0, 20.0
#: How long ranks that do not answer any more may take to end, seconds.
_END_LIMIT_S = 10.0


class HandOver(threading.Thread):
    """Waits for the new ranks, has the old ones end with their state kept, and tells the new ones.

    When that fails, the new ranks are told why, and end; the job goes on as it was.

    Args:
        old: private directory on this host of the job as it runs.
        name: under which the hosts are to keep its state.
        new: private directory of the job as it is started here.
        ranks: how many are started.
        limit_s: longest wait for the old ranks, seconds.

    Attributes:
        begun: whether the old ranks may have been told to end.
    """

    def __init__(self, old: Path, name: str, new: Path, ranks: int, limit_s: float) -> None:
        super().__init__(name="chaos_mpi-handover", daemon=True)
        self._old, self._name, self._new, self._ranks, self._limit_s = old, name, new, ranks, limit_s
        self._again = f"{kept.VARIABLE}={name} {shlex.join(['chaosrun', *sys.argv[1:]])}"
        self.begun = False

    def left(self) -> str:
        """At the end of the new job: how to go on if the state still waits on this host, because nobody took it."""
        if not kept.found(self._name):
            return ""
        return f"the state is still kept on the hosts; go on from it by: {self._again}"

    def run(self) -> None:
        """Ends with the process when the new ranks never come up."""
        while not ready(self._new, self._ranks):
            time.sleep(_POLL_S)
        self.begun = True
        began = time.monotonic()
        problem = ""
        try:
            step = self._ask()
        except click.ClickException as error:
            problem = error.message
        self._tell(problem)
        if not problem and step is None:
            say("the job has ended on this host, and has not said how: its state is looked for on all hosts")
        elif not problem:
            seconds = time.monotonic() - began
            say(f"the job goes on here after step {step}, handed over in {seconds:.2f} s")

    def _tell(self, problem: str) -> None:
        """Tell every new rank what became of it: one that is not told holds the others up."""
        limit = time.monotonic() + _TELL_LIMIT_S
        request = {"do": "state_kept", "problem": problem}
        while len(ask_all(self._new, request, _ANSWER_LIMIT_S)) < len(list(self._new.glob("control-*.sock"))):
            if time.monotonic() > limit:
                say("not all new ranks could be told of the hand-over")
                return

    def _ask(self) -> int | None:
        """Have the old ranks end; after which step they did, or None if they have ended here without a word.

        How to go on from the state is said only where it is kept for this launcher. Another one may have been faster:
        with its own name for the state, and from this one's nothing could go on.
        """
        try:
            *_, answer = ask(self._old, {"do": "hand_over", "name": self._name}, self._limit_s)
            if answer["what"] == "refused":
                raise RefusedError(answer["reason"])
        except RefusedError as error:
            as_it_was = "" if str(error).startswith(MOVES) else ", and goes on as it was"
            raise click.ClickException(f"the job was not handed over{as_it_was}: {error}") from error
        except click.ClickException as error:
            if self._ends():
                return None
            kept_here = f"It has kept its state; when it has ended, go on by: {self._again}"
            fate = kept_here if kept.found(self._name) else "It still runs: see chaosctl status"
            raise click.ClickException(f"the job was not handed over: {error}. {fate}") from error
        return int(answer["step"])

    def _ends(self) -> bool:
        """Whether the old job ends on this host, although it has not said so. It keeps its state before it ends."""
        limit = time.monotonic() + _END_LIMIT_S
        while any(map(may_live, self._old.glob("member-*.json"))):
            if time.monotonic() > limit:
                return False
            time.sleep(_POLL_S)
        return True


def begin(environ: Mapping[str, str], new: Path, ranks: int) -> HandOver | None:
    """Begin a hand-over if the environment, as ``chaosctl takeover`` leaves it, says that there is to be one."""
    if not (old := environ.get(kept.OLD_JOB)):
        return None
    begun = HandOver(Path(old), environ[kept.VARIABLE], new, ranks, load_settings(environ=environ).timeout_s)
    begun.start()
    return begun


def ready(job: Path, ranks: int) -> bool:
    """Whether all ranks of a new job that live wait for the state, and have come so far that they can be told."""
    records = read_records(job)
    started = {**records.starting, **records.members}
    waiting = {int(path.stem.rpartition("-")[2]) for path in job.glob("ready-*.json")}
    others = [pid for pid, record in started.items() if pid not in waiting and lives(pid, record)]
    return len(started) >= ranks and bool(waiting) and not others
