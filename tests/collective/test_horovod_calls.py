"""The calls of ``chaos_mpi.horovod.torch`` on the session of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import chaos_mpi.horovod.torch as hvd
from chaos_mpi import Session
from chaos_mpi.horovod.torch.adasum import adasum

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def job(session: Session) -> Iterator[Session]:
    """The job of Horovod's calls, in the session that is open."""
    hvd.init()
    yield session
    hvd.shutdown()
    assert not hvd.is_initialized()
    session.barrier()  # the session itself stays open


def ranks(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float64)


def test_who_is_where(job: Session) -> None:
    assert (hvd.rank(), hvd.size()) == (job.rank, job.size)
    assert (hvd.local_rank(), hvd.local_size()) == (job.rank, job.size)
    assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
    assert hvd.is_homogeneous()
    assert hvd.mpi_built()
    assert not hvd.nccl_built()
    with pytest.raises(NotImplementedError, match="event-log"):
        hvd.start_timeline("timeline.json")


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum, hvd.Min, hvd.Max, hvd.Product])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8])
def test_reductions(job: Session, op: int, dtype: torch.dtype) -> None:
    every = torch.stack([torch.tensor([r + 1, 2, 1]) for r in range(job.size)]).to(torch.float64)
    expected = {
        hvd.Average: every.mean(0), hvd.Sum: every.sum(0), hvd.Min: every.amin(0), hvd.Max: every.amax(0),
        hvd.Product: every.prod(0),
    }[op]  # fmt: skip
    expected = expected if dtype.is_floating_point else expected.trunc()
    result = hvd.allreduce(every[job.rank].to(dtype), op=op)
    assert result.dtype == dtype
    assert torch.equal(result.to(torch.float64), expected)


def test_scales_compression_and_groups(job: Session) -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert torch.equal(
        hvd.allreduce(tensor, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0), 1.5 * job.size * tensor
    )
    assert hvd.allreduce(torch.tensor([1 + 2**-20]), compression=hvd.Compression.fp16).item() == 1.0
    one, two = hvd.grouped_allreduce([tensor, tensor.double() * job.rank], op=hvd.Sum)
    assert torch.equal(one, tensor * job.size)
    assert torch.equal(two, tensor.double() * ranks(job.size).sum())
    with pytest.raises(ValueError, match="replaced"):
        hvd.allreduce(tensor, average=True, op=hvd.Sum)


def test_values_that_stand_otherwise_in_memory_than_they_are(job: Session) -> None:
    """PyTorch computes conjugates and their imaginary parts, which are negative views, when they are read."""
    whole = torch.complex(ranks(3), ranks(3) + job.rank).conj()
    for tensor in (whole, whole.imag):
        own = tensor.resolve_conj().resolve_neg().clone()
        sent = hvd.broadcast(tensor, root_rank=0)
        assert torch.equal(sent, own + (job.rank * 1j if own.is_complex() else job.rank))
        assert torch.equal(hvd.allgather(tensor).view(-1, 3)[job.rank], own)
        if not own.is_complex():
            assert torch.equal(hvd.allreduce(tensor, op=hvd.Max), -ranks(3))
        both = hvd.grouped_allgather([tensor, tensor.real])
        assert torch.equal(both[0].view(-1, 3)[job.rank], own)
        assert torch.equal(hvd.alltoall(tensor.repeat(job.size)).view(-1, 3)[job.rank], own)


def test_calls_in_another_order_are_matched_by_name(job: Session) -> None:
    names = [f"tensor {i}" for i in range(6)]
    mine = names[job.rank :] + names[: job.rank]
    handles = {
        name: hvd.allreduce_async(torch.tensor([float(names.index(name))]), name=name, op=hvd.Sum) for name in mine
    }
    for index, name in enumerate(names):
        assert hvd.synchronize(handles[name]).item() == index * job.size
    assert hvd.synchronize(handles[names[0]]) is None


