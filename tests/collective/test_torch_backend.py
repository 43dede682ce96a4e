"""``torch.distributed`` on the backend ``chaos``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import chaos_mpi.torch
from chaos_mpi import ConfigError, MismatchError, Session, WaitTimeoutError

pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def group(session: Session) -> Iterator[None]:
    """The default group, on the session of all tests."""
    dist.init_process_group("chaos", timeout=timedelta(seconds=20))
    yield
    dist.destroy_process_group()


def test_takes_the_open_session_over(session: Session) -> None:
    assert (dist.get_rank(), dist.get_world_size()) == (session.rank, session.size)
    assert dist.get_backend() == "chaos"
    dist.destroy_process_group()
    assert session.all_reduce(torch.ones(1)).item() == session.size
    with pytest.raises(ConfigError, match=r"Leave both out"):
        dist.init_process_group("chaos", rank=(session.rank + 1) % session.size, world_size=session.size)
    dist.init_process_group("chaos", rank=session.rank, world_size=session.size, init_method="chaos://")


def test_the_store_is_shared() -> None:
    store = dist.distributed_c10d._get_default_store()
    store.set(f"of {dist.get_rank()}", str(dist.get_rank()))
    other = (dist.get_rank() + 1) % dist.get_world_size()
    assert store.get(f"of {other}") == str(other).encode()
    dist.barrier()  # rank 0 serves it, and must not go before the others have asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8])
@pytest.mark.parametrize("async_op", [False, True])
def test_all_reduce(dtype: torch.dtype, async_op: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    expected = {"SUM": sum(range(1, size + 1)), "MIN": 1, "MAX": size, "AVG": sum(range(1, size + 1)) / size}
    for name, value in expected.items():
        tensor = torch.full((2, 3), rank + 1).to(dtype)
        work = dist.all_reduce(tensor, getattr(dist.ReduceOp, name), async_op=async_op)
        if async_op:
            assert work.wait()
            assert work.is_completed()
            assert work.is_success()
        else:
            assert work is None
        assert torch.equal(tensor, torch.full((2, 3), value).to(dtype)), name


def test_an_asynchronous_call_has_a_future() -> None:
    tensor = torch.ones(3)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    doubled = future.then(lambda done: done.value()[0] * 2)
    assert torch.equal(doubled.wait(), torch.full((3,), 2.0 * dist.get_world_size()))


def test_a_call_in_what_follows_another_one() -> None:
    """As in torch's communication hooks that compress."""
    size = dist.get_world_size()

    def again(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        total = dist.all_reduce(done.value()[0], async_op=True).get_future().wait()[0]
        assert isinstance(total, torch.Tensor)
        return total

    future = dist.all_reduce(torch.ones(3), async_op=True).get_future().then(again)
    assert torch.equal(future.wait(), torch.full((3,), float(size) ** 2))
    after = torch.ones(1)
    dist.all_reduce(after)
    assert after.item() == size


def test_gradients_that_are_compressed_by_power_sgd() -> None:
    torch.manual_seed(2)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(32, 16))
    hook = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    model.register_comm_hook(hook, powerSGD_hook.powerSGD_hook)
    for step in range(4):
        model.zero_grad()
        model(torch.full((4, 32), float(dist.get_rank() + step))).square().mean().backward()
    gradients: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gradients, [parameter.grad.tolist() for parameter in model.parameters()])  # type: ignore[union-attr]
    assert all(gradient == gradients[0] for gradient in gradients)


def test_non_contiguous_and_gradient_tensors() -> None:
    size = dist.get_world_size()
    tensor = torch.ones(4, 4)[:, ::2]
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((4, 2), float(size)))
    parameter = torch.nn.Parameter(torch.full((2,), float(dist.get_rank())))
    dist.broadcast(parameter, 1)
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_broadcast_and_reduce_with_every_root() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for root in range(size):
        tensor = torch.full((5,), rank)
        dist.broadcast(tensor, root)
        assert torch.equal(tensor, torch.full((5,), root))
        tensor = torch.full((5,), float(rank))
        dist.reduce(tensor, root, dist.ReduceOp.MAX)
        if rank == root:
            assert torch.equal(tensor, torch.full((5,), size - 1.0))
    with pytest.raises(ConfigError, match="no rank"):
        dist.broadcast(torch.zeros(1), size)


def test_gathers() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.full((2, 2), rank)
    outputs = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(outputs, mine)
    assert [int(t[1, 1]) for t in outputs] == list(range(size))
    uneven = [torch.zeros(r + 1) for r in range(size)]
    dist.all_gather(uneven, torch.full((rank + 1,), float(rank)))
    assert all(torch.equal(t, torch.full((r + 1,), float(r))) for r, t in enumerate(uneven))
    whole = torch.empty(2 * size, 2, dtype=torch.int64)
    dist.all_gather_into_tensor(whole, mine)
    assert torch.equal(whole, torch.arange(size).repeat_interleave(2).unsqueeze(1).repeat(1, 2))
    at_last = [torch.empty_like(mine) for _ in range(size)] if rank == size - 1 else None
    dist.gather(mine, at_last, dst=size - 1)
    assert at_last is None or [int(t[0, 0]) for t in at_last] == list(range(size))


