"""The data parallel module in one process, with a session that has no other member."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from chaos_mpi.errors import ConfigError
from chaos_mpi.torch.buckets import GradientStep
from chaos_mpi.torch.ddp import DistributedDataParallel
from chaos_mpi.torch.modules import refuse_unusable_module


class FakePending:
    """Sums over one member are what it has given."""

    def reduce(self, tensor: torch.Tensor, op: str) -> None:
        pass

    def test(self) -> bool:
        return True

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        pass


class FakeWorld:
    rank, size = 0, 1

    def pending(self) -> FakePending:
        return FakePending()


class FakeSession:
    """Counts the steps that are begun and those that are finished."""

    rank = 0

    def __init__(self) -> None:
        self.step = self.begun = self.models = self.boundaries = 0
        self.samplers: list[Any] = []
        self.undo: list[Callable[[], None]] = []
        self.restored: list[Callable[[], None]] = []
        self.shared: list[torch.Tensor] = []

    @property
    def gradient_step_is_open(self) -> bool:
        return self.begun > self.step

    def number_model(self) -> int:
        self.models += 1
        return self.models

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def share(self, label: str, tensors: list[torch.Tensor]) -> None:
        self.shared = tensors

    def on_rollback(self, undo: Callable[[], None]) -> None:
        self.undo.append(undo)

    def on_restore(self, note: Callable[[], None]) -> None:
        self.restored.append(note)

    def boundary(self) -> None:
        self.boundaries += 1

    def wants_to_talk(self) -> bool:
        return False

    def begin(self, step: GradientStep) -> None:
        assert not self.gradient_step_is_open
        self.begun += 1
        world: Any = FakeWorld()
        step.begin(world)

    def settle(self, step: GradientStep) -> None:
        step.wait(lambda: "nobody", 1.0)
        self.step += 1


def wrap(module: nn.Module, session: FakeSession, **how: Any) -> DistributedDataParallel:
    one: Any = session
    return DistributedDataParallel(module, session=one, **how)


class Policy(nn.Module):
    """Returns a parameter as it is, beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(3, 2)
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean(x), self.log_std


def test_a_parameter_that_the_model_returns_keeps_no_hooks() -> None:
    session, module = FakeSession(), Policy()
    model = wrap(module, session)
    for _ in range(5):
        mean, log_std = model(torch.ones(4, 3))
        (mean.sum() + log_std.sum()).backward()
    _, log_std = model(torch.ones(4, 3))
    log_std.sum().backward()  # nothing else leads to this backward
    assert len(module.log_std._backward_hooks or ()) == 0
    assert session.step == session.begun == 6


def failing(module: nn.Linear, times: int) -> None:
    """Have the next backward passes fail."""
    left = [times]

    def fail(_: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise ZeroDivisionError

    module.weight.register_hook(fail)


def test_an_error_in_backward_within_no_sync_is_survived() -> None:
    session, module = FakeSession(), nn.Linear(3, 2)
    model = wrap(module, session)
    failing(module, 1)
    with model.no_sync(), pytest.raises(ZeroDivisionError):
        model(torch.ones(1, 3)).sum().backward()
    module.zero_grad()
    with model.no_sync():
        model(torch.ones(1, 3)).sum().backward()
    assert session.step == 0
    model(torch.ones(1, 3)).sum().backward()
    assert session.step == session.begun == 1
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, torch.full((2, 3), 2.0))


def test_an_error_in_backward_within_a_step_is_not() -> None:
    session, module = FakeSession(), nn.Linear(3, 2)
    model = wrap(module, session)
    failing(module, 1)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(1, 3)).sum().backward()
    assert session.gradient_step_is_open
    with pytest.raises(ConfigError, match="did not come to its end"):
        model(torch.ones(1, 3))


def test_sparse_gradients_are_refused_and_nothing_else_that_is_called_so() -> None:
    class Attention(nn.Linear):
        sparse = True

    frozen = nn.Embedding(3, 2, sparse=True)
    frozen.requires_grad_(False)
    refuse_unusable_module(nn.Sequential(Attention(2, 2), frozen, nn.EmbeddingBag(3, 2)))
    for part in (nn.Embedding(3, 2, sparse=True), nn.EmbeddingBag(3, 2, sparse=True)):
        with pytest.raises(ConfigError, match="'1' produces sparse gradients"):
            refuse_unusable_module(nn.Sequential(Attention(2, 2), part))