def test_a_name_that_is_pending_is_refused(job: Session) -> None:
    if job.rank == 0:
        handle = hvd.allreduce_async(torch.ones(1), name="twice", op=hvd.Sum)
        with pytest.raises(ValueError, match="twice"):
            hvd.allreduce_async(torch.ones(1), name="twice", op=hvd.Sum)
        assert not hvd.poll(handle)
    hvd.barrier()
    if job.rank != 0:
        handle = hvd.allreduce_async(torch.ones(1), name="twice", op=hvd.Sum)
    assert hvd.synchronize(handle).item() == job.size


def test_calls_that_differ_are_errors_at_every_rank_and_the_next_one_works(job: Session) -> None:
    with pytest.raises(
        hvd.HorovodInternalError, match=r"float32 \(2,\).*float32 \(3,\)|float32 \(3,\).*float32 \(2,\)"
    ):
        hvd.allreduce(torch.ones(2 if job.rank == 0 else 3))
    with pytest.raises(hvd.HorovodInternalError, match="from rank"):
        hvd.broadcast(torch.ones(2), job.rank)
    with pytest.raises(hvd.HorovodInternalError, match="different calls, each for ever"):
        hvd.allreduce(torch.ones(2), name="one" if job.rank == 0 else "other")
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == job.size


def test_moves(job: Session) -> None:
    mine = torch.full((job.rank + 1, 2), job.rank)
    expected = torch.cat([torch.full((r + 1, 2), r) for r in range(job.size)])
    assert torch.equal(hvd.allgather(mine), expected)
    assert [t.tolist() for t in hvd.grouped_allgather([mine, mine])] == [expected.tolist()] * 2
    assert hvd.broadcast(torch.tensor([job.rank]), 1).item() == 1
    assert hvd.broadcast_object({"rank": job.rank, "text": "x" * job.rank}, 1) == {"rank": 1, "text": "x"}
    assert hvd.allgather_object(("a", job.rank)) == [("a", r) for r in range(job.size)]
    splits = torch.arange(1, job.size + 1, dtype=torch.int32)
    rows = torch.cat([torch.full((to + 1,), to) for to in range(job.size)])
    got, received = hvd.alltoall(rows, splits)
    assert got.tolist() == [job.rank] * ((job.rank + 1) * job.size)
    assert received.tolist() == [job.rank + 1] * job.size
    part = hvd.reducescatter(torch.arange(2 * job.size + 1).double(), op=hvd.Sum)
    whole = torch.arange(2 * job.size + 1).double() * job.size
    assert torch.equal(part, whole[:3] if job.rank == 0 else whole[2 * job.rank + 1 : 2 * job.rank + 3])


def test_gradients_of_calls(job: Session) -> None:
    tensor = torch.tensor([float(job.rank), 1.0], requires_grad=True)
    weight = job.rank + 1.0
    (hvd.allreduce(tensor, op=hvd.Sum) * weight).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [sum(range(1, job.size + 1))] * 2
    tensor.grad = None
    # The average over the ranks' losses: each has this rank's rows once.
    hvd.allgather(tensor).sum().backward()
    assert tensor.grad.tolist() == [1.0, 1.0]


def test_adasum_adapts(job: Session) -> None:
    size = job.size
    if size & (size - 1):
        pytest.skip("for a number of ranks that is a power of two")
    parallel = hvd.allreduce(torch.tensor([2.0, 4.0]), op=hvd.Adasum)
    assert torch.allclose(parallel, torch.tensor([2.0, 4.0]))
    orthogonal = hvd.allreduce(torch.eye(size)[job.rank], op=hvd.Adasum)
    assert torch.allclose(orthogonal, torch.ones(size))
    values = [torch.tensor([float(r), 1.0 - r], dtype=torch.float64) for r in range(size)]
    assert torch.equal(hvd.allreduce(values[job.rank], op=hvd.Adasum), adasum(values))


