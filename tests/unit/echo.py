"""A session whose other members do and give whatever this one does: collective calls in one process, without MPI."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chaos_mpi.elastic import current
from chaos_mpi.elastic.operations import Operation
from chaos_mpi.elastic.submission import BackgroundCalls
from chaos_mpi.horovod.torch import job as jobs
from chaos_mpi.membership import View


class EchoPending:
    """Collectives of ``size`` ranks that all give the same."""

    def __init__(self, size: int) -> None:
        self.size = size

    def reduce(self, buffer: torch.Tensor, op: str) -> None:
        """In place."""
        assert op in ("sum", "max", "min", "bor"), op
        if op == "sum":
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.mul_(self.size)

    def gather(self, mine: np.ndarray, everyones: np.ndarray) -> None:
        """A row of each."""
        everyones[:] = mine.reshape(1, -1)

    def gather_parts(self, mine: torch.Tensor, everyones: torch.Tensor, counts: Sequence[int]) -> None:
        """One after the other."""
        everyones.view(-1)[:] = mine.reshape(-1).repeat(len(counts))

    def broadcast(self, flat: torch.Tensor, root: int) -> None:
        """It is there."""
        assert root == 0

    def test(self) -> bool:
        """All is done at once."""
        return True

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        """All is done at once."""

    def drain(self) -> None:
        """Nothing is under way."""


class EchoWorld:
    """Their communicator, of which this process is rank 0."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def pending(self) -> Any:
        """Collectives that are started together."""
        return EchoPending(self.size)

    def revoke(self) -> None:
        """Nobody dies here."""
        raise AssertionError("revoked")


class EchoSession:
    """What Horovod's interface needs of a session.

    Attributes:
        step: gradient steps that have ended.
        done: the operations that have ended.
    """

    awaits_entry = at_boundary = talk_is_due = is_newcomer = False

    def __init__(self, size: int) -> None:
        self.world, self.view = EchoWorld(size), View(0, tuple(f"host:{n}" for n in range(size)))
        self.members, self.member, self.host = self.view.members, "host:0", "host"
        self.rank, self.size, self.started_with, self.step = 0, size, size, 0
        self.settings = SimpleNamespace(timeout_s=5.0)
        self.changes = SimpleNamespace(joins=0)
        self.done: list[Operation] = []
        self._background = BackgroundCalls()

    def wants_to_talk(self) -> bool:
        """Whether this member has something to propose."""
        return False

    def boundary(self) -> None:
        """Between two steps."""

    def gather_with_contributors(self, value: Any) -> tuple[list[Any], tuple[str, ...]]:
        """All say the same."""
        return [value] * self.size, self.members

    def submit(self, call: Callable[[], object]) -> Future[object]:
        """In the background, as in a real one."""
        return self._background.submit(call)

    def execute(self, operation: Operation) -> None:
        """To its end."""
        operation.launch(self.world, self.view)  # type: ignore[arg-type]
        self.settle(operation)

    def begin(self, operation: Any) -> None:
        """In the middle of backward."""
        self._background.settle()
        operation.begin(self.world)

    def settle(self, operation: Operation) -> None:
        """To its end."""
        operation.wait(lambda: "nobody", 1.0)
        operation.contributors = self.members
        self.step += operation.is_gradient_step
        self.done.append(operation)


@contextlib.contextmanager
def hvd_job(size: int = 2) -> Iterator[EchoSession]:
    """A job of Horovod's interface in such a session."""
    session: Any = EchoSession(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(current, "_current", session)
        patch.setattr(jobs, "_job", jobs.Job(session, owned=False))
        yield session
