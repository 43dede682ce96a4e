"""The optimizer of Horovod's interface, against one process with the same steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from echo import EchoSession, hvd_job
from torch import nn

import chaos_mpi.horovod.torch as hvd
from chaos_mpi.horovod.common.exceptions import HostsUpdatedInterrupt
from chaos_mpi.horovod.torch import step as steps
from chaos_mpi.horovod.torch.elastic import membership

OPS = [hvd.Average, hvd.Sum]


@pytest.fixture(autouse=True)
def two_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that each of :func:`net`'s layers has its own."""
    monkeypatch.setattr(steps, "BUCKET_BYTES", 64)


@pytest.fixture
def session() -> Iterator[EchoSession]:
    """Of two ranks with the same gradients."""
    with hvd_job(size=2) as opened:
        yield opened


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    loss: torch.Tensor = model(inputs).square().mean()
    return loss


def sgd(model: nn.Module, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **how})


def trained(number_of_steps: int, op: int, make: Callable[[nn.Module], torch.optim.Optimizer] = sgd) -> nn.Module:
    """In one process: the sum of two equal gradients is twice the average."""
    model = net()
    optimizer = make(model)
    for number in range(number_of_steps):
        optimizer.zero_grad()
        (loss_of(model, number) * (2 if op == hvd.Sum else 1)).backward()
        optimizer.step()
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("between", [False, True])
def test_a_state_that_is_loaded_between_backward_and_step(session: EchoSession, op: int, between: bool) -> None:
    model = net()
    optimizer: Any = hvd.DistributedOptimizer(sgd(model), op=op)
    state = optimizer.state_dict()
    loss_of(model, 77).backward()
    assert optimizer._steps.under_way
    if between:
        hvd.barrier()
    optimizer.load_state_dict(state)
    assert not optimizer._steps.under_way
    for number in range(2):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
    assert equal(model, trained(2, op))


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_kept_when_a_state_is_loaded(session: EchoSession, op: int) -> None:
    model = net()
    optimizer = hvd.DistributedOptimizer(sgd(model), op=op)
    loss_of(model, 0).backward()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert equal(model, trained(1, op))


def test_a_state_is_loaded_after_a_backward_that_makes_calls_of_its_own(session: EchoSession) -> None:
    model = net()
    optimizer: Any = hvd.DistributedOptimizer(sgd(model))
    loss = hvd.allreduce(loss_of(model, 0))
    loss.backward()
    before = len(session.done)
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(session.done) == before, "no gradient was under way"
    optimizer.step()
    assert equal(model, trained(1, hvd.Average))


def test_a_state_that_one_rank_loads_before_it_trains(session: EchoSession) -> None:
    optimizer = hvd.DistributedOptimizer(sgd(net()))
    optimizer.load_state_dict(optimizer.state_dict())
    assert session.done == []


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("in_the_middle", [False, True])
def test_another_optimizer_with_the_same_parameters(session: EchoSession, op: int, in_the_middle: bool) -> None:
    model = net()
    first: Any = hvd.DistributedOptimizer(torch.optim.Adam(model[2].parameters(), lr=0.1), op=op)
    loss_of(model, 5).backward()
    first.step()
    if in_the_middle:
        loss_of(model, 6).backward()
    model.load_state_dict(net().state_dict())
    second: Any = hvd.DistributedOptimizer(sgd(model), op=op)
    assert not first._steps.under_way
    for number in range(3):
        second.zero_grad()
        loss_of(model, number).backward()
        assert second._steps.under_way, "gradients are not reduced in backward"
        second.step()
    assert equal(model, trained(3, op))


def test_optimizers_of_other_parameters_are_left_alone(session: EchoSession) -> None:
    one, two = net(), net()
    of_one, of_two = (hvd.DistributedOptimizer(sgd(model)) for model in (one, two))
    for number in range(2):
        for model, optimizer in ((one, of_one), (two, of_two)):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            assert optimizer._steps.under_way  # type: ignore[attr-defined]
            optimizer.step()
    assert equal(one, trained(2, hvd.Average))
    assert equal(two, one)