def test_process_sets(job: Session) -> None:
    odd_ranks = list(range(1, job.size, 2))
    even, odd = hvd.add_process_set(range(0, job.size, 2)), hvd.add_process_set(odd_ranks)
    mine = odd if job.rank % 2 else even
    assert mine.included()
    assert mine.rank() == job.rank // 2
    total = hvd.allreduce(torch.tensor([job.rank]), op=hvd.Sum, process_set=mine)
    assert total.item() == sum(range(job.rank % 2, job.size, 2))
    root = job.rank % 2
    assert hvd.broadcast(torch.tensor([job.rank]), root, process_set=mine).item() == root
    other = even if job.rank % 2 else odd
    with pytest.raises(ValueError, match="is not in"):
        hvd.allreduce(torch.ones(1), process_set=other)
    with pytest.raises(ValueError, match="already"):
        hvd.add_process_set(odd_ranks)
    assert hvd.remove_process_set(odd)
    assert hvd.remove_process_set(even)
    assert not hvd.remove_process_set(hvd.global_process_set)
    assert odd.size() is None


def test_process_sets_from_the_start(job: Session) -> None:
    hvd.shutdown()
    first, rest = hvd.ProcessSet([0]), hvd.ProcessSet(range(job.size - 1, 0, -1))
    hvd.init(process_sets=[first, rest])
    assert hvd.global_process_set.ranks == list(range(job.size))
    assert (first.process_set_id, rest.process_set_id) == (1, 2)
    assert rest.ranks == list(range(1, job.size))
    mine = first if job.rank == 0 else rest
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=mine).item() == mine.size()
    with pytest.raises(ValueError, match="already"):
        hvd.init(process_sets=[hvd.ProcessSet([0]), hvd.ProcessSet([0])])
    with pytest.raises(ValueError, match="cannot choose"):
        hvd.init(comm=[0])


def test_ranks_that_have_joined_add_zeros(job: Session) -> None:
    for early in range(job.size):
        if job.rank != early:
            got = hvd.allreduce(torch.ones(2), op=hvd.Average)
            assert torch.allclose(got, torch.full((2,), (job.size - 1) / job.size))
            with pytest.raises(hvd.HorovodInternalError, match="has joined"):
                hvd.allgather(torch.ones(2), name="gathered")
        last = hvd.join()
        assert last != early
        assert hvd.allgather_object(last) == [last] * job.size


def model_and_optimizer(**how: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **how)  # type: ignore[arg-type]


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * step + rank)).double()


def alone(size: int, steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    """The parameters after training in one process with the batches of all ranks."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(size):
            (model(batch(rank, step)).square().mean() * scale / size).backward()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize(
    "how",
    [{}, {"gradient_predivide_factor": 4.0}, {"groups": 2}, {"op": hvd.Sum}],
    ids=["plain", "predivide", "groups", "sum"],
)
def test_optimizer(job: Session, how: dict[str, object]) -> None:
    model, optimizer = model_and_optimizer(**how)
    before = job.step
    for step in range(4):
        optimizer.zero_grad()
        model(batch(job.rank, step)).square().mean().backward()
        if step == 1:
            with pytest.raises(AssertionError, match="zero_grad"):
                optimizer.zero_grad()
        if step == 2:
            hvd.allreduce(torch.ones(1), name="between")
        optimizer.step()
    assert job.step == before + 4
    expected = alone(job.size, 4, job.size if how.get("op") == hvd.Sum else 1.0)
    for param, other in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(param, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_steps_that_come_to_nothing(job: Session, op: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is loaded, or another optimizer made, between backward and step; each layer is a bucket."""
    monkeypatch.setattr("chaos_mpi.horovod.torch.step.BUCKET_BYTES", 64)
    model, optimizer = model_and_optimizer(op=op)
    model(batch(job.rank, 77)).square().mean().backward()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    model(batch(job.rank, 78)).square().mean().backward()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), op=op)
    for step in range(3):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(batch(job.rank, step)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    for param, other in zip(model.parameters(), alone(job.size, 3, job.size if op == hvd.Sum else 1.0), strict=True):
        assert torch.allclose(param, other, rtol=1e-12, atol=1e-14)


def test_calls_in_inference_mode(job: Session) -> None:
    with torch.inference_mode():
        assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [job.size] * 2
        assert hvd.allreduce_(torch.ones(2), op=hvd.Sum).tolist() == [job.size] * 2
        assert hvd.broadcast_(torch.full((2,), float(job.rank)), 1).tolist() == [1.0, 1.0]


def test_optimizer_whose_gradients_are_rounded(job: Session) -> None:
    model, optimizer = model_and_optimizer(compression=hvd.Compression.fp16)
    model(batch(job.rank, 0)).square().mean().backward()
    optimizer.step()
    for param, other in zip(model.parameters(), alone(job.size, 1), strict=True):
        assert torch.allclose(param, other, rtol=1e-2, atol=1e-4)
        assert not torch.equal(param, other)


def test_parameters_that_are_trained_later(job: Session) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).double()
    model[0].requires_grad_(False)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(plain)
    for step in range(4):
        if step == 2:
            model[0].requires_grad_(True)
            model(batch(job.rank, step)).square().mean().backward()
            with pytest.raises(ValueError, match="not reduced"):
                optimizer.step()
            optimizer = hvd.DistributedOptimizer(plain)
        optimizer.zero_grad()
        model(batch(job.rank, step)).square().mean().backward()
        optimizer.step()
    for param in model.parameters():
        rows = hvd.allgather(param.detach().unsqueeze(0))
        assert all(torch.equal(row, rows[0]) for row in rows)


