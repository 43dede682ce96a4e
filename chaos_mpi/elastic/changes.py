"""The part of a session that lets ranks join and leave by agreement."""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from chaos_mpi.agent.hosts import host_name
from chaos_mpi.agent.spawning import VARIABLE
from chaos_mpi.elastic import kept
from chaos_mpi.elastic.agent_link import links_between
from chaos_mpi.elastic.alike import even_out
from chaos_mpi.elastic.launching import Sizes
from chaos_mpi.elastic.lifecycle import write_record
from chaos_mpi.elastic.sponsor import versions
from chaos_mpi.elastic.standing import StandingSession
from chaos_mpi.errors import ConfigError, StopRequestedError
from chaos_mpi.membership import Agenda, Changes, View
from chaos_mpi.mpi import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from chaos_mpi.elastic.arrival import Arrival
    from chaos_mpi.elastic.attached import AttachedSamplers
    from chaos_mpi.elastic.lifecycle import ExitGuard
    from chaos_mpi.elastic.negotiator import Negotiator
    from chaos_mpi.elastic.operations import Operation
    from chaos_mpi.elastic.persistence import Persistence
    from chaos_mpi.elastic.places import Places
    from chaos_mpi.elastic.requests import Answer
    from chaos_mpi.elastic.sampler import ElasticSampler
    from chaos_mpi.events import EventLog, RecentEvents
    from chaos_mpi.mpi.world import World
    from chaos_mpi.replication.tree import Packed

log = logging.getLogger("chaos_mpi.elastic")


class Companion(Protocol):
    """Other software in this process that communicates among the members by itself."""

    def enter_view(self, world: World) -> None:
        """Communicate on ``world`` from now on: a new view was committed. Its first use, at every member."""

    def end(self, world: World) -> None:
        """Communicate no more: all members end, or this one leaves."""


