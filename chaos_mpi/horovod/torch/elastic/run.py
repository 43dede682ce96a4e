"""The decorator of a training function that is entered again whenever the ranks have changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from chaos_mpi.horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from chaos_mpi.horovod.torch import process_sets
from chaos_mpi.horovod.torch.elastic import membership
from chaos_mpi.horovod.torch.elastic.state import State
from chaos_mpi.horovod.torch.job import job

T = TypeVar("T")


def run(func: Callable[..., T]) -> Callable[..., T]:
    """Call ``func(state, ...)`` with the state alike at all ranks, and again when ranks have come, left or died.

    A process that was started to join the running job enters it here, with the job's state. Before that it may give
    and get initial values (``broadcast_parameters`` and the like, which leave it as it is), but no other collective
    call can be made. Optimizers are made before it is called, or each time that it is entered.

    Args:
        func: takes a :class:`State` first.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> T:
        membership.enter(state)
        in_step = is_again = False
        while True:
            membership.note_members()
            if is_again:
                state.on_reset()
            is_again = True
            try:
                if not in_step:
                    state.sync()
                membership.begin()
                return func(state, *args, **kwargs)
            except HorovodInternalError:
                membership.come_together()
                state.restore()
                in_step = False
            except HostsUpdatedInterrupt as interrupt:
                in_step = interrupt.skip_sync
                membership.forget_steps(job())
            process_sets.forget()

    return wrapper
