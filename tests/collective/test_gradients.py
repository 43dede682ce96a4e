"""Gradients of all kinds of models and training loops, against the average computed in each process alone."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from chaos_mpi import DistributedDataParallel, Session
from chaos_mpi.errors import ConfigError
from chaos_mpi.mpi import memory

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]

SMALL_BUCKETS = 0.0005


def batch(rank: int, salt: int = 0, rows: int = 6) -> torch.Tensor:
    """The input of a rank; every rank can compute those of the others."""
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(100 * salt + rank), dtype=torch.float64)


def net(seed: int = 0) -> nn.Sequential:
    """Three layers in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def averaged(module: nn.Module, size: int, loss: Callable[[nn.Module, int], torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of the mean over ranks of ``loss``, computed here."""
    local = copy.deepcopy(module)
    local.zero_grad()
    sum((loss(local, rank) for rank in range(size)), torch.zeros(())).div(size).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in local.parameters() if p.requires_grad]


def gradients(module: nn.Module) -> list[torch.Tensor]:
    """What is in ``grad`` after backward."""
    return [p.grad for p in module.parameters() if p.requires_grad and p.grad is not None]


def assert_equal_everywhere(session: Session, tensors: Iterable[torch.Tensor]) -> None:
    """Bit for bit, at all ranks."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digests = session.gather(digest.hexdigest())
    assert len(set(digests)) == 1, digests


def assert_close(here: list[torch.Tensor], there: list[torch.Tensor]) -> None:
    """The same numbers, up to the order of additions."""
    assert len(here) == len(there)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def squared(model: nn.Module, rank: int) -> torch.Tensor:
    """A loss that uses every parameter."""
    return model(batch(rank)).square().mean()


@pytest.mark.parametrize("bucket_cap_mb", [SMALL_BUCKETS, 0.001, None])
def test_average(session: Session, bucket_cap_mb: float | None) -> None:
    module = net()
    model = DistributedDataParallel(module, bucket_cap_mb=bucket_cap_mb)
    for _ in range(3):
        model.zero_grad()
        squared(model, session.rank).backward()
        assert_close(gradients(module), averaged(module, session.size, squared))
        assert_equal_everywhere(session, gradients(module))


def test_all_ranks_begin_with_the_parameters_of_rank_0(session: Session) -> None:
    module = net(seed=session.rank)
    DistributedDataParallel(module)
    for here, there in zip(module.parameters(), net(seed=0).parameters(), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(session: Session, dtype: torch.dtype) -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vector = nn.Parameter(torch.zeros(5, dtype=dtype))
            self.scalar = nn.Parameter(torch.zeros((), dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.vector * x).sum() + self.scalar * x[0]

    def values(rank: int) -> torch.Tensor:
        # The sum over ranks of the last one is more than float16 can hold, the average is not.
        return torch.tensor([rank, 0.125 * rank, -1.0, 1 << rank, 40000.0]).to(dtype)

    module = Weights()
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)
    model(values(session.rank)).backward()
    everyones = torch.stack([values(rank).double() for rank in range(session.size)])
    expected = everyones.mean(0).to(dtype)
    assert module.vector.grad is not None
    assert module.scalar.grad is not None
    assert module.vector.grad.dtype == dtype
    assert torch.equal(module.vector.grad, expected), (module.vector.grad, expected)
    assert torch.equal(module.scalar.grad, expected[0])


def test_half_precision_is_summed_in_float32(session: Session) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    module = nn.ParameterList([parameter])
    model = DistributedDataParallel(module)
    model.module[0].mul(256.0 if session.rank == 0 else 1.0).sum().backward()
    # In bfloat16, 256 + 1 is 256: the small ones would be lost one by one.
    expected = torch.tensor([(256.0 + session.size - 1) / session.size]).to(torch.bfloat16)
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, expected)


def test_dtypes_mixed_in_one_model(session: Session) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float16]
    module = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes])
    DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)
    sum((p.double().sum() * (i + session.rank) for i, p in enumerate(module)), torch.zeros(())).backward()
    for i, parameter in enumerate(module):
        expected = torch.full((3,), i + (session.size - 1) / 2).to(parameter.dtype)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected)


