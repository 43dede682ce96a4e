"""Sets of some of the ranks, for calls among them.

They are not elastic: a set ends when one of its ranks dies or leaves. Its calls then raise
:class:`HorovodInternalError`, while the job goes on, and a new set can be made of those that are left. When
``hvd.elastic.run`` enters the training function again, all sets have ended, as with Horovod, and are made anew there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from chaos_mpi.elastic.subgroup import Subgroup
from chaos_mpi.errors import GroupBrokenError
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.calls import CallQueue
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.negotiation import SHUTDOWN

if TYPE_CHECKING:
    from chaos_mpi.horovod.torch.job import Job


log = logging.getLogger("chaos_mpi.horovod")


class ProcessSet:
    """Some ranks. It can be used once :func:`add_process_set` or :func:`init` has taken it.

    Args:
        ranks: of those that are there now.

    Attributes:
        process_set_id: number of the set; None while it cannot be used.
        ranks: ascending, as they were numbered when the set was made.
    """

    process_set_id: int | None = None
    ranks: list[int] | None = None
    mpi_comm: object = None

    def __init__(self, ranks: Iterable[int]) -> None:
        if not isinstance(ranks, Iterable):
            raise NotImplementedError("a process set is made of a list of ranks here, not of an MPI communicator")
        ranks = sorted(ranks)
        if any(not isinstance(rank, int) for rank in ranks):
            raise ValueError("a ProcessSet is made of a list of ranks")
        self.ranks = ranks
        self._queue: CallQueue | None = None
        self._members: tuple[str, ...] = ()
        self._has_ended = False

    def size(self) -> int | None:
        """The number of its ranks; None while it cannot be used."""
        return len(self._members) if self.process_set_id is not None else None

    def rank(self) -> int | None:
        """This rank's place in the set; None while it cannot be used."""
        if self.process_set_id is None:
            return None
        member = job().session.member
        return self._members.index(member) if member in self._members else -1

    def included(self) -> bool | None:
        """Whether this rank is in the set; None while it cannot be used."""
        return job().session.member in self._members if self.process_set_id is not None else None

    def takes_part(self) -> bool:
        """Whether this rank is in the set.

        Raises:
            ValueError: it cannot be used.
        """
        self._refuse_unusable()
        return bool(self.included())

    @property
    def queue(self) -> CallQueue:
        """Its calls.

        Raises:
            ValueError: it cannot be used, or this rank is not in it.
        """
        self._refuse_unusable()
        if self._queue is None:
            raise ValueError(f"this rank ({job().rank}) is not in {self}")
        return self._queue

    def place_of(self, rank: int) -> int:
        """Where the present global rank is in the set.

        Raises:
            ValueError: it is not, or the set cannot be used.
        """
        self._refuse_unusable()
        members = job().members
        if not 0 <= rank < len(members) or members[rank] not in self._members:
            raise ValueError(f"rank {rank} is not in {self}")
        return self._members.index(members[rank])

    def member_at(self, rank: int) -> str:
        """Who has the present global rank, whatever rank it has later.

        Raises:
            ValueError: as :meth:`place_of`.
        """
        self.place_of(rank)
        return job().members[rank]

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, mpi_comm={self.mpi_comm})"

    def _refuse_unusable(self) -> None:
        if self.process_set_id is not None:
            return
        if self._has_ended:
            raise ValueError(
                f"{self} has ended: it was removed, or hvd.elastic.run has entered the training function anew since it "
                "was made. Make the set, and an optimizer that uses it, in that function"
            )
        raise ValueError(
            f"{self} cannot be used: hand it to hvd.init() or hvd.add_process_set() first. A process that joins a "
            "running job makes its sets, and optimizers that use them, in the function that hvd.elastic.run calls"
        )

    def _take(self, number: int, members: tuple[str, ...], queue: CallQueue | None) -> None:
        self._has_ended = False
        self.process_set_id, self._members, self._queue = number, members, queue

    def _invalidate(self) -> CallQueue | None:
        self._has_ended = True
        queue, self.process_set_id, self._queue, self._members = self._queue, None, None, ()
        return queue


