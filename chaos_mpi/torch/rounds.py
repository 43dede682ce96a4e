"""What is done before each forward pass and after each backward pass, whatever reduces the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.hooks import RemovableHandle

    from chaos_mpi.elastic.session import Session


class Rounds:
    """Tells session and samplers where a training loop is.

    Args:
        session: the session.
        params: the parameters that are trained.
        model: the number of the model; 0 if it has none.
    """

    def __init__(self, session: Session, params: Sequence[torch.nn.Parameter], model: int = 0) -> None:
        self._session, self._params, self._model = session, params, model
        self._muted: list[RemovableHandle] = []

    def begin(self) -> None:
        """Before a forward pass that is trained on: the place between two steps."""
        self._session.boundary(model=self._model)
        fresh = [sampler for sampler in self._session.samplers if sampler.is_fresh]
        for sampler in self._session.samplers if fresh else ():  # without one, it is the same batch once more
            sampler.enter_round(sampler in fresh)
        if not any(sampler.ghost_round() for sampler in self._session.samplers):
            self.unmute()  # a ghost's forward may have had no backward
        elif not self._muted:
            # The next backward adds nothing: this round repeats a sample only to keep the ranks in step.
            self._muted = [p.register_hook(torch.zeros_like) for p in self._params if p.requires_grad]  # type: ignore[no-untyped-call]

    @property
    def contributes(self) -> bool:
        """Whether this member's samples of the present step count."""
        return not any(sampler.step_is_ghost() for sampler in self._session.samplers)

    def note_backward(self) -> None:
        """A backward pass has reached the parameters."""
        for sampler in self._session.samplers:
            sampler.note_backward()

    def unmute(self) -> None:
        """The backward pass is over."""
        while self._muted:
            self._muted.pop().remove()
