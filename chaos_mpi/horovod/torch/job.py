"""This process's part in the job: begin and end, who is where, and what the other modules share."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from chaos_mpi.elastic.current import current_session_or_none
from chaos_mpi.elastic.exchanges import AllGather, AllReduce, Barrier
from chaos_mpi.errors import ChaosError, NoSessionError
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.calls import CallQueue
from chaos_mpi.horovod.torch.negotiation import SHUTDOWN, Asked
from chaos_mpi.horovod.torch.requests import Request, Waiting

if TYPE_CHECKING:
    from chaos_mpi.elastic.operations import Operation
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.elastic.state import TrainingState
    from chaos_mpi.horovod.torch.step import Steps

_BOUNDARY = "step boundary"
CHECK = "check for changes of the ranks"
#: Calls that leave a process as it is which has not entered the job yet.
_LOCAL_BEFORE_ENTRY = ("broadcast", "barrier", CHECK, SHUTDOWN)


class _InGraph:
    """A collective call in a graph, as long as the graph is there."""

    #: Whether backward has come to it.
    in_backward = False


class Job:
    """What is open between :func:`init` and :func:`shutdown`.

    Args:
        session: the session; all ranks are its members.
        owned: whether it is closed with the job.

    Attributes:
        queue: the calls of all ranks.
        waiting: what the script waits for.
        steps: the gradient steps of the optimizers, by number.
        state, entered_with: what ranks that join get in an elastic job, and the elastic state that it is made of.
        entered: who was there when the training function was entered.
        elastic: whether ranks join and leave at the calls of an elastic state alone.
        optimizers: how many have been numbered.
        optimizers_before: how many of them were made before the training function was called.
    """

    def __init__(self, session: Session, *, owned: bool) -> None:
        self.session, self.owned = session, owned
        self.waiting = Waiting(session.members)
        self._is_entering = session.awaits_entry
        self.steps: weakref.WeakValueDictionary[int, Steps] = weakref.WeakValueDictionary()
        self.elastic = False
        self._in_graphs: weakref.WeakSet[_InGraph] = weakref.WeakSet()
        self._at_boundary = session.step
        self.state: TrainingState | None = None
        self.entered_with: Any = None
        self.entered: tuple[str, ...] = ()
        self.optimizers = self.optimizers_before = 0
        self.queue = self.new_queue(session)
        self.queue.check = self._refuse_before_entry
        self.queue.newcomers = lambda: session.changes.joins
        self.queue.of_all = True

    @property
    def members(self) -> tuple[str, ...]:
        """All ranks, as far as the script is to know: those of the session may be others in the middle of a step."""
        if self._is_entering and not self.session.awaits_entry:  # it has been given its place, and has made no call
            self._is_entering = False
            self.waiting.note(self.session.members)
        return self.waiting.members

    @property
    def rank(self) -> int:
        """This rank's place among :attr:`members`."""
        return self.members.index(self.session.member)

    @property
    def is_alone(self) -> bool:
        """Whether there never is more than this rank."""
        return self.session.started_with == 1 and not self.elastic and len(self.members) == 1

    def new_queue(self, group: Any) -> CallQueue:
        """Calls of a group of ranks."""
        return CallQueue(group, self.session.submit, self.waiting, self.session.settings.timeout_s, self._zeros)

    def number_optimizer(self) -> int:
        """The number, from 1, of one more optimizer, in the order in which every rank makes them."""
        self.optimizers += 1
        return self.optimizers

    def renumber_optimizers(self) -> None:
        """All ranks enter the training function: those that have been in it make its optimizers once more."""
        self.optimizers = self.optimizers_before

    def forget_steps(self) -> None:
        """All ranks begin anew, and no call is pending: no optimizer is in the middle of a step."""
        for steps in list(self.steps.values()):
            steps.forget()

    def meet(self, what: str) -> None:
        """All ranks come to this place.

        Raises:
            HorovodInternalError: they make different calls.
        """
        self.waiting.wait(self.queue.put(Request(Asked(what, what), lambda _: Barrier(what))))

    def gather(self, what: str, row: torch.Tensor) -> tuple[list[Any], tuple[str, ...]]:
        """The row of each rank, as Python values, and whose they are.

        Raises:
            HorovodInternalError: the ranks make different calls.
        """

        def finish(operation: AllGather, _: object) -> tuple[list[Any], tuple[str, ...]]:
            return operation.result.tolist(), operation.contributors

        request = Request(Asked(what, what), lambda _: AllGather(what, row.unsqueeze(0)), finish)
        return self.waiting.wait(self.queue.put(request))  # type: ignore[no-any-return]

    def note_in_graph(self, ctx: Any) -> None:
        """A call is made in forward; its backward makes one, too, and notes that in ``ctx.made``."""
        if any(ctx.needs_input_grad):
            ctx.made = made = _InGraph()
            self._in_graphs.add(made)

    @property
    def in_graph(self) -> bool:
        """Whether there is a graph whose backward makes collective calls, or has made them in this step."""
        return bool(self._in_graphs)

    def forget_graphs(self) -> None:
        """A step has ended: its graphs are done, but others may be there whose backward is still to come."""
        for made in list(self._in_graphs):
            if made.in_backward:
                self._in_graphs.discard(made)

    def boundary(self) -> None:
        """A step begins: the place for ranks to leave, and for checkpoints, in a script without an elastic state."""
        session = self.session
        if self.elastic or session.at_boundary or session.step == self._at_boundary:
            return
        self._at_boundary = session.step
        if session.talk_is_due:
            try:
                self.meet(_BOUNDARY)
            except HorovodInternalError:
                return  # a rank has joined, and does not come here: at a later step
        else:
            self.queue.drain()  # calls that a rank which has joined does not make would never be done in there
            if self.queue.negotiating:
                return
        session.boundary()

    def _refuse_before_entry(self, request: Request) -> None:
        if self.session.awaits_entry and not request.name.startswith(_LOCAL_BEFORE_ENTRY):
            raise HorovodInternalError(
                f"{request.asked.call}: this process was started to join a running job, and is in it from "
                "hvd.elastic.run on; before that it can only be given initial values (broadcast_parameters and so on)"
            )

    def _zeros(self, spec: Mapping[str, Any], call: str) -> Operation:
        if "step" in spec:
            if (steps := self.steps.get(spec["step"])) is None:
                raise NoSessionError(f"this rank has joined, and has no optimizer for: {call}")
            return steps.make(zeros=True)
        tensors = [torch.zeros(shape, dtype=getattr(torch, dtype), device="cpu") for dtype, shape in spec["tensors"]]
        return AllReduce(call, tensors)