class Branches(nn.Module):
    """Three branches; ``forward`` says which ones are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.branches = nn.ModuleList([nn.Linear(8, 2).double() for _ in range(3)])

    def forward(self, x: torch.Tensor, used: list[int]) -> torch.Tensor:
        return torch.stack([self.branches[i](x).square().mean() for i in used]).sum()


def test_unused_on_some_ranks_and_on_all(session: Session) -> None:
    module = Branches()
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS, find_unused_parameters=True)
    model(batch(session.rank), [session.rank % 2]).backward()
    expected = averaged(module, session.size, lambda m, rank: m(batch(rank), [rank % 2]))
    got = gradients(module)
    assert len(got) == 4, "the branches that some rank used have gradients at every rank"
    assert_close(got, expected[:4])
    assert module.branches[2].weight.grad is None
    assert_equal_everywhere(session, got)


def test_unused_changes_from_step_to_step(session: Session) -> None:
    module = Branches()
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)
    for step in range(4):
        model.zero_grad()

        def loss(m: nn.Module, rank: int, step: int = step) -> torch.Tensor:
            return m(batch(rank), [(rank + step) % 3])  # type: ignore[no-any-return]

        loss(model, session.rank).backward()
        expected = averaged(module, session.size, loss)
        for parameter, gradient in zip(module.parameters(), expected, strict=True):
            if parameter.grad is not None:
                assert_close([parameter.grad], [gradient])
            else:
                assert not gradient.any()


def test_shared_parameters(session: Session) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.into = nn.Linear(8, 8).double()
            self.again = nn.Linear(8, 8).double()
            self.again.weight = self.into.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(torch.tanh(self.into(x)))  # type: ignore[no-any-return]

    module = Tied()
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)
    squared(model, session.rank).backward()
    assert module.again.weight is module.into.weight
    assert_close(gradients(module), averaged(module, session.size, squared))


def test_frozen_parameters(session: Session) -> None:
    module = net()
    module[0].requires_grad_(False)
    before = [p.clone() for p in module[0].parameters()]
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    squared(model, session.rank).backward()
    assert all(p.grad is None for p in module[0].parameters())
    assert_close(gradients(module), averaged(module, session.size, squared))
    optimizer.step()
    for here, there in zip(module[0].parameters(), before, strict=True):
        assert torch.equal(here, there)


def test_batch_norm_buffers_are_those_of_rank_0(session: Session) -> None:
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    alone = copy.deepcopy(module)
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        alone.load_state_dict(module.state_dict())
        alone(batch(0, step))
        optimizer.zero_grad()
        model(batch(session.rank, step)).square().mean().backward()
        optimizer.step()
        for (name, here), (_, there) in zip(module.named_buffers(), alone.named_buffers(), strict=True):
            assert torch.equal(here, there), f"{name} after step {step}"
        assert_equal_everywhere(session, [*module.parameters(), *module.buffers()])


def test_buffers_stay_apart_without_broadcast_buffers(session: Session) -> None:
    module = nn.BatchNorm1d(8).double()
    model = DistributedDataParallel(module, broadcast_buffers=False)
    model(batch(session.rank)).square().mean().backward()
    assert module.running_mean is not None
    means = session.gather(module.running_mean.tolist())
    assert all(means[rank] != means[0] for rank in range(1, session.size))


def test_no_sync_accumulates_to_one_big_batch(session: Session) -> None:
    module = net()
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)
    steps = session.step
    with model.no_sync():
        for part in range(2):
            model(batch(session.rank, part)).square().mean().div(3).backward()
    assert session.step == steps, "no_sync must not communicate"
    model(batch(session.rank, 2)).square().mean().div(3).backward()
    assert session.step == steps + 1

    def big_batch(m: nn.Module, rank: int) -> torch.Tensor:
        return m(torch.cat([batch(rank, part) for part in range(3)])).square().mean()  # type: ignore[no-any-return]

    assert_close(gradients(module), averaged(module, session.size, big_batch))


def test_zero_grad_that_keeps_the_tensors(session: Session) -> None:
    module = net()
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    squared(model, session.rank).backward()
    kept = [p.grad for p in module.parameters()]
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        squared(model, session.rank).backward()
        assert_close(gradients(module), averaged(module, session.size, squared))
        optimizer.step()
    assert all(p.grad is grad for p, grad in zip(module.parameters(), kept, strict=True))


def test_two_backward_calls_before_a_step(session: Session) -> None:
    module = net()
    model = DistributedDataParallel(module)
    for part in range(2):
        model(batch(session.rank, part)).square().mean().backward()

    def both(m: nn.Module, rank: int) -> torch.Tensor:
        return m(batch(rank, 0)).square().mean() + m(batch(rank, 1)).square().mean()  # type: ignore[no-any-return]

    assert_close(gradients(module), averaged(module, session.size, both))


def test_two_forward_calls_in_one_backward(session: Session) -> None:
    module = net()
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)

    def both(m: nn.Module, rank: int) -> torch.Tensor:
        return (m(batch(rank, 0)) * m(batch(rank, 1))).mean()  # type: ignore[no-any-return]

    both(model, session.rank).backward()
    assert_close(gradients(module), averaged(module, session.size, both))


def test_backward_twice_through_one_graph(session: Session) -> None:
    module = net()
    model = DistributedDataParallel(module)
    loss = squared(model, session.rank)
    loss.backward(retain_graph=True)
    loss.backward()
    expected = averaged(module, session.size, lambda m, rank: 2 * squared(m, rank))
    assert_close(gradients(module), expected)


def test_two_losses_of_a_net_with_buffers_that_backward_needs(session: Session) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
            self.register_buffer("scale", torch.full((2,), 3.0, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) * self.scale

    module = Scaled()
    model = DistributedDataParallel(module)
    first, second = (model(batch(session.rank, salt)).square().mean() for salt in (0, 1))
    first.backward()
    second.backward(retain_graph=True)
    second.backward()
    assert_equal_everywhere(session, gradients(module))
    assert_equal_everywhere(session, module.buffers())


def test_gradients_that_have_a_graph(session: Session) -> None:
    module = net()
    model = DistributedDataParallel(module)
    for _ in range(2):  # in the second one there are gradients with a graph from before
        squared(model, session.rank).backward(create_graph=True)
    assert all(gradient.grad_fn is not None for gradient in gradients(module))
    curvature = torch.autograd.grad(gradients(module), list(module.parameters()), gradients(module))
    assert all(torch.isfinite(part).all() for part in curvature)
    module.zero_grad()
    squared(model, session.rank).backward()
    assert_close(gradients(module), averaged(module, session.size, squared))


def test_a_wrapped_module_is_not_copied_or_saved_by_mistake(session: Session) -> None:
    model = DistributedDataParallel(net())
    for attempt in (copy.deepcopy, lambda m: torch.save(m, io.BytesIO()), torch.optim.swa_utils.AveragedModel):
        with pytest.raises(ConfigError, match=r"model\.module"):
            attempt(model)
    torch.optim.swa_utils.AveragedModel(model.module).update_parameters(model)


@pytest.mark.parametrize(
    ("arguments", "alike"),
    [
        ({}, True),
        ({"broadcast_buffers": None}, True),
        ({"forward_sync_buffers": False}, False),
        ({"broadcast_buffers": False, "forward_sync_buffers": True}, True),
    ],
)
def test_arguments_for_buffers(arguments: dict[str, bool | None], alike: bool, session: Session) -> None:
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).double()
    model = DistributedDataParallel(module, **arguments)  # type: ignore[arg-type]
    squared(model, session.rank).backward()
    means = session.gather(module[1].running_mean.tolist())  # type: ignore[union-attr]
    assert all(mean == means[0] for mean in means) is alike


@pytest.mark.parametrize("most_bytes", [8, 100, 1 << 30])
def test_parameters_of_more_bytes_than_mpi_counts(
    most_bytes: int, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MOST_BYTES", most_bytes)
    module = net(session.rank)
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)
    squared(model, session.rank).backward()
    assert_close(gradients(module), averaged(module, session.size, squared))
    assert_equal_everywhere(session, [*module.parameters(), *gradients(module)])


def test_two_modules_in_one_backward(session: Session) -> None:
    generator, critic = net(1), nn.Sequential(nn.Linear(4, 1), nn.Tanh()).double()
    both = nn.Sequential(generator, critic)
    wrapped = [DistributedDataParallel(part, bucket_cap_mb=SMALL_BUCKETS) for part in (generator, critic)]
    for _ in range(2):
        both.zero_grad()
        steps = session.step
        squared(nn.Sequential(*wrapped), session.rank).backward()
        assert session.step == steps + 2
        assert_close(gradients(both), averaged(both, session.size, squared))


def test_buffers_that_a_module_replaces(session: Session) -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
            self.mean: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean = 0.9 * self.mean + x.detach().mean(0)
            return self.net(x)

    module = Running()
    model = DistributedDataParallel(module)
    for _ in range(2):
        squared(model, session.rank).backward()
    means = session.gather(module.mean.tolist())
    assert all(mean == means[0] for mean in means)
    assert module.mean.abs().sum() > 0


class Repeated(nn.Module):
    """A part that is used twice, and recomputed in backward, each time by itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net(), reentrant
        self.inner = self.net[2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.net[:2](x)
        for part in (self.inner, self.inner):
            hidden = checkpoint(part, hidden, use_reentrant=self.reentrant)
        return self.net[4](hidden)


def test_a_part_that_is_recomputed_twice(session: Session) -> None:
    module = Repeated(reentrant=False)
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)
    squared(model, session.rank).backward()
    assert_close(gradients(module), averaged(module, session.size, squared))
    refused = DistributedDataParallel(Repeated(reentrant=True), bucket_cap_mb=SMALL_BUCKETS)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        squared(refused, session.rank).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(session: Session, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.net[:2](x)
            for part in (self.net[2:4], self.net[4:]):
                hidden = checkpoint(part, hidden, use_reentrant=reentrant)
            return hidden

    module = Checkpointed()
    model = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS)
    steps = session.step
    squared(model, session.rank).backward()
    assert session.step == steps + 1
    assert_close(gradients(module), averaged(module, session.size, squared))


def test_gradients_clipped_after_backward_are_what_the_optimizer_sees(session: Session) -> None:
    module = net()
    model = DistributedDataParallel(module)
    squared(model, session.rank).backward()
    expected = averaged(module, session.size, squared)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert_close(gradients(module), [g * (1e-3 / (norm + 1e-6)) for g in expected])
    # The clipped ones must not be what the next step starts from.
    model.zero_grad()
    squared(model, session.rank).backward()
    assert_close(gradients(module), expected)


def test_no_communication_without_gradients(session: Session) -> None:
    model = DistributedDataParallel(net())
    steps = session.step
    if session.rank == 0:  # one rank alone: it would wait for ever if this needed the others
        with torch.no_grad():
            model(batch(0))
    assert session.step == steps
    session.barrier()
