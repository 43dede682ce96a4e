"""A script's default device is for its own tensors: what is sent and received is in the memory of the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from echo import EchoSession, EchoWorld, hvd_job

import chaos_mpi.horovod.torch as hvd
from chaos_mpi.elastic.collectives import CollectiveCalls
from chaos_mpi.elastic.exchanges import AllGather, AllReduce, Barrier, Broadcast
from chaos_mpi.elastic.operations import Operation
from chaos_mpi.elastic.ranked import BroadcastFrom
from chaos_mpi.horovod.torch.adasum import Adaptive
from chaos_mpi.membership import View
from chaos_mpi.torch.buckets import BufferSet, GradientStep, make_buckets
from chaos_mpi.torch.staging import host_memory


class Calls(CollectiveCalls):
    """Of an echo session."""

    epoch = 0

    def __init__(self, session: EchoSession) -> None:
        self._session = session

    @property
    def rank(self) -> int:
        return self._session.rank

    @property
    def size(self) -> int:
        return self._session.size

    def execute(self, operation: Operation) -> None:
        self._session.execute(operation)


@pytest.fixture
def tensors() -> Iterator[list[torch.Tensor]]:
    """Of the script, on the CPU."""
    made = [torch.tensor([1.0, 2.0]), torch.tensor([[3, 4]])]
    torch.set_default_device("meta")  # where nothing has values
    try:
        yield made
    finally:
        torch.set_default_device(None)


def test_calls_of_the_session(tensors: list[torch.Tensor]) -> None:
    calls = Calls(EchoSession(2))
    calls.barrier()
    assert calls.all_reduce(tensors[0]).tolist() == [2.0, 4.0]
    assert calls.gather({"rank": 0}) == [{"rank": 0}] * 2
    calls.share("state", tensors)
    assert calls.evaluate(4, lambda part: tensors[0] * len(part)).tolist() == [8.0, 16.0]


def test_exchanges(tensors: list[torch.Tensor]) -> None:
    session = EchoSession(2)
    called = View(0, session.members)
    calls: list[Any] = [
        AllReduce("call", tensors), AllGather("call", tensors[1]), Broadcast("call", tensors, 0), Barrier(),
        BroadcastFrom("call", called, tensors, 0), Adaptive("call", tensors[:1]),
    ]  # fmt: skip
    for operation in calls:
        session.execute(operation)
        operation.finish()
    assert [t.tolist() for t in calls[0].results()] == [[2.0, 4.0], [[6, 8]]]
    assert calls[1].result.tolist() == [[3, 4], [3, 4]]
    for handed_out in (calls[2], calls[4]):
        handed_out.deliver()
    assert [t.tolist() for t in tensors] == [[1.0, 2.0], [[3, 4]]]
    assert calls[5].sums()[0].tolist() == [1.0, 2.0]


def test_gradient_steps(tensors: list[torch.Tensor]) -> None:
    params = [torch.nn.Parameter(tensors[0])]
    (params[0] * 3).sum().backward()
    memory = BufferSet(buckets := make_buckets(params, 100), params, tensors[1].nbytes, [])
    step = GradientStep(params, buckets, [tensors[1]], memory, True, lambda: False)
    world: Any = EchoWorld(2)
    step.launch(world, View(0, ("a", "b")))
    step.wait(lambda: "nobody", 1.0)
    step.deliver()
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [3.0, 3.0]
    assert tensors[1].tolist() == [[3, 4]]
    assert host_memory(3, torch.float32, torch.device("cpu")).tolist() == [0.0] * 3


def test_horovods_interface(tensors: list[torch.Tensor]) -> None:
    param = torch.nn.Parameter(tensors[0].clone())
    with hvd_job(size=2):
        assert hvd.allreduce(tensors[0], op=hvd.Sum, prescale_factor=2.0).tolist() == [4.0, 8.0]
        assert [t.tolist() for t in hvd.grouped_allgather(tensors)] == [[1.0, 2.0] * 2, [[3, 4]] * 2]
        assert hvd.broadcast_object({"epoch": 3}) == {"epoch": 3}
        assert hvd.allgather_object("text") == ["text"] * 2
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([param], lr=1.0))
        hvd.broadcast_optimizer_state(optimizer, 0)
        (param * tensors[0]).sum().backward()
        optimizer.step()
    assert param.tolist() == [0.0, 0.0]
