"""The gradient steps of one model, whichever wrapper reaches its gradients: our own, or torch's by its hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from chaos_mpi.torch.buckets import Bucket, BufferSet, GradientStep, make_staging
from chaos_mpi.torch.modules import StableBuffers
from chaos_mpi.torch.rounds import Rounds

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session


class Reducer:
    """Makes them, one after the other.

    Args:
        session: the session.
        params: the parameters that are trained.
        buckets: their split.
        module: whose buffers all members are to have alike after each step; None if they may differ.

    Attributes:
        rounds: what is done before each forward pass and after each backward pass.
    """

    def __init__(
        self,
        session: Session,
        params: Sequence[torch.nn.Parameter],
        buckets: Sequence[Bucket],
        module: torch.nn.Module | None,
    ) -> None:
        self._session, self._params, self._buckets = session, params, buckets
        self._number = session.number_model()
        self._synced = StableBuffers(session, module)
        staged = make_staging(buckets, params)
        self._memory = [BufferSet(buckets, params, self._synced.nbytes, staged) for _ in range(2)]
        self.rounds = Rounds(session, params, self._number)

    def begin(self) -> GradientStep:
        """Begin a step, in the middle of backward."""
        # The other set holds the sum of the last finished step, which a survivor may still have to be given.
        self._memory.reverse()
        step = GradientStep(
            self._params, self._buckets, self._synced.live, self._memory[0], self.rounds.contributes,
            self._session.wants_to_talk, self._number,
        )  # fmt: skip
        self._session.begin(step)
        return step

    def settle(self, step: GradientStep) -> None:
        """Backward is over: finish the step, among those that live."""
        step.start_rest()
        self._session.settle(step)
        self._memory[0] = step.memory

    def delivered(self) -> None:
        """The step's results are where they belong."""
        self._synced.keep()

    def close(self) -> None:
        """There will be no further step. What is left of the last one is the session's."""
        self._synced.forget()
        self._memory.clear()
        self._session.retire_model()