class ChangingSession(StandingSession):
    """What a session does about members that come and go on purpose. The session itself sets the attributes.

    Attributes:
        told_to_end: whether this rank is to leave as soon as it can, or the job to stop.
        told_by: the name of the signal that said so.
        stop_reason: why it cannot, once that is known: then the job has to stop.
        deadline: ends this rank if it has not begun to end by then.
        changes: how often the view has changed since the job was started, and why.
        optimizers_differ: from now on optimizers of each member keep what is of its own gradients, with Adasum for one:
            newcomers get that of rank 0, and it does not count when replicas are compared, nor does that of other
            optimizers. The same at all members.
    """

    told_to_end = False
    told_by = ""
    stop_reason = ""
    deadline: threading.Timer | None = None
    changes = Changes()
    optimizers_differ = False

    initial_size: int
    started_with: int
    _alike: list[Callable[[], Sequence[torch.Tensor]]]
    _arrival: Arrival | None
    _companions: list[Companion]
    _events: EventLog
    _guard: ExitGuard
    _negotiator: Negotiator
    _persistence: Persistence
    _places: Places
    _samplers: AttachedSamplers

    @property
    def recent(self) -> RecentEvents:
        """The last events of this member."""
        return self._events.recent

    @property
    def samplers(self) -> tuple[ElasticSampler, ...]:
        """The attached samplers."""
        return tuple(self._samplers)

    @abstractmethod
    def emit(self, event: str, **fields: Any) -> None:
        """Write a line to the event log."""

    @abstractmethod
    def resumed(self, step: int, initial_size: int) -> None:
        """The training state now is that of ``step``, of a job that was started with ``initial_size`` ranks."""

    @abstractmethod
    def _end(self, outcome: str, message: str, digest: str) -> None:
        """Note how this member's part ended."""

    def request_join(self, n: int = 1, host: str = "", answer: Answer | None = None) -> list[str]:
        """Ask for ``n`` more ranks, from any member and any thread; training goes on while they start.

        Args:
            n: how many.
            host: machine they are to run on; empty for any that the launcher knows.
            answer: called with what became of a request (``starting``, ``active``, ``refused``) and its fields.

        Returns:
            The ids of the requests.

        Raises:
            ConfigError: the script has no TrainingState, so there is nothing a newcomer could start from; or ``host``
                can be no name of a machine in a job on several.
        """
        if host and VARIABLE in os.environ:
            host_name(host, "no rank can join")
        if not self.has_state:
            raise ConfigError(
                "no rank can join: the script has not made its TrainingState (with chaos_mpi.horovod.torch: called its "
                "function under hvd.elastic.run), which a newcomer would start from"
            )
        return [self._negotiator.requests.join(host, answer) for _ in range(n)]

    def request_leave(self, member: str | None = None, answer: Answer | None = None) -> str:
        """Ask that a member goes after the present step, from any member and any thread; its process exits with 0.

        Args:
            member: its id; default: this one.
            answer: called with what became of it (``left``, ``refused``) and its fields.

        Returns:
            The id of the request.
        """
        return self._negotiator.requests.leave(member if member is not None else self.member, answer)

    def request_move(self, name: str, answer: Answer | None = None) -> str:
        """Ask that all ranks end after the present step, for the job to go on from there under another launcher.

        Args:
            name: under which each host is to keep the state, see :mod:`chaos_mpi.elastic.kept`.
            answer: called with what became of it (``moved``, ``refused``) and its fields.

        Returns:
            The id of the request.

        Raises:
            ConfigError: the name cannot be used, or the script has no TrainingState to go on from.
        """
        kept.places(name)  # refuses what cannot be one
        if not self.has_state:
            raise ConfigError(
                "the job cannot move: the script has not made its TrainingState, which it would go on from"
            )
        return self._negotiator.requests.move(name, answer)

    def request_stop(self, signal_name: str) -> None:
        """Ask that the job stops after the present step, because of this signal; from any member and any thread."""
        self._negotiator.requests.stop(signal_name)

    # -- for what carries joins and leaves out -------------------------------------------------------

    @property
    def has_state(self) -> bool:
        """Whether the script has named its training state."""
        return self._persistence.has_state

    def change_view(
        self, world: World, members: Sequence[str], reports: list[list[dict[str, Any]]], cause: str
    ) -> None:
        """All members have agreed to go on as ``members`` in ``world``; ``reports`` are of those who stay."""
        old = self.view
        self._sequence.adopt(world, old.next(members))
        self._follow_change(cause, old, reports)
        self._tell_companions()

    def _follow_change(
        self, cause: str, old: View, reports: list[list[dict[str, Any]]], lost: Sequence[str] = ()
    ) -> None:
        """The view is another one than ``old``: so are the shares of the samplers, and the event log is told."""
        self._samplers.view_changed(reports, old.members, self.members)
        self.changes = self.changes.after(cause, old.members, self.members)
        links = links_between(self.members, self.agent)
        self.emit("view_committed", cause=cause, members=list(self.members), lost=list(lost), links=links)

    def attach_companion(self, companion: Companion) -> None:
        """Have other software that communicates by itself, as Horovod, enter the present view and all later ones."""
        self._companions.append(companion)
        companion.enter_view(self._sequence.world)

    def wants_to_talk(self) -> bool:
        """Whether this member has something to propose to the others."""
        return self._negotiator.wants_to_talk()

    def pending_joins(self) -> list[dict[str, Any]]:
        """Newcomers on their way, for people to read, with the ``stage`` each of them is at."""
        agenda = self._negotiator.agenda
        catching_up = [{**asdict(join), "stage": "catching up"} for join in agenda.replicating]
        others = [{**asdict(join), "stage": "ready" if join.newcomer else "starting"} for join in agenda.joins]
        return catching_up + others

    def requirements(self) -> dict[str, Any]:
        """What a newcomer has to be like."""
        sizes = Sizes(self.initial_size, self.size)
        return {"versions": versions(), "signature": self._persistence.signature(), "sizes": sizes}

    def pack_for_newcomers(self) -> Packed:
        """The training state and where the samplers are; its tensors are the live ones."""
        return self._persistence.pack_with([sampler.hand_over() for sampler in self._samplers])

    def loose_tensors(self) -> dict[str, torch.Tensor]:
        """What of the training state may differ between members, see :mod:`chaos_mpi.elastic.alike`."""
        return self._persistence.loose_tensors()

    def keep_alike(self, tensors: Callable[[], Sequence[torch.Tensor]]) -> None:
        """These live tensors are alike at all members after each step, and are to be so at the end of training."""
        self._alike.append(tensors)

    def _even_out(self) -> None:
        """Passes after the last step, which are of no whole one, have changed buffers (BatchNorm statistics)."""
        alike = {tensor.data_ptr() for tensors in self._alike for tensor in tensors()}
        loose = self.loose_tensors() if alike else {}
        even_out(self, {name: tensor for name, tensor in loose.items() if tensor.data_ptr() in alike})

    def take_rng(self, state: Mapping[str, Any] | None) -> None:
        """Go on from these random number generators, from the next boundary on; None to keep this rank's."""
        self._persistence.take_rng(state)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the training state, in its order."""
        return self._persistence.optimizers()

    def agree(self, ok: bool) -> bool:
        """Whether every living member says so; the same at all. Between two operations, and called by all."""
        return self._sequence.agree(ok)

    def retire(self, world: World) -> None:
        """Keep a communicator that is not used any more until all can be given back."""
        self._sequence.retire(world)

    def situation(self) -> dict[str, Any]:
        """Where the job is between two steps, in JSON values, for :meth:`enter_view` at a newcomer."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "initial_size": self.initial_size,
            "started_with": self.started_with,
            "changes": self.changes.to_json(),
            "place": self._sequence.place(),
            "loop": self._places.to_json(),
            "agenda": self._negotiator.agenda.to_json(),
        }

    def enter_view(self, world: World, invitation: dict[str, Any]) -> None:
        """This newcomer and all members have agreed to go on together in ``world``."""
        old = View(int(invitation["epoch"]), tuple(invitation["members"]))
        following = old.next([*old.members, *invitation["newcomers"]])
        self._sequence.take_place(world, following, invitation["place"])
        self._places.take_over(invitation["loop"])
        self._negotiator.take_over(Agenda.from_json(invitation["agenda"]))
        self._last_contributors = old.members
        self.started_with = int(invitation["started_with"])
        self.resumed(int(invitation["step"]), int(invitation["initial_size"]))
        self.changes = Changes(**invitation["changes"])
        self._follow_change("join", old, invitation["reports"])
        self._tell_companions()

    def depart(self) -> NoReturn:
        """This member has left by agreement: end the process in good order."""
        self._in_time()
        log.warning("%s leaves at step %d; the others train on", self.member, self.step)
        self._persistence.close()
        self._end("left", "", "")
        self._end_companions()
        self._guard.release()
        raise SystemExit(0)

    def keep_state(self, name: str) -> str:
        """Have every host keep the state; why none can, or an empty text. Called by all, at a step boundary."""
        return self._persistence.keep(name)

    def state_kept(self, problem: str) -> None:
        """The job that this one is to go on from has ended, with its state kept, or why it has not; from any thread."""
        self._persistence.awaited.tell(problem)

    def move_away(self) -> NoReturn:
        """All members have agreed to go on under another launcher, and the state is kept: end in good order."""
        self._in_time()
        self._persistence.close()
        self._sequence.close()
        if self.rank == 0:
            log.warning("step %d: the job moves to another launcher", self.step)
        # The new ranks are busy with the state by now: a digest is for who reads the log, and else not worth the time.
        digest = self._persistence.digest() if self.settings.event_log is not None else ""
        self._end("moved", f"the job moved to another launcher after step {self.step}", digest)
        self._guard.release()
        self._end_companions()
        self._sequence.free()
        runtime.stop()
        raise SystemExit(0)

    def _in_time(self) -> None:
        """This member ends as it was told to, however long it takes to save what is to be saved."""
        if self.deadline is not None:
            self.deadline.cancel()

    def _tell_companions(self) -> None:
        for companion in self._companions:
            companion.enter_view(self._sequence.world)

    def _end_companions(self) -> None:
        for companion in self._companions:
            companion.end(self._sequence.world)

    def _stop_if_told(self) -> None:
        """At a step boundary, after those that could leave have left: stop if this rank is to end and cannot leave.

        What is left without it is too few, so the others, if not told to end as well, stop in the next step.
        """
        if not self.stop_reason:
            return
        self._in_time()
        message = ""
        if self.rank == 0:
            message = (
                f"stopped at step {self.step} on request: {self.stop_reason}, and it was told to end ({self.told_by}, "
                f"host {self.host}). {self._persistence.save_on_request()}"
            )
        self._stop(message, by_all=False)

    def stop_together(self, signal_name: str) -> NoReturn:
        """All members have agreed to stop here, as the job was told to end: one saves the state, and all say so."""
        self._in_time()
        told = f"stopped at step {self.step} on request: the job was told to end ({signal_name}, host"
        messages: list[str] = []
        while not any(messages):  # rank 0 may die of it, and is another one then
            saved = self._persistence.save_together()
            messages = self.gather(f"{told} {self.host}). {saved}" if self.rank == 0 else "", "stop")
        self._stop(next(filter(None, messages)), by_all=True)

    def _stop(self, message: str, *, by_all: bool) -> NoReturn:
        self._persistence.close()
        self._end("stopped", message, "")
        raise StopRequestedError(message, by_all=by_all)

    def _write_identity(self) -> None:
        identity = {"member": self.member, "pid": os.getpid(), "rank": self.rank, "host": self.host}
        identity["joined"] = self._arrival is not None
        write_record(self.settings.run_dir, "member", identity)

    def _report_arrival(self, operation: Operation) -> None:
        """Note the first step that this newcomer has contributed to."""
        arrival = self._arrival
        if arrival is None or not operation.contributes:
            return
        self._arrival = None
        parts = {**arrival.parts, "first_step_s": time.monotonic() - arrival.active_at}
        parts["total_s"] = time.monotonic() - arrival.asked_at
        rounded = {name: round(seconds, 6) for name, seconds in parts.items()}
        self.emit("join_active", id=arrival.id, repeated_steps=arrival.repeated_steps, **rounded)
