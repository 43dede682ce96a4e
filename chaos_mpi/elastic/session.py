"""The elastic session: this process's part in a job whose members come and go.

It is what users and integrations call. The sequence of collective operations it runs recovers inside when a member dies
(:mod:`chaos_mpi.elastic.sequence`): no failure of another rank ever surfaces in the training loop.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from chaos_mpi.agent.assembly import UP_LIMIT_S
from chaos_mpi.elastic import current
from chaos_mpi.elastic.agent_link import fate_of, follow, open_link
from chaos_mpi.elastic.attached import AttachedSamplers
from chaos_mpi.elastic.changes import Companion
from chaos_mpi.elastic.children import end_workers_with_rank
from chaos_mpi.elastic.control import ControlSocket, leave_on_sigterm, open_control
from chaos_mpi.elastic.ending import EndingSession
from chaos_mpi.elastic.launching import own_host, refuse_orphan, told_sizes
from chaos_mpi.elastic.lifecycle import ExitGuard, set_log_level, write_record
from chaos_mpi.elastic.negotiator import Negotiator
from chaos_mpi.elastic.newcomer import enter_job
from chaos_mpi.elastic.operations import Operation
from chaos_mpi.elastic.persistence import Persistence
from chaos_mpi.elastic.places import Places
from chaos_mpi.elastic.sequence import OperationSequence
from chaos_mpi.elastic.submission import BackgroundCalls
from chaos_mpi.errors import ChaosError, ConfigError, CutOffError
from chaos_mpi.events import RESERVED, EventLog
from chaos_mpi.membership import View
from chaos_mpi.mpi import runtime
from chaos_mpi.mpi.growth import bridge_to_sponsor

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from chaos_mpi.config import Settings
    from chaos_mpi.elastic.arrival import Arrival
    from chaos_mpi.elastic.recovery import Regrouped
    from chaos_mpi.elastic.sampler import ElasticSampler
    from chaos_mpi.elastic.state import TrainingState
    from chaos_mpi.mpi.world import World
    from chaos_mpi.torch.buckets import GradientStep

log = logging.getLogger("chaos_mpi.elastic")


@dataclass(frozen=True, slots=True)
class SessionResult:
    """How a session ended.

    Attributes:
        outcome: ``finished``.
        params_digest: digest over models and optimizers of this member (over the models, where
            ``session.optimizers_differ``), or an empty string without a TrainingState.
        replicas_identical: whether all members ended with the same bits; None without a TrainingState to compare.
        steps: gradient steps finished.
        size: members at the end.
    """

    outcome: str
    params_digest: str
    replicas_identical: bool | None
    steps: int
    size: int


class Session(EndingSession):
    """This process's part in an elastic job. Made by :func:`chaos_mpi.init`; one at a time.

    All methods that communicate must be called by every member, in the same order, from the main thread.

    Attributes:
        settings: what the session is run with.
        host: name of this machine.
        member: this process's id, ``host:pid``; it never changes, while :attr:`rank` may.
        initial_size: number of ranks the training was begun with, also where it was resumed with another number.
        started_with: number of ranks this job was started with.
        step: gradient steps finished.
    """

    def __init__(self, settings: Settings) -> None:
        set_log_level(settings.log_level)
        self.settings = settings
        self.host = own_host(os.environ)
        self.member = f"{self.host}:{os.getpid()}"
        self.step = 0
        self._ended = False
        self._models = self._retired_models = 0
        self._background = BackgroundCalls()
        self._samplers = AttachedSamplers()
        self._places = Places(self._samplers)
        self._companions: list[Companion] = []
        self._rollbacks: list[Callable[[], None]] = []
        self._restored: list[Callable[[], None]] = []
        self._handing_over: list[Callable[[tuple[str, ...]], None]] = []
        self._alike = []
        self._recorded: dict[str, Any] = {}
        self._boundary_step = 0
        self._talk_is_owed = False  # a step was finished, and the members have not come to a place to negotiate since
        self._result: SessionResult | None = None
        write_record(settings.run_dir, "starting", {"member": self.member, "pid": os.getpid(), "host": self.host})
        refuse_orphan()
        self._agent = open_link(self.member)
        world = runtime.start(settings.timeout_s)
        write_record(settings.run_dir, "connected", {})
        runtime.bound_threads()
        self.initial_size = self.started_with = world.size
        self._told_sizes = told_sizes()
        if self._told_sizes is not None:
            self.initial_size = self._told_sizes.initial
        self._bridge = bridge_to_sponsor()
        if settings.min_ranks > world.size and self._bridge is None:
            raise ConfigError(f"min_ranks is {settings.min_ranks}, but the job was started with {world.size} ranks")
        self._events = EventLog(settings.event_log, self.member, self.host)
        try:
            self._sequence = OperationSequence(world, self.member, settings.timeout_s, self)
        except CutOffError as error:
            write_record(
                settings.run_dir, "outcome", {"member": self.member, "outcome": "cut off", "message": str(error)}
            )
            raise
        self._last_contributors = self.members
        self._persistence = Persistence(self)
        self._negotiator = Negotiator(self, settings.limits)
        follow(self, self._negotiator)
        self._arrival: Arrival | None = None
        self._has_entered = False
        self._control: ControlSocket | None = None
        self._guard = ExitGuard(self.close, self._crashed, lambda: self.size > 1, settings.run_dir)
        if self._bridge is None:  # a newcomer is known, and asked for something, when it is a member
            self._write_identity()
            self._control = open_control(self, settings.run_dir)
        leave_on_sigterm(self)
        end_workers_with_rank()
        newcomer = self._bridge is not None
        self.emit("session_started", pid=os.getpid(), host=self.host, members=list(self.members), newcomer=newcomer)

    # -- the life of a session -----------------------------------------------------------------------

    def record(self, **values: float) -> None:
        """Add values, ``loss`` for one, to the event log's line of the present step.

        Raises:
            ConfigError: a name is one that every line has already, ``epoch`` for one.
        """
        if taken := sorted(RESERVED.intersection(values)):
            raise ConfigError(f"session.record() cannot take {', '.join(taken)}: every line of the event log has that")
        self._recorded.update(values)

    def close(self) -> SessionResult:
        """End the session in good order: compare the replicas, write the last checkpoint, leave MPI.

        Module buffers that are alike after each step are made so once more before: later passes may have changed them.
        Every member calls it when training is over. Calling it again returns the same result. In a ``finally`` or
        ``except`` block, with an exception under way, it raises that exception instead: this rank has failed, or
        leaves, and the others are to train on.
        """
        if self._result is not None:
            return self._result
        self.let_error_go_on()
        self._refuse_if_ended()
        if self.has_state:
            self._even_out()
        self.boundary(final=True)
        self._negotiator.close()
        self._persistence.close()
        mine = self._persistence.digest()
        digests = self.gather(mine, "end of the session")
        self._sequence.close()
        identical = len(set(digests)) == 1 if self.has_state else None
        if identical is False and self.rank == 0:
            log.error("the replicas differ at the end of training; digests in rank order: %s", ", ".join(digests))
        self._result = SessionResult("finished", mine, identical, self.step, self.size)
        self._in_time()
        self._end("finished", "", mine)
        self._guard.release_finished(self._failed_afterwards)
        self._end_companions()
        self._sequence.free()
        current.forget(self)
        runtime.stop()
        return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    # -- for the integrations ------------------------------------------------------------------------

    def attach_sampler(self, sampler: ElasticSampler) -> None:
        """Keep ``sampler`` informed of finished steps and of changes of the view."""
        self._samplers.attach(sampler)
        if self.has_state:
            self._samplers.warn_of_late_one(self.rank)

    def attach_state(self, state: TrainingState) -> None:
        """Take charge of the training state: compare it between ranks, resume it, keep it safe.

        A rank that was started to join a running job does so here, and has the job's state on return.
        """
        self._persistence.attach(state, newcomer=self._bridge is not None)
        self._places.watch(self.optimizers())
        if self._bridge is not None:
            self._arrival = enter_job(self, self._bridge, state)
            self._has_entered = True
            self._write_identity()
            self._control = open_control(self, self.settings.run_dir)

    def retire_model(self) -> None:
        """One of the models makes no steps any more; the same one at every member."""
        self._retired_models += 1

    def number_model(self) -> int:
        """The number, from 1, of one more model, in the order in which every rank makes them."""
        self._models += 1
        return self._models

    def on_restore(self, note: Callable[[], None]) -> None:
        """Call ``note`` after the training state was replaced by another one."""
        self._restored.append(note)

    def on_leave(self, hand_over: Callable[[tuple[str, ...]], None]) -> None:
        """Call ``hand_over`` with those who are about to leave: what only they have, others are to get from them.

        All members are there then, between two steps, and it may make collective calls. Every member registers the
        same ones, in the same order; a rank that joins does so before its training state is made.
        """
        self._handing_over.append(hand_over)

    def hand_over(self, leaving: tuple[str, ...]) -> None:
        """These members are about to leave. Called by all."""
        for hand_over in self._handing_over:
            hand_over(leaving)

    def resumed(self, step: int, initial_size: int) -> None:
        """The training state now is that of ``step``, of a job that was started with ``initial_size`` ranks."""
        self.step = self._boundary_step = step
        self.initial_size = initial_size
        for note in self._restored:
            note()

    def boundary(self, *, final: bool = False, model: int = 0) -> None:
        """Between two steps, when optimizer, scheduler and counters are all up to date.

        Args:
            final: the training is over.
            model: the number of the model that is about to be called, see :meth:`number_model`; 0 if it has none.
        """
        self._talk_is_owed |= self._end_step()
        talks = self._places.begin(model, self._models - self._retired_models) and self._talk_is_owed and not final
        self._persistence.write(final=final, at_place=talks)
        if talks:
            self._talk_is_owed = False
            self._negotiate()
            self._stop_if_told()

    def _negotiate(self) -> None:
        with self._sequence.undisturbed():
            self._negotiator.settle()

    @property
    def talk_is_due(self) -> bool:
        """Whether members negotiate when they :meth:`meet` next; the same at all."""
        return self._negotiator.due

    def meet(self, talk: bool) -> None:
        """A boundary of the members' choice, also without a step before it; they all come to it.

        Args:
            talk: whether to negotiate; the same at all members. What is due is negotiated in any case.
        """
        self._end_step()
        self._talk_is_owed = False
        self._persistence.write(final=False, at_place=True)
        self._negotiator.due |= talk
        self._negotiate()
        self._stop_if_told()

    def execute(self, operation: Operation) -> None:
        """Run one collective operation to its end, whatever happens to other members."""
        self._refuse_if_ended()
        self._background.settle()
        self._sequence.execute(operation)

    def submit(self, call: Callable[[], object]) -> Future[object]:
        """Have ``call`` made in the background, after those before it; every later collective call waits for it.

        Every member submits the same calls in the same order; ``call`` makes collective calls as the main thread would.
        """
        self._refuse_if_ended()
        return self._background.submit(call)

    def ready_for_subgroup(self) -> tuple[World, View]:
        """The present communicator and view, when no other call is under way. See :class:`Subgroup`."""
        self._refuse_if_ended()
        self._background.settle()
        self._sequence.attend()
        return self._sequence.world, self.view

    def attend(self) -> None:
        """Take part in a recovery that other members have begun, if there is one, and no call is under way here."""
        if not self._background.busy_elsewhere:
            self._sequence.attend(wait=False)

    def begin(self, step: GradientStep) -> None:
        """Begin a gradient step in the middle of backward; :meth:`settle` ends it.

        A failure seen meanwhile is told to the others at once, so that nobody waits for this member, and
        dealt with at the end of backward.
        """
        self._refuse_if_ended()
        self._background.settle()
        self._sequence.enter(step)
        step.begin(self._sequence.world)

    def settle(self, operation: Operation) -> None:
        """Wait until the operation is finished, recovering as often as members die.

        Raises:
            TooFewRanksError: fewer than ``min_ranks`` members are left.
            WaitTimeoutError: the others did not arrive within ``timeout_s``.
        """
        self._sequence.settle(operation)

    # -- what the sequence of operations tells -------------------------------------------------------

    def emit(self, event: str, **fields: Any) -> None:
        """Write a line to the event log."""
        where = self._sequence
        self._events.emit(
            event, rank=where.world.rank, size=where.view.size, epoch=where.view.epoch, step=self.step, **fields
        )

    def operation_finished(self, operation: Operation) -> None:
        """A collective operation has its result."""
        if operation.is_gradient_step:
            self.step += 1
            self._last_contributors = operation.contributors
            self._samplers.commit()
            self._places.stepped(operation.model)
            self._negotiator.due |= operation.anyone_proposes()
            self._report_arrival(operation)

    def sampler_reports(self) -> list[dict[str, Any]]:
        """Where this member's samplers are."""
        return self._samplers.reports()

    def view_changed(self, regrouped: Regrouped, old: View, reports: list[list[dict[str, Any]]]) -> None:
        """A new view is committed at all members."""
        lost = regrouped.lost
        self._follow_change("failure", old, reports, lost)
        if self.rank == 0 and lost:
            log.warning(
                "step %d: %s; training goes on with %d of %d ranks",
                self.step, fate_of(lost, self._agent), self.size, old.size,
            )  # fmt: skip
        if self.size < self.settings.min_ranks and not regrouped.closing:
            self._stop_too_few(saver=regrouped.decision.furthest)
        self._tell_companions()

    def why_not_without(self, lost: tuple[str, ...]) -> str:
        """Why this member must not go on without these; between hosts, the agents know who has the majority."""
        return self._agent.may_go_on_without(lost, self.settings.timeout_s) if self._agent is not None else ""

    def why_not_with(self, present: tuple[str, ...]) -> str:
        """The same for all but these, of those that the job was started with. The agents may not have met yet."""
        limit_s = self.settings.timeout_s + UP_LIMIT_S
        return self._agent.may_go_on_with(present, limit_s) if self._agent is not None else ""

    def _end_step(self) -> bool:
        """Note the step that was finished since the last boundary, if there is one; whether there is."""
        self._background.settle()
        self._persistence.at_forward()
        if self.step == self._boundary_step:
            return False
        self.emit("step", **self._recorded)
        self._recorded = {}
        before, self._boundary_step = self._boundary_step, self.step
        self._persistence.at_boundary(before)
        return True


def open_session(settings: Settings) -> Session:
    """Open this process's session.

    Raises:
        ChaosError: one is open already.
        EngineError, ConfigError, WaitTimeoutError: see :func:`chaos_mpi.init`.
    """
    if current.current_session_or_none() is not None:
        raise ChaosError("a session is open already; chaos_mpi.init() is called once per process")
    session = Session(settings)
    current.remember(session)
    return session
