"""Rules by which a training process harms itself, or waits for another one to, at an exactly known point.

A rule is a dict::

    {"rank": 1, "at": "forward", "step": 5, "wait": ["dead:2", "forward.3"], "do": "die"}

Rank 1 (as numbered at the start), on reaching the point ``forward`` of the step that follows 5 finished ones, tells
the others so by the mark ``forward.1``, waits until rank 2 is dead and rank 3 has left its mark ``forward.3``, and
kills itself. ``do`` is ``die`` (SIGKILL), ``stop`` (SIGSTOP), ``raise``, ``join``, ``leave``, ``order`` (it proposes
the reverse order of all but the first), or missing; without ``step`` the rule holds at the first time the point is
reached. It waits for 40 seconds at most, or for ``limit_s``.

Points: ``start`` (before init), ``opened`` (after init), ``forward``, ``between buckets``, ``settle`` (all
gradients are on their way), ``before optimizer``, ``boundary``, ``evaluate``, ``close``, ``end`` (about to leave MPI),
``members:X`` (a member is about to call function X of a join or leave), ``members:observe N`` (it proposes a list of
hosts with N slots), ``members:propose X`` (something else), ``newcomer:X`` (a newcomer is about to),
``phase:X`` (about to begin part X of a recovery), and ``inside:X``: X is what ``session.phase`` begins with, and the
main thread is inside a call to MPI; such rules act from a thread of their own.

While a job runs, :func:`arm` has the next process that reaches a point kill itself there, whichever it is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WAIT_LIMIT_S = 40.0
POLL_S = 0.002

Rule = dict[str, Any]


class InjectedError(RuntimeError):
    """What a rule with ``do: raise`` raises."""


def own_label() -> int:
    """The number by which tests know this process: its rank at the start, or 100, 200, ... for those that join."""
    started = int(os.environ.get("PMIX_NAMESPACE", "@1").rpartition("@")[2]) - 1
    return 100 * started + int(os.environ["OMPI_COMM_WORLD_RANK"])


def arm(folder: Path, point: str, delay_s: float = 0.0) -> Path:
    """Have the first process that reaches ``point`` die ``delay_s`` later; the file returned is gone once one has."""
    path, new = folder / f"armed-{point}", folder / "new-armed"
    new.write_text(str(delay_s))
    return new.replace(path)


class FaultPoints:
    """The rules of this process.

    Args:
        rules: those of all ranks.
        folder: where ranks leave marks for each other.
        may_be_armed: whether to look for what :func:`arm` leaves there.
    """

    def __init__(self, rules: list[Rule], folder: Path, *, may_be_armed: bool = False) -> None:
        self._may_be_armed = may_be_armed
        self._rank = own_label()
        self._folder = folder
        self._rules = [rule for rule in rules if rule["rank"] == self._rank]
        self._awaited = {condition for rule in rules for condition in rule.get("wait", [])}
        self._moment: int | str = "start"
        self._main = threading.main_thread()
        self._session: Any = None
        self._mark(f"pid.{self._rank}", str(os.getpid()))
        self.enter("start")

    # -- points ----------------------------------------------------------------------------------------

    def reach(self, point: str) -> None:
        """The process is at ``point``; act on the rules that hold there."""
        for rule in [r for r in self._rules if r["at"] == point and r.get("step", self._moment) == self._moment]:
            self._rules.remove(rule)
            self._act(rule)
        if self._may_be_armed:
            self._die_if_armed(point)

    def enter(self, moment: int | str) -> None:
        """A step begins (its number is that of the steps finished), or ``close``."""
        self._moment = moment
        for rule in [r for r in self._rules if r["at"].startswith("inside:") and r.get("step", moment) == moment]:
            self._rules.remove(rule)
            threading.Thread(target=self._watch, args=(rule,), daemon=True).start()

    def attach(self, session: Any, module: torch.nn.Sequential) -> None:
        """Find the points that lie inside the engine and inside the model."""
        self._session = session
        module[2].register_forward_hook(lambda *_: self.reach("forward") if module.training else None)
        module[3].weight.register_hook(lambda _: self.reach("between buckets"))  # type: ignore[operator, union-attr]
        # The engine has no public hook at these places: a recovery is over in a millisecond, too fast to watch.
        regrouping = session._sequence._regrouping
        regrouping._set_phase = self._before_call(regrouping._set_phase, lambda phase: f"phase:{phase}")
        session.settle = self._settle(session.settle)
        persistence = session._persistence
        persistence.save_on_request = self._before_call(persistence.save_on_request, lambda *_: "save on request")
        self._attach_to_joins(session)
        from chaos_mpi.mpi import runtime

        runtime.stop = self._before_call(runtime.stop, lambda: "end")

    def _attach_to_joins(self, session: Any) -> None:
        from chaos_mpi.elastic import admission, catchup, newcomer, overlap
        from chaos_mpi.mpi import growth

        for owner, name, point in (
            (admission, "invite", "members:invite"),
            (admission, "replicate", "members:replicate"),
            (admission.StateSource, "serve", "members:serve"),
            (growth, "grow", "members:grow"),
            (growth, "part", "members:part"),
            (growth, "arrange", "members:arrange"),
            (session, "change_view", "members:change_view"),
            (overlap.Overlap, "cut", "members:cut"),
            (overlap.Overlap, "stop", "members:activate"),
            (session, "depart", "members:depart"),
            (catchup, "_measured", "newcomer:measure"),
            (catchup, "_await_cut", "newcomer:await_cut"),
            (catchup.StatePuller, "fetch_planned", "newcomer:fetch_planned"),
            (catchup.Follower, "follow", "newcomer:follow"),
            (catchup.Follower, "await_stop", "newcomer:await_stop"),
            (newcomer, "_register", "newcomer:register"),
            (newcomer, "_await_call", "newcomer:await_call"),
            (growth, "enter", "newcomer:enter"),
            (newcomer.StatePuller, "fetch", "newcomer:fetch"),
            (newcomer.StatePuller, "verify", "newcomer:verify"),
            (newcomer, "await_word", "newcomer:await_word"),
            (session, "enter_view", "newcomer:enter_view"),
        ):
            setattr(owner, name, self._before_call(getattr(owner, name), lambda *_, point=point: point))
        requests = session._negotiator.requests
        requests.propose = self._before_call(requests.propose, lambda proposal: f"members:propose {proposal.kind}")
        autoscaler = session._negotiator._autoscaler
        autoscaler._propose = self._before_call(
            autoscaler._propose, lambda proposal: f"members:observe {sum(slots for _, slots in proposal.hosts)}"
        )

    def _before_call(self, original: Callable[..., Any], point: Callable[..., str]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.reach(point(*args))
            return original(*args, **kwargs)

        return wrapper

    def _settle(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def settle(operation: Any) -> None:
            if operation.is_gradient_step:
                self.reach("settle")
            original(operation)

        return settle

    def _watch(self, rule: Rule) -> None:
        phase = rule["at"].removeprefix("inside:")
        while not self._is_inside(phase):
            time.sleep(0)
        self._act(rule)

    def _is_inside(self, phase: str) -> bool:
        frame = sys._current_frames().get(self._main.ident or 0)
        where = Path(frame.f_code.co_filename).name if frame is not None else ""
        return where == "world.py" and self._session is not None and self._session.phase.startswith(phase)

    # -- actions ---------------------------------------------------------------------------------------

    def _act(self, rule: Rule) -> None:
        self._mark(f"{rule['at']}.{self._rank}")
        limit = time.monotonic() + rule.get("limit_s", WAIT_LIMIT_S)
        for condition in rule.get("wait", []):
            while not self._holds(condition):
                if time.monotonic() > limit:
                    print(f"rank {self._rank} waited in vain for {condition!r} in {rule}", file=sys.stderr, flush=True)
                    os._exit(99)
                time.sleep(POLL_S)
        self._do(rule.get("do"))

    def _do(self, deed: str | None) -> None:
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        elif deed == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif deed == "join":
            self._session.request_join()
        elif deed == "leave":
            self._session.request_leave()
        elif deed == "order":
            # Asked for by the agents in a job on several hosts, when they have found slow links.
            first, *rest = self._session.members
            self._session._negotiator.requests.order((first, *reversed(rest)))
        elif deed == "raise":
            raise InjectedError(f"injected into rank {self._rank}")

    def _die_if_armed(self, point: str) -> None:
        mark = self._folder / f"died-{os.getpid()}"
        try:
            (self._folder / f"armed-{point}").rename(mark)  # one process succeeds
        except FileNotFoundError:
            return
        if delay_s := float(mark.read_text()):
            threading.Timer(delay_s, self._do, ("die",)).start()
        else:
            self._do("die")

    def mark(self, name: str) -> None:
        """Leave the mark ``name.<rank>``, if any rule asks for it."""
        if f"{name}.{self._rank}" in self._awaited:
            self._mark(f"{name}.{self._rank}")

    def _mark(self, name: str, text: str = "") -> None:
        path = self._folder / f"mark-{name.replace(' ', '_')}"
        temporary = self._folder / f"new-{os.getpid()}-{threading.get_ident()}"
        temporary.write_text(text)
        temporary.replace(path)

    def _holds(self, condition: str) -> bool:
        if condition.startswith("dead:"):
            return self._is_dead(int(condition.removeprefix("dead:")))
        return (self._folder / f"mark-{condition.replace(' ', '_')}").exists()

    def _is_dead(self, rank: int) -> bool:
        path = self._folder / f"mark-pid.{rank}"
        if not path.exists():
            return False
        try:
            status = Path(f"/proc/{path.read_text()}/stat").read_text()
        except OSError:
            return True
        return status.rpartition(")")[2].split()[0] in ("Z", "X")