def test_scatters() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.empty(3)
    dist.scatter(mine, [torch.full((3,), float(r)) for r in range(size)] if rank == 1 else None, src=1)
    assert torch.equal(mine, torch.full((3,), float(rank)))
    dist.reduce_scatter(mine, [torch.full((3,), float(r)) for r in range(size)])
    assert torch.equal(mine, torch.full((3,), float(rank * size)))
    dist.reduce_scatter_tensor(mine, torch.arange(3.0 * size), op=dist.ReduceOp.AVG)
    assert torch.equal(mine, torch.arange(3.0 * rank, 3.0 * rank + 3))


def test_all_to_all() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs = [torch.full((to + 1,), float(rank)) for to in range(size)]
    outputs = [torch.empty(rank + 1) for _ in range(size)]
    dist.all_to_all(outputs, inputs)
    assert [int(t[0]) for t in outputs] == list(range(size))
    output = torch.empty(size, dtype=torch.int64)
    dist.all_to_all_single(output, torch.full((size,), rank))
    assert output.tolist() == list(range(size))
    output = torch.empty(size * (rank + 1), 2)
    dist.all_to_all_single(output, torch.cat([t.unsqueeze(1).repeat(1, 2) for t in inputs]),
                           [rank + 1] * size, [to + 1 for to in range(size)])  # fmt: skip
    assert torch.equal(output[:, 0], torch.arange(float(size)).repeat_interleave(rank + 1))


def test_objects() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    gathered: list[object] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank})
    assert gathered == [{"rank": r, "text": "x" * r} for r in range(size)]
    objects: list[object] = [rank, "of", rank] if rank == 2 else [None] * 3
    dist.broadcast_object_list(objects, src=2)
    assert objects == [2, "of", 2]
    mine: list[object] = [None]
    dist.scatter_object_list(mine, [{"to": r} for r in range(size)] if rank == 0 else None, src=0)
    assert mine == [{"to": rank}]


def test_messages() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    received = torch.empty(100_000)
    sent = torch.full((100_000,), float(rank))
    for work in [dist.isend(sent, after, tag=7), dist.irecv(received, before, tag=7)]:
        work.wait()
    assert torch.equal(received, torch.full((100_000,), float(before)))
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, before), dist.P2POp(dist.irecv, received, after)]):
        work.wait()
    assert float(received[0]) == after
    if rank == 0:
        sources = {dist.recv(received) for _ in range(1, size)}
        assert sources == set(range(1, size))
    else:
        dist.send(sent, 0)


def test_a_message_that_does_not_fit_or_does_not_come() -> None:
    rank = dist.get_rank()
    if rank == 0:
        work = dist.isend(torch.zeros(10), 1)
        work.wait()
    if rank == 1:
        with pytest.raises(MismatchError, match="more than fits"):
            dist.recv(torch.zeros(5), 0)
        with pytest.raises(WaitTimeoutError, match="no rank has made the matching call"):
            dist.irecv(torch.zeros(5), 0, tag=3).wait(timedelta(seconds=0.2))
    dist.barrier()


def test_barriers() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.barrier(async_op=True).wait()
    dist.barrier(timeout=timedelta(seconds=20))
    chaos_mpi.torch.monitored_barrier(timeout=timedelta(seconds=20))
    dist.barrier()
    group = dist.new_group()
    if rank == 0:
        with pytest.raises(WaitTimeoutError, match=r"Ranks 1, 2 failed to pass monitoredBarrier within 0.5 s"):
            chaos_mpi.torch.monitored_barrier(group, timedelta(seconds=0.5), wait_all_ranks=True)
    elif rank > 2:
        with pytest.raises(WaitTimeoutError):
            chaos_mpi.torch.monitored_barrier(group, timedelta(seconds=0.5))
    assert size > 2
    dist.barrier()


def test_groups_of_some() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group([r for r in range(size) if r % 2 == parity]) for parity in range(2)]
    mine = [r for r in range(size) if r % 2 == rank % 2]
    tensor = torch.tensor([rank])
    dist.all_reduce(tensor, group=groups[rank % 2])
    assert tensor.item() == sum(mine)
    tensor = torch.tensor([rank])
    dist.broadcast(tensor, mine[-1], group=groups[rank % 2])
    assert tensor.item() == mine[-1]
    if len(mine) > 1:
        if rank == mine[0]:
            dist.send(tensor + 5, mine[1], group=groups[rank % 2])
        elif rank == mine[1]:
            dist.recv(tensor, mine[0], group=groups[rank % 2])
            assert tensor.item() == mine[-1] + 5
    work = dist.all_reduce(tensor, group=groups[rank % 2], async_op=True)
    total = torch.ones(1)
    dist.all_reduce(total)
    work.wait()
    assert total.item() == size


