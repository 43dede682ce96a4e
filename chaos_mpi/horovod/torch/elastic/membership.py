"""How an elastic Horovod job takes ranks in and lets them go: at the calls of its state, and nowhere else."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pickle
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic.state import TrainingState
from chaos_mpi.errors import CheckpointError, ConfigError
from chaos_mpi.horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from chaos_mpi.horovod.torch import process_sets
from chaos_mpi.horovod.torch.functions import dumped
from chaos_mpi.horovod.torch.job import CHECK, Job, job
from chaos_mpi.horovod.torch.optimizer import forget_passes, is_in_step
from chaos_mpi.replication.tree import pack

if TYPE_CHECKING:
    from chaos_mpi.horovod.torch.elastic.state import State


log = logging.getLogger("chaos_mpi.horovod")

_RESET = "reset after an error"
#: The others may be in several calls, one after the other, each of which fails.
_ATTEMPTS = 8


class _State(TrainingState):
    """What a rank that joins gets. Its hyper-parameters need not be those of the others: it gets theirs."""

    def signature(self) -> dict[str, Any]:
        signature = super().signature()
        for optimizer in signature["optimizers"].values():
            for group in optimizer["groups"]:
                group["hyper"] = {}
        return signature


class _Attributes:
    """The attributes of an elastic state. What is no plain value is pickled."""

    def __init__(self, state: State) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return {name: _storable(name, value) for name, value in self._state.attributes().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._state.take_attributes({name: _restored(value) for name, value in state.items()})


def enter(state: State) -> None:
    """Begin to train with this state; a process that was started to join the job joins it here.

    Raises:
        ConfigError: another state is trained with already.
        JoinError: the job cannot take this rank.
    """
    here = job()
    here.queue.drain()
    here.optimizers_before = here.optimizers
    if here.state is not None:
        if state is not here.entered_with:
            raise ConfigError("a job has one elastic state; name all that is trained in one TorchState")
        return
    session = here.session
    newcomer = session.awaits_entry
    # What newcomers would repeat to catch up are steps, and a state here has attributes that change otherwise.
    session.settings = dataclasses.replace(session.settings, join_policy="blocking")
    models, optimizers = state.parts()
    placeholder = torch.nn.Linear(1, 1, device="cpu")
    here.state = _State(
        model=models or {"none": placeholder},
        optimizer=optimizers or {"none": torch.optim.SGD(placeholder.parameters(), lr=0.0)},
        session=session,
        attributes=_Attributes(state),
    )
    here.entered_with, here.elastic = state, True
    if newcomer:
        # The last of what the members do in :func:`check`.
        here.waiting.note(session.gather_with_contributors(None)[1])


def note_members() -> None:
    """All ranks are about to enter the training function: changes are told relative to who is there now.

    Before anything is done that depends on who that is: of a death on the way in, all are told at the next check.
    """
    here = job()
    here.queue.drain()
    here.entered = here.session.gather_with_contributors(None)[1]
    here.waiting.note(here.entered)
    here.queue.renumber()


def begin() -> None:
    """All ranks enter the training function now."""
    here = job()
    here.queue.drain()
    here.queue.renumber()
    here.renumber_optimizers()


def come_together() -> None:
    """All ranks are to enter the training function anew: those that know of no error get one at their next call.

    Raises:
        HorovodInternalError: they do not come, as one has joined (``hvd.join``) and makes no calls.
    """
    here = job()
    # First: a rank that waits for this one in a set that has lost nobody would come to nothing of what follows.
    process_sets.give_up()
    here.queue.drain()
    for attempt in range(_ATTEMPTS):
        try:
            here.meet(_RESET)
        except HorovodInternalError:
            if attempt + 1 == _ATTEMPTS:
                raise
        else:
            forget_steps(here)
            return


def forget_steps(here: Job) -> None:
    """All ranks begin anew, and no call is pending."""
    here.forget_steps()
    forget_passes()


def check(told: bool) -> None:
    """All ranks are between two steps: let ranks in and out, and tell of changes.

    If they are between two backward passes of a step, that is left for a later check.

    Args:
        told: whether this rank was told that hosts have changed.

    Raises:
        HostsUpdatedInterrupt: the ranks are not those that the function was entered with; at every rank.
        SystemExit: this rank leaves.
    """
    here = job()
    here.queue.drain()
    session = here.session
    row = [session.wants_to_talk(), told, is_in_step()]
    rows, members = here.gather(CHECK, torch.tensor(row, device="cpu"))
    if any(in_step for _, _, in_step in rows):
        if (here.elastic and members != here.entered) or any(wants or told for wants, told, _ in rows):
            _warn_of_delay(session.rank)
        return
    if here.elastic:
        talk = session.talk_is_due or any(wants for wants, _, _ in rows)
        if talk:
            share_buffers(here)
        session.meet(talk)
        if talk:
            members = session.gather_with_contributors(None)[1]
            here.waiting.note(members)
    if (here.elastic and members != here.entered) or any(told for _, told, _ in rows):
        raise HostsUpdatedInterrupt()


@functools.cache
def _warn_of_delay(rank: int) -> None:
    if rank == 0:
        log.warning(
            "ranks have come, gone, or want to, and commit() or check_host_updates() was called between two backward "
            "passes of a step (backward_passes_per_step): they do so at the next call after a step"
        )


def share_buffers(here: Job) -> None:
    """Make the buffers of the models (BatchNorm statistics) those of rank 0, as each rank has its own in Horovod."""
    if here.state is None:
        return
    models, _ = here.entered_with.parts()
    buffers = [buffer for model in models.values() for buffer in model.buffers()]
    if buffers:
        here.session.share("buffers", buffers)


def _storable(name: str, value: Any) -> Any:
    try:
        pack({"value": value}, clone=False)
    except CheckpointError:
        pass
    else:
        return {"plain": value}
    try:
        return {"pickled": dumped(value)}
    except Exception as error:  # what is raised depends on the value
        raise CheckpointError(
            f"the elastic state has an attribute '{name}' that a rank which joins could not be given, since it cannot "
            f"be pickled ({error}): leave it out, or keep what is needed to make it anew"
        ) from error


def _restored(entry: dict[str, Any]) -> Any:
    return pickle.loads(entry["pickled"]) if "pickled" in entry else entry["plain"]  # noqa: S301
