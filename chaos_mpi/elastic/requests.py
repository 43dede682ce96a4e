"""What this member wants of the others: an inbox that any thread may fill, and answers for who asked.

The :class:`~chaos_mpi.elastic.negotiator.Negotiator` takes it all to the members at a step boundary.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chaos_mpi.agent import launcher
from chaos_mpi.membership import Limits, Proposal

if TYPE_CHECKING:
    from chaos_mpi.agent.crashes import Crash
    from chaos_mpi.elastic.session import Session

#: What is said to those that asked for something too late.
_OVER = "the job ended before that"

#: What became of a request, told to who made it: the event and its fields.
Answer = Callable[[str, dict[str, Any]], None]


class Requests:
    """Proposals of one member. What asks for something may be called from any thread.

    Args:
        session: this member's part in the job.
        limits: how small and how large the job may get.
    """

    def __init__(self, session: Session, limits: Limits) -> None:
        self._session, self._limits = session, limits
        self._lock = threading.Lock()
        self._inbox: dict[tuple[str, str, int], Proposal] = {}
        self._answers: dict[str, Answer] = {}
        self._numbers = itertools.count(1)
        self._closed = False

    def __bool__(self) -> bool:
        return bool(self._inbox)

    # -- asking ----------------------------------------------------------------------------------------

    def join(self, host: str = "", answer: Answer | None = None) -> str:
        """Ask for one more rank; returns the id of the request."""
        return self._ask("join", host=host, answer=answer)

    def leave(self, member: str, answer: Answer | None = None) -> str:
        """Ask that a member goes; returns the id of the request."""
        return self._ask("leave", member=member, answer=answer)

    def move(self, name: str, answer: Answer | None = None) -> str:
        """Ask that all end, with the state kept under this name; returns the id of the request."""
        return self._ask("move", name=name, answer=answer)

    def stop(self, signal_name: str) -> None:
        """Ask that all end, because the job got this signal. Whoever is told asks for it, and it counts once."""
        self.propose(Proposal("stop", "stop", self._session.member, reason=signal_name))

    def restart(self, crash: Crash) -> None:
        """Another rank has crashed: ask for one more in its place. All do so who hear of it, and it counts once."""
        if not self._limits.restarts_an_hour:
            return
        obstacle = ""
        if launcher.is_lost():
            obstacle = "mpirun, which starts ranks, is gone"
        elif not self._session.has_state:
            obstacle = "the script has no TrainingState, which a new rank would start from"
        id_, host = f"restart-{crash.member}", crash.host or "localhost"
        self.propose(
            Proposal("restart", id_, crash.member, host, reason=crash.how, asked_at=time.time(), obstacle=obstacle)
        )

    def order(self, order: tuple[str, ...]) -> None:
        """The agents have found an order of the members in which slow links carry less."""
        self.propose(Proposal("order", "order", order=order))

    def propose(self, proposal: Proposal) -> None:
        """Put a proposal before all members at the next boundary."""
        with self._lock:
            self._inbox[proposal.kind, proposal.id, proposal.attempt] = proposal

    def _ask(self, kind: str, *, member: str = "", host: str = "", name: str = "", answer: Answer | None) -> str:
        session = self._session
        with self._lock:
            id_ = f"{kind}-{session.member}-{next(self._numbers)}"
            closed = self._closed
            if answer is not None and not closed:
                self._answers[id_] = answer
        if closed:
            if answer is not None:
                answer("refused", {"reason": _OVER})
            return id_
        if kind == "join":
            session.emit("join_requested", id=id_, host=host)
        self.propose(Proposal(kind, id_, member, host, asked_at=time.time(), name=name))
        return id_

    # -- taking to the others, and answering -----------------------------------------------------------

    def waiting(self) -> list[Proposal]:
        """All that is to be put before the members."""
        with self._lock:
            return list(self._inbox.values())

    def forget(self, proposals: Sequence[Proposal]) -> None:
        """These were put before the members, and need not be again."""
        with self._lock:
            for proposal in proposals:
                key = proposal.kind, proposal.id, proposal.attempt
                if self._inbox.get(key) is proposal:  # and not a newer one
                    del self._inbox[key]

    def answer(self, id_: str, what: str, fields: dict[str, Any]) -> None:
        """Tell who made a request what became of it; nothing, if another member was asked."""
        answer = self._answers.get(id_)
        if answer is not None:
            answer(what, fields)
            if what in ("refused", "left", "active", "moved"):
                self._answers.pop(id_, None)

    def answer_left(self, settled: Collection[str], leaving: Sequence[str]) -> None:
        """Tell those that asked for a leave which is among ``settled`` that ``leaving`` go."""
        for id_ in list(self._answers):
            if id_.startswith("leave-") and id_ in settled:
                self.answer(id_, "left", {"members": list(leaving)})

    def refuse_all(self, reason: str, but: str = "") -> None:
        """Refuse all that is unanswered, except the request with the id ``but``."""
        for id_ in set(self._answers) - {but}:
            self.answer(id_, "refused", {"reason": reason})

    def close(self) -> None:
        """The job is over: refuse all there is, and all that comes."""
        with self._lock:
            self._closed = True
        self.refuse_all(_OVER)


def put_now(proposal: Proposal) -> Proposal:
    """A proposal with the time that it has waited until it is put before the members."""
    waited_s = max(0.0, time.time() - proposal.asked_at) if proposal.asked_at else 0.0
    return replace(proposal, waited_s=waited_s)
