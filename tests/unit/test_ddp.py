"""The data parallel module in one process, with a session that has no other member."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from chaos_mpi.elastic.sampler import ElasticSampler
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
    member, members, initial_size, expected_size, batch_policy = "b", ("a", "b"), 2, 2, "none"

    def __init__(self) -> None:
        self.step = self.begun = self.models = self.boundaries = 0
        self.samplers: list[ElasticSampler] = []
        self.undo: list[Callable[[], None]] = []
        self.restored: list[Callable[[], None]] = []
        self.shared: list[torch.Tensor] = []

    @property
    def gradient_step_is_open(self) -> bool:
        return self.begun > self.step

    def retire_model(self) -> None:
        self.retired = getattr(self, "retired", 0) + 1

    def number_model(self) -> int:
        self.models += 1
        return self.models

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def share(self, label: str, tensors: list[torch.Tensor]) -> None:
        self.shared = tensors

    def on_rollback(self, undo: Callable[[], None]) -> None:
        self.undo.append(undo)

    def keep_alike(self, tensors: Callable[[], Sequence[torch.Tensor]]) -> None:
        pass

    def on_restore(self, note: Callable[[], None]) -> None:
        self.restored.append(note)

    def attach_sampler(self, sampler: ElasticSampler) -> None:
        self.samplers.append(sampler)

    def boundary(self, *, model: int = 0) -> None:
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
        for sampler in self.samplers:
            sampler.commit()


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


def normalized() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("reached", ["both", "only the one that was frozen"])
def test_a_parameter_that_is_unfrozen_later_is_refused(synced: bool, reached: str) -> None:
    session, module = FakeSession(), normalized()
    module[0].requires_grad_(False)
    model = wrap(module, session)
    model(torch.ones(4, 3)).sum().backward()
    module[0].weight.requires_grad_(True)
    if reached != "both":
        module[1:].requires_grad_(False)
    model.require_backward_grad_sync = synced
    with pytest.raises(ConfigError, match=r"'0\.weight' has a gradient.*learning rate is 0"):
        model(torch.ones(4, 3)).sum().backward()


def test_a_module_that_is_wrapped_again_makes_one_step_and_leaves_nothing_behind() -> None:
    session, module = FakeSession(), normalized()
    model = wrap(module, session)
    module(torch.rand(4, 3)).sum().backward()
    assert session.step == 1
    earlier = weakref.ref(model)
    model = wrap(module, session)
    assert earlier() is None
    model(torch.rand(4, 3)).sum().backward()
    assert session.step == session.begun == 2
    kept = [buffer.clone() for buffer in module.buffers()]
    module(torch.rand(4, 3))  # a forward pass whose step is never finished
    for undo in session.undo:
        undo()
    assert all(map(torch.equal, module.buffers(), kept))


def test_a_wrapper_that_has_a_successor() -> None:
    session, module = FakeSession(), normalized()
    earlier = wrap(module, session)
    module[0].requires_grad_(False)  # the successor need not train all of it
    model = wrap(module, session, broadcast_buffers=False)
    model(torch.rand(4, 3)).sum().backward()
    assert session.step == session.begun == 1
    with pytest.raises(ConfigError, match="call that one"):
        earlier(torch.rand(4, 3))
    with torch.no_grad():
        earlier(torch.rand(4, 3))
    for call in (*session.undo, *session.restored):  # its buffers are not its own any more
        before = [buffer.clone() for buffer in module.buffers()]
        call()
        assert all(map(torch.equal, module.buffers(), before))


def test_a_wrapped_part_of_a_wrapped_module() -> None:
    session = FakeSession()
    part = wrap(nn.Linear(3, 2), session)
    model = wrap(nn.Sequential(part, nn.Linear(2, 1)), session)
    model(torch.rand(4, 3)).sum().backward()
    assert session.step == session.begun == session.boundaries == 1


def test_a_module_of_which_another_one_has_a_part_is_not_forgotten() -> None:
    session, shared = FakeSession(), nn.Linear(3, 2)
    whole = wrap(nn.Sequential(shared, nn.Linear(2, 1)), session)
    wrap(nn.Sequential(shared, nn.Linear(2, 5)), session)
    whole(torch.rand(4, 3)).sum().backward()
    assert session.step == session.begun == 2


def test_what_torch_is_to_ignore_is_the_rank_s_own() -> None:
    session, module = FakeSession(), normalized()
    module[0].bias.requires_grad_(False)
    module._ddp_params_and_buffers_to_ignore = ["0.bias", "1.running_mean"]  # type: ignore[assignment]
    wrap(module, session)
    common = {tensor.data_ptr() for tensor in session.shared}
    everything = [*module.named_parameters(), *module.named_buffers()]
    assert {name for name, tensor in everything if tensor.data_ptr() not in common} == {"0.bias", "1.running_mean"}
    before = module[1].running_mean.clone()
    module(torch.rand(4, 3))
    for undo in session.undo:
        undo()
    assert not torch.equal(module[1].running_mean, before)
    assert module[1].num_batches_tracked == 0
    module[0].bias.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'0\.bias' is trained, and named in"):
        wrap(module, session)


def test_a_loop_that_was_left_in_a_stand_in_does_not_mute_the_next_one() -> None:
    session, module = FakeSession(), nn.Linear(1, 1, bias=False)
    model = wrap(module, session)
    ghosts, reals, others = (ElasticSampler(length, session=session) for length in (1, 8, 8))

    def gradient(*loops: Iterator[list[int]]) -> float:
        for loop in loops:
            next(loop)
        module.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        assert module.weight.grad is not None
        return float(module.weight.grad)

    real = iter(reals)
    assert gradient(iter(ghosts)) == 0.0
    assert gradient() == 0.0, "a second step over the same batch"
    assert gradient(real) == 1.0
    assert gradient() == 1.0
    session.samplers.remove(ghosts)
    ghosts = ElasticSampler(1, session=session)
    assert gradient(iter(ghosts), real) == 0.0, "one batch of both"
    assert gradient(real, iter(others)) == 1.0