_job: Job | None = None


def job() -> Job:
    """The job that is open.

    Raises:
        ValueError: :func:`init` has not been called.
    """
    if _job is None or current_session_or_none() is not _job.session:
        raise ValueError("Horovod has not been initialized; use hvd.init().")
    return _job


def init(comm: object = None, process_sets: Sequence[Any] | Literal["dynamic"] | None = None) -> None:
    """Join the job; does nothing more when called again.

    An open session of :func:`chaos_mpi.init` is used as it is; else one is opened with the settings of ``chaosrun``
    (``CHAOS_*``), under ``chaosrun`` or ``mpirun --with-ft ulfm``.

    Args:
        comm: must be None, or all ranks: the job's ranks may change, so it is not tied to a communicator.
        process_sets: sets of ranks to make now, see :class:`ProcessSet`; ``"dynamic"`` is accepted.

    Raises:
        ValueError: ``comm`` is something else, or a process set is there twice.
        ConfigError, EngineError, WaitTimeoutError: see :func:`chaos_mpi.init`.
    """
    from chaos_mpi.horovod.torch import process_sets as sets

    global _job
    if not is_initialized():
        _job = _open()
        sets.begin(_job)
    _refuse_other_communicator(comm)
    if process_sets is not None and not isinstance(process_sets, str):
        chosen: list[Any] = list(process_sets)
        sets.replace([s if isinstance(s, sets.ProcessSet) else sets.ProcessSet(s) for s in chosen])


def shutdown() -> None:
    """End this rank's part. All ranks call it; at the end of a script it is called if the script has not.

    It leaves MPI, which cannot be begun again in the same process. In a ``finally`` or ``except`` block, with an
    exception under way, it raises that exception instead, see :meth:`chaos_mpi.Session.close`.
    """
    global _job
    from chaos_mpi.horovod.torch import process_sets as sets

    if not is_initialized():
        return
    ending = job()
    ending.session.let_error_go_on()  # also if it is the script's own: the others are not at this call
    ending.queue.drain()
    sets.end()
    if ending.owned:
        from chaos_mpi.horovod.torch.elastic.membership import share_buffers

        share_buffers(ending)
        ending.session.close()
    _job = None


def is_initialized() -> bool:
    """Whether :func:`init` was called, and :func:`shutdown` was not."""
    return _job is not None and current_session_or_none() is _job.session


def _open() -> Job:
    import chaos_mpi

    if (session := current_session_or_none()) is not None:
        opened = Job(session, owned=False)
        if not session.is_newcomer:  # the others may have made this call long ago
            opened.waiting.note(session.gather_with_contributors(None)[1])
        return opened
    opened = Job(chaos_mpi.init(), owned=True)
    # Horovod scripts just end.
    opened.session.close_quietly_at_exit()
    atexit.register(_end_of_script, opened)
    return opened


def _end_of_script(opened: Job) -> None:
    if _job is opened and is_initialized() and opened.session.ends_well:
        opened.queue.inline = True
        try:
            shutdown()
        except Exception as error:  # Python would report it, and end the process as if all were well
            opened.session.fail(ChaosError(str(error)) if isinstance(error, HorovodInternalError) else error)


def _refuse_other_communicator(comm: object) -> None:
    if comm is None:
        return
    everyone = list(range(len(job().members)))
    if isinstance(comm, Sequence):
        if sorted(comm) == everyone:
            return
    elif getattr(comm, "Get_size", None) is not None and comm.Get_size() == len(everyone):  # type: ignore[attr-defined]
        return
    raise ValueError(
        "hvd.init(comm=...) cannot choose some of the ranks here: start a job of those, or use a process set"
    )