def test_optimizers_whose_steps_begin_in_another_order(job: Session) -> None:
    """The graphs depend on the data, so that the first gradients are of different optimizers."""
    for begun in (0, 1):  # by rank 0
        (one, of_one), (two, of_two) = model_and_optimizer(), model_and_optimizer()
        model = (one, two)[begun if job.rank == 0 else 1 - begun]
        model(batch(job.rank, 0)).square().mean().backward()
        of_one.step()
        of_two.step()
        for param in (*one.parameters(), *two.parameters()):
            rows = hvd.allgather(param.detach().unsqueeze(0))
            assert all(torch.equal(row, rows[0]) for row in rows)


def test_optimizers_that_are_used_in_turn_in_another_order(job: Session) -> None:
    (one, of_one), (two, of_two) = model_and_optimizer(), model_and_optimizer()
    (one(batch(job.rank, 0)).square().mean() + two(batch(job.rank, 0)).square().mean()).backward()
    for optimizer in (of_one, of_two) if job.rank == 0 else (of_two, of_one):
        optimizer.synchronize()  # type: ignore[attr-defined]
    for optimizer in (of_one, of_two):
        with optimizer.skip_synchronize():  # type: ignore[attr-defined]
            optimizer.step()
    for model in (one, two):
        for param, other in zip(model.parameters(), alone(job.size, 1), strict=True):
            assert torch.allclose(param, other, rtol=1e-12, atol=1e-14)


def test_uneven_data(job: Session) -> None:
    model, optimizer = model_and_optimizer()
    for step in range(2 + job.rank):
        optimizer.zero_grad()
        model(batch(job.rank, step)).square().mean().backward()
        hvd.allreduce(torch.ones(1), name="metric")
        optimizer.step()
    assert hvd.join() == job.size - 1
    for param in model.parameters():
        rows = hvd.allgather(param.detach().unsqueeze(0))
        assert all(torch.equal(row, rows[0]) for row in rows)


