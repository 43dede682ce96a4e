"""A session of one rank without MPI, for what it does between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from chaos_mpi.config import Settings
from chaos_mpi.elastic.attached import AttachedSamplers
from chaos_mpi.elastic.persistence import Persistence
from chaos_mpi.elastic.places import Places
from chaos_mpi.elastic.session import Session
from chaos_mpi.membership import View
from chaos_mpi.torch.rounds import Rounds


class OneRank(Session):
    """Calls ``told`` where members would negotiate."""

    def __init__(self, settings: Settings | None = None, told: Callable[[], None] = lambda: None) -> None:
        self.settings, self.told = settings or Settings(), told
        self.host, self.member = "a", "a:1"
        self.step = self._boundary_step = self._models = self._retired_models = 0
        self.initial_size = self.started_with = 1
        self._ended = self._talk_is_owed = False
        self._bridge = None
        self._recorded, self._restored, self._rollbacks, self._alike = {}, [], [], []
        self._last_contributors = (self.member,)
        self._samplers = AttachedSamplers()
        self._places = Places(self._samplers)
        self._background = SimpleNamespace(settle=lambda: None)  # type: ignore[assignment]
        self._sequence = SimpleNamespace(world=SimpleNamespace(rank=0), view=View(0, (self.member,)))  # type: ignore[assignment]
        self._negotiator = SimpleNamespace(due=False)  # type: ignore[assignment]
        self._arrival = None
        self._persistence = Persistence(self)

    def emit(self, event: str, **fields: Any) -> None:
        """There is no event log."""

    def gather(self, value: Any, label: str = "gather") -> list[Any]:
        """Nobody else is there."""
        return [value]

    def share(self, label: str, tensors: Sequence[torch.Tensor], root: str | None = None) -> None:
        """The same."""

    def _negotiate(self) -> None:
        self.told()

    def write_down(self) -> None:
        """Wait until all checkpoints are written that were handed to the writer."""
        if self._persistence._writer is not None:
            assert self._persistence._writer.flush(30.0)


class Wrapped:
    """A module whose calls and backward passes the session sees, as in data parallel training."""

    def __init__(self, session: OneRank, module: torch.nn.Module) -> None:
        self.module, self._session = module, session
        self.number = session.number_model()
        self._rounds = Rounds(session, list(module.parameters()), self.number)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._rounds.begin()
        result: torch.Tensor = self.module(x)
        return result

    def backward(self, loss: torch.Tensor) -> None:
        """Make a gradient step."""
        loss.backward()  # type: ignore[no-untyped-call]
        self._rounds.note_backward()
        self.finish()

    def finish(self) -> None:
        """The gradient step of the last backward pass is finished."""
        step: Any = SimpleNamespace(
            is_gradient_step=True, contributors=self._session.members, model=self.number, anyone_proposes=lambda: False
        )
        self._session.operation_finished(step)
