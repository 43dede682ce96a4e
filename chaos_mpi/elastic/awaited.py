"""New ranks of a job that moves wait until the old ones have ended, which their launcher sees to."""

from __future__ import annotations

import threading
import time

from chaos_mpi.agent.launcher import is_lost
from chaos_mpi.elastic import kept
from chaos_mpi.errors import CheckpointError

_LOOK_PERIOD_S = 0.2


class AwaitedState:
    """What this rank is told of the state that it is to go on from."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._problem = ""

    def tell(self, problem: str) -> None:
        """It is kept now, or why the job that runs goes on instead; from any thread."""
        self._problem = problem
        self._told.set()

    def wait(self, name: str, limit_s: float) -> None:
        """Wait until it is kept.

        Args:
            name: of the state.
            limit_s: longest wait, seconds.

        Raises:
            CheckpointError: it is not, or nobody says so; what to do.
        """
        limit = time.monotonic() + limit_s
        again = f"if it has ended meanwhile, go on from it with {kept.VARIABLE}={name} in the environment of chaosrun"
        while not self._told.wait(_LOOK_PERIOD_S):
            if is_lost():
                raise CheckpointError(f"mpirun is gone before the job that runs was handed over to it; {again}")
            if time.monotonic() > limit:
                raise CheckpointError(f"the job that runs was not handed over within {limit_s:.0f} s; {again}")
        if self._problem:
            raise CheckpointError(self._problem)