def test_sync_batch_norm(job: Session) -> None:
    torch.manual_seed(5)
    everything = torch.randn(job.size * 2, 3, 4, dtype=torch.float64)
    whole, parts = everything.clone().requires_grad_(), everything.clone().requires_grad_()
    alone_, together = nn.BatchNorm1d(3).double(), hvd.SyncBatchNorm(3).double()
    expected = alone_(whole)
    mine = slice(2 * job.rank, 2 * job.rank + 2)
    got = together(parts[mine])
    assert torch.allclose(got, expected[mine])
    assert torch.allclose(together.running_mean, alone_.running_mean)
    assert torch.allclose(together.running_var, alone_.running_var)
    (expected**3).sum().backward()
    (got**3).sum().backward()
    assert torch.allclose(parts.grad[mine], whole.grad[mine])  # type: ignore[index]
    assert torch.allclose(hvd.allreduce(together.weight.grad, op=hvd.Sum), alone_.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sync_batch_norm_of_half_precision(job: Session, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    whole = (torch.randn(8 * job.size, 3, 50, 60) * 20).to(dtype)  # more values than fit into a float16 count or sum
    alone_, together = nn.BatchNorm2d(3), hvd.SyncBatchNorm(3)
    expected = alone_(whole.float())
    mine = slice(8 * job.rank, 8 * job.rank + 8)
    got = together(whole[mine])
    assert got.dtype == dtype
    assert torch.allclose(got.float(), expected[mine], atol=0.02)
    assert torch.allclose(together.running_var, alone_.running_var, rtol=1e-3)
    assert hvd.SyncBatchNorm(3).to(dtype)(whole[mine]).dtype == dtype


def test_grouped_allgather_of_several_kinds(job: Session) -> None:
    rows = torch.arange(job.rank + 1).unsqueeze(1).expand(-1, 3)
    flags, scalar = torch.tensor([job.rank % 2 == 0]), torch.tensor(0.5 * job.rank, dtype=torch.float64)
    empty = torch.empty((0, 2), dtype=torch.bfloat16)
    got = hvd.grouped_allgather([rows, flags, scalar, empty])
    assert torch.equal(got[0], torch.cat([torch.arange(r + 1).unsqueeze(1).expand(-1, 3) for r in range(job.size)]))
    assert got[1].tolist() == [r % 2 == 0 for r in range(job.size)]
    assert got[2].tolist() == [0.5 * r for r in range(job.size)]
    assert got[2].dtype == torch.float64
    assert got[3].shape == (0, 2)
    wide = torch.zeros((1, 2 + job.rank % 2))
    with pytest.raises(hvd.HorovodInternalError, match="ranks call it differently"):
        hvd.grouped_allgather([wide, flags])


def test_sparse_allreduce(job: Session) -> None:
    mine = torch.sparse_coo_tensor([[job.rank, job.size]], [1.0, 2.0], (job.size + 1,))
    summed = hvd.sparse_allreduce_async(mine, None, hvd.Average)().to_dense()
    assert summed.tolist() == [1.0 / job.size] * job.size + [2.0]


def test_model_with_calls_in_its_backward(job: Session) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), hvd.SyncBatchNorm(8), nn.Linear(8, 2))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        optimizer.zero_grad()
        model(batch(job.rank, step).float()).square().mean().backward()
        optimizer.step()
    for param in model.parameters():
        rows = hvd.allgather(param.detach().unsqueeze(0))
        assert all(torch.equal(row, rows[0]) for row in rows)


def test_models_with_calls_in_their_backward_one_after_the_other(job: Session) -> None:
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(4, 8), hvd.SyncBatchNorm(8), nn.Linear(8, 2)) for _ in range(2)]
    optimizers = [hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)) for model in models]
    for step in range(2):
        losses = [model(batch(job.rank, step).float()).square().mean() for model in models]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for param in (param for model in models for param in model.parameters()):
        rows = hvd.allgather(param.detach().unsqueeze(0))
        assert all(torch.equal(row, rows[0]) for row in rows)
    del losses, loss
    model, optimizer = model_and_optimizer()
    model(batch(job.rank, 0)).square().mean().backward()
    assert optimizer._steps.under_way, "gradients are reduced in backward when no such graph is left"  # type: ignore[attr-defined]
    optimizer.step()


def test_optimizer_state_goes_to_ranks_without_one(job: Session) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1 * (job.rank + 1), betas=(0.8, 0.9))
    if job.rank == 1:
        parameter.grad = torch.ones(3)
        optimizer.step()
    hvd.broadcast_parameters([("parameter", parameter)], 1)
    hvd.broadcast_optimizer_state(optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.state[parameter]["step"].item() == 1
    digests = hvd.allgather_object([parameter.tolist(), optimizer.state[parameter]["exp_avg"].tolist()])
    assert digests == [digests[0]] * job.size