class _GlobalSet(ProcessSet):
    """All ranks, whoever they are at the time."""

    process_set_id = 0

    def __init__(self) -> None:
        super().__init__([])

    @property
    def ranks(self) -> list[int]:
        return list(range(self.size()))

    @ranks.setter
    def ranks(self, _: list[int]) -> None:
        """They follow from the job."""

    def size(self) -> int:
        return len(job().members)

    def rank(self) -> int:
        return job().rank

    def included(self) -> bool:
        return True

    @property
    def queue(self) -> CallQueue:
        return job().queue

    def place_of(self, rank: int) -> int:
        if not 0 <= rank < self.size():
            raise ValueError(f"there is no rank {rank} in a job of {self.size()}")
        return rank

    def __str__(self) -> str:
        return "ProcessSet(process_set_id=0, all ranks)"


global_process_set: ProcessSet = _GlobalSet()
_sets: dict[int, ProcessSet] = {}
_last_number = 0


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a set, to be called by all ranks, in it or not, with the same ranks.

    Raises:
        ValueError: the same ranks are a set already, or are not in the job.
        HorovodInternalError: the ranks name different sets, or one of the set has died.
    """
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    session = job().session
    if session.awaits_entry:
        log.warning(
            "%s cannot be used in this process, which joins a running job: make process sets in the training function",
            process_set,
        )
        return process_set
    ranks, everyone = process_set.ranks or [], job().members
    if not ranks or ranks[0] < 0 or ranks[-1] >= len(everyone) or len(set(ranks)) != len(ranks):
        raise ValueError(f"ranks {ranks} cannot be a process set in a job of {len(everyone)}")
    members = tuple(everyone[rank] for rank in ranks)
    if members in [s._members for s in _sets.values()] or members == everyone:
        raise ValueError(f"there is a process set of ranks {ranks} already")
    number = _next_number(f"add process set {ranks}", members)
    queue = None
    if session.member in members:
        try:
            group = Subgroup(session, members, number, session.settings.timeout_s)
        except GroupBrokenError as error:
            raise HorovodInternalError(f"{process_set} cannot be made: {error}") from error
        queue = job().new_queue(group)
    process_set._take(number, members, queue)
    _sets[number] = process_set
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Give a set up, to be called by all ranks; False if it is none that can be given up."""
    if not process_set.process_set_id:
        return False
    number = process_set.process_set_id
    if process_set._queue is not None:
        process_set._queue.drain()
    job().meet(f"remove process set {process_set.ranks}")
    _sets.pop(number, None)
    queue = process_set._invalidate()
    if queue is not None and isinstance(queue.group, Subgroup):
        queue.group.free()
    return True


def begin(_: Job) -> None:
    """A job begins: there are no sets."""
    global _last_number
    _last_number = 0
    _sets.clear()


def give_up() -> None:
    """This rank makes no further calls in its sets: others that wait for it there get an error."""
    for process_set in list(_sets.values()):
        queue = process_set._queue
        if queue is not None and isinstance(queue.group, Subgroup):
            queue.group.give_up()


def forget() -> None:
    """All ranks enter the training function anew, where the sets are to be made again: with those that came."""
    for process_set in list(_sets.values()):
        queue = process_set._invalidate()
        if queue is not None and isinstance(queue.group, Subgroup):
            queue.group.free()
    _sets.clear()


def replace(process_sets: Sequence[ProcessSet]) -> None:
    """These sets, in this order, and no others."""
    for process_set in list(_sets.values()):
        remove_process_set(process_set)
    for process_set in process_sets:
        add_process_set(process_set)


def end() -> None:
    """The job ends."""
    for process_set in list(_sets.values()):
        if process_set._queue is not None:
            process_set._queue.drain()
    job().meet(SHUTDOWN)
    forget()


def ids_and_ranks() -> dict[int, list[int]]:
    """The ranks of each set, by number."""
    return {0: list(range(len(job().members)))} | {n: list(s.ranks or []) for n, s in _sets.items()}


def _next_number(what: str, members: tuple[str, ...]) -> int:
    """The number of a new set, the same at all ranks, of which one that joined has not seen the earlier ones.

    Raises:
        HorovodInternalError: the ranks do not come together, or some of ``members`` have died; at every rank.
    """
    global _last_number
    numbers, living = job().gather(what, torch.tensor(_last_number, device="cpu"))
    _last_number = int(max(numbers)) + 1
    if lost := sorted(set(members).difference(living)):
        raise HorovodInternalError(f"{what}: {', '.join(lost)} died meanwhile")
    return _last_number