def test_parameters_do_not_hold_an_optimizer(session: EchoSession) -> None:
    model = net()
    optimizer: Any = hvd.DistributedOptimizer(sgd(model))
    ended = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert ended() is None
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())
    loss_of(model, 0).backward()
    assert session.done == []


def test_an_optimizer_of_a_function_that_is_entered_again_has_the_number_that_a_newcomer_gives_it(
    session: EchoSession,
) -> None:
    job = membership.job()
    outside: Any = hvd.DistributedOptimizer(sgd(net()))
    model = net()
    job.optimizers_before = job.optimizers  # as on the way in
    numbers = []
    for _ in range(2):
        membership.begin()
        inside: Any = hvd.DistributedOptimizer(sgd(model))
        numbers.append(inside._steps.number)
        loss_of(model, 0).backward()
        inside.step()
        assert job.steps[inside._steps.number] is inside._steps
    assert (outside._steps.number, numbers) == (1, [2, 2])
    assert job.steps[1] is outside._steps


@pytest.mark.parametrize("op", OPS)
def test_a_step_with_a_closure(session: EchoSession, op: int) -> None:
    model = net()
    optimizer = hvd.DistributedOptimizer(sgd(model), op=op)
    for number in range(3):

        def closure(number: int = number) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss.item()

        with torch.no_grad():
            assert optimizer.step(closure) > 0
    assert session.step == 3
    assert equal(model, trained(3, op))


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        hvd.DistributedOptimizer(torch.optim.LBFGS(net().parameters()))


def test_the_script_sees_the_members_of_its_last_call(session: EchoSession) -> None:
    """One rank may have heard of a death that another one has not: they are to compute the same learning rate."""
    model = net()
    optimizer = hvd.DistributedOptimizer(sgd(model))
    everyone, session.members = session.members, session.members[:1]
    assert (hvd.size(), hvd.local_size(), hvd.rank()) == (2, 2, 0)
    loss_of(model, 0).backward()
    assert hvd.size() == 2, "in the middle of a step"
    optimizer.step()
    assert hvd.size() == hvd.local_size() == hvd.cross_size() == 1
    session.members = everyone
    handle = hvd.allreduce_async(torch.ones(1))
    while not hvd.poll(handle):
        pass
    assert hvd.size() == 1
    hvd.synchronize(handle)
    assert hvd.size() == 2


def test_a_check_between_two_passes_of_a_step_is_left_for_later(session: EchoSession) -> None:
    model = net()
    state = hvd.elastic.TorchState(model=model)
    optimizer = hvd.DistributedOptimizer(sgd(model), backward_passes_per_step=2)
    loss_of(model, 0).backward()
    state.on_hosts_updated(0.0, 0)
    state.commit()
    loss_of(model, 1).backward()
    optimizer.step()
    with pytest.raises(HostsUpdatedInterrupt):
        state.commit()
    state.commit()


def test_one_rank_alone_may_do_with_gradients_what_it_likes() -> None:
    with hvd_job(size=1):
        model, other = net(), net()
        optimizer = hvd.DistributedOptimizer(sgd(model))
        plain = sgd(other)
        for trained_model, stepped in ((model, optimizer), (other, plain)):
            loss_of(trained_model, 0).backward()
            stepped.zero_grad()
            for number in (1, 2):
                loss_of(trained_model, number).backward()
            stepped.step()
        assert equal(model, other)


def test_passes_that_are_counted_so_far_belong_to_no_step_of_another_length(session: EchoSession) -> None:
    model = net()
    optimizer: Any = hvd.DistributedOptimizer(sgd(model), backward_passes_per_step=2)
    loss_of(model, 0).backward()
    optimizer.set_backward_passes_per_step(1)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    expected = net()
    plain = sgd(expected)
    loss_of(expected, 1).backward()
    plain.step()
    assert equal(model, expected)