def test_unmodified_ddp_averages_gradients() -> None:
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)))
    inputs = torch.randn(dist.get_world_size(), 8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(inputs[dist.get_rank()]).pow(2).sum().backward()
    grads = [p.grad for p in model.parameters()]
    for grad in grads:
        assert grad is not None
        all_grads = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
        dist.all_gather(all_grads, grad)
        assert all(torch.equal(all_grads[0], other) for other in all_grads)


@pytest.mark.parametrize("as_view", [False, True])
def test_the_hook_averages_gradients(session: Session, as_view: bool) -> None:
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))]
    modules.append(copy.deepcopy(modules[0]))
    models = [
        DistributedDataParallel(m.double(), gradient_as_bucket_view=as_view, bucket_cap_mb=0.0001) for m in modules
    ]
    models[0].register_comm_hook(chaos_mpi.torch.ElasticState(models[0]), chaos_mpi.torch.elastic_hook)
    inputs = torch.randn(5, dist.get_world_size(), 8, 4, generator=torch.Generator().manual_seed(1)).double()
    begun = session.step
    for step in range(4):
        for model in models:
            model.zero_grad()
            if step == 2:
                with model.no_sync():
                    model(inputs[4, dist.get_rank()]).pow(2).sum().backward()
            model(inputs[step, dist.get_rank()]).pow(2).sum().backward()
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12), step
        mean = modules[0][1].running_mean
        first = mean.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mean, first)
    assert session.step == begun + 4


def test_the_hook_refuses_gradients_of_what_was_frozen() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[0].requires_grad_(False)
    model = DistributedDataParallel(module)
    model.register_comm_hook(chaos_mpi.torch.ElasticState(model), chaos_mpi.torch.elastic_hook)
    model(torch.ones(1, 2)).sum().backward()
    module[0].requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'0\.weight' has a gradient"):
        model(torch.ones(1, 2)).sum().backward()


def test_the_hook_is_refused_outside_the_default_group() -> None:
    model = DistributedDataParallel(torch.nn.Linear(2, 2), process_group=dist.new_group())
    with pytest.raises(ConfigError, match="default group"):
        chaos_mpi.torch.ElasticState(model)


def test_join_is_refused_with_the_hook() -> None:
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.register_comm_hook(chaos_mpi.torch.ElasticState(model), chaos_mpi.torch.elastic_hook)
    with pytest.raises(ConfigError, match="leave join"), model.join():
        model(torch.ones(1, 2))


def test_calls_in_inference_mode() -> None:
    with torch.inference_mode():
        total = torch.ones(3)
        dist.all_reduce(total, async_op=True).wait()
        rows = [torch.empty(1) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, torch.full((1,), float(dist.get_rank())), async_op=True).wait()
    assert total.tolist() == [dist.get_world_size()] * 3
    assert [int(row) for row in rows] == list(range(dist.get_world_size()))
    dist.all_reduce(torch.ones(1))


def test_a_model_that_rank_0_hands_out() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    torch.manual_seed(dist.get_rank())
    model = torch.nn.Linear(3, 2)
    state = copy.deepcopy(model.state_dict()) if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    weights: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(weights, [parameter.tolist() for parameter in model.parameters()])
    assert all(own == weights[0] for own in weights)


def test_an_asynchronous_checkpoint(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder: list[Any] = [str(tmp_path)]
    dist.broadcast_object_list(folder, 0)
    saved = dcp.async_save({"weights": torch.arange(6.0)}, checkpoint_id=folder[0], process_group=dist.new_group())
    total = torch.ones(1)
    dist.all_reduce(total)  # training goes on
    assert total.item() == dist.get_world_size()
    saved.result(timeout=30)  # type: ignore[union-attr]
    loaded = {"weights": torch.zeros(6)}
    dcp.load(loaded, checkpoint_id=folder[0])
    assert torch.equal(loaded["weights"], torch.arange(6.0))
    dist.barrier()


def test_functional_collectives() -> None:
    import torch.distributed._functional_collectives as functional

    size = dist.get_world_size()
    group = dist.group.WORLD
    assert torch.equal(functional.all_reduce(torch.ones(2), "sum", group), torch.full((2,), float(size)))
    gathered = functional.all_gather_tensor(torch.full((1,), dist.get_rank()), 0, group)
    assert gathered.tolist() == list(range(size))
    assert torch.equal(
        functional.reduce_scatter_tensor(torch.ones(size), "sum", 0, group), torch.full((1,), float(size))
    )


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="not"):
        dist.all_reduce(torch.zeros(2), dist._make_nccl_premul_sum(2.0))
    with pytest.raises(ConfigError, match="dense"):
        dist.broadcast(torch.eye(2).to_sparse(), 0)
