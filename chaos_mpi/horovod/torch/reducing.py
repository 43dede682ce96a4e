"""Reductions: allreduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chaos_mpi.elastic.exchanges import AllReduce, described
from chaos_mpi.elastic.operations import Operation
from chaos_mpi.horovod.torch.adasum import Adaptive
from chaos_mpi.horovod.torch.compression import Compression, Compressor
from chaos_mpi.horovod.torch.handles import start, synchronize
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.moving import gather
from chaos_mpi.horovod.torch.negotiation import Asked
from chaos_mpi.horovod.torch.process_sets import ProcessSet, global_process_set
from chaos_mpi.horovod.torch.reduce_ops import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
    averaged,
    checked,
    chosen_op,
    scaled,
)
from chaos_mpi.horovod.torch.requests import Group, Request

_ENGINE_OPS = {Average: "sum", Sum: "sum", Min: "min", Max: "max", Product: "product"}


def reduction(
    kind: str,
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    name: str | None,
    op: ReduceOp,
    scales: tuple[float, float],
    process_set: ProcessSet,
    result: Callable[[list[torch.Tensor]], Any],
) -> int:
    """Start to reduce tensors over the ranks, into others; the handle.

    Args:
        kind: what it is called.
        tensors: what this rank gives.
        outputs: where the results go; they may be the same ones.
        name: of the call, or None.
        op: how they are combined.
        scales: factors before and after.
        process_set: which ranks.
        result: what the caller gets, of ``outputs``.
    """
    if op == Adasum and process_set is not global_process_set:
        raise NotImplementedError("Adasum is there for all ranks only, not for a process set")
    before, after = scales
    given = checked(tensors)
    queue = process_set.queue
    name = queue.name(kind, name)
    factors = "" if scales == (1.0, 1.0) else f", scaled by {before}, {after}"
    call = f"{name}[{op.name.lower()}{factors}, {described(given)}]"
    zeros = None
    if op in (Average, Sum):
        shapes = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in given]
        zeros = {"tensors": shapes}

    def make(group: Group) -> Operation:
        inputs = [scaled(t, before) for t in given]
        return Adaptive(call, inputs) if op == Adasum else AllReduce(call, inputs, _ENGINE_OPS[op])

    def finish(operation: AllReduce | Adaptive, group: Group) -> Any:
        totals = operation.sums() if isinstance(operation, Adaptive) else operation.results()
        for output, total in zip(outputs, totals, strict=True):
            value = averaged(total, len(operation.contributors)) if op == Average else total
            value = value if value.dtype in (torch.float32, output.dtype) else value.to(output.dtype)
            output.copy_(scaled(value, after))
        return result(list(outputs))

    return start(queue, Request(Asked(name, call, zeros), make, finish))


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """As :func:`allreduce`, in the background and without a gradient; returns a handle for :func:`synchronize`."""
    scales = (prescale_factor, postscale_factor)
    output = torch.empty_like(tensor.detach(), memory_format=torch.contiguous_format)
    return reduction("allreduce", [tensor], [output], name, chosen_op(op, average), scales, process_set, _only)


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """As :func:`allreduce_async`, in place."""
    scales = (prescale_factor, postscale_factor)
    return reduction("allreduce", [tensor], [tensor], name, chosen_op(op, average), scales, process_set, _only)


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """As :func:`allreduce_async`, of several tensors at once."""
    scales = (prescale_factor, postscale_factor)
    outputs = [torch.empty_like(t.detach(), memory_format=torch.contiguous_format) for t in tensors]
    return reduction("allreduce", tensors, outputs, name, chosen_op(op, average), scales, process_set, tuple)


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """As :func:`allreduce_async_`, of several tensors at once."""
    scales = (prescale_factor, postscale_factor)
    return reduction("allreduce", tensors, list(tensors), name, chosen_op(op, average), scales, process_set, tuple)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, op: ReduceOp, scales: tuple[float, float], process_set: ProcessSet,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        job().note_in_graph(ctx)
        ctx.how = (op, scales, process_set)
        outputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        handle = reduction("allreduce", tensors, outputs, name, op, scales, process_set, tuple)
        return synchronize(handle)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        ctx.made.in_backward = True
        op, scales, process_set = ctx.how
        return None, None, None, None, *_AllReduce.apply(None, op, scales, process_set, *gradients)  # type: ignore[no-untyped-call]


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """The average, or another reduction, of the tensors of all ranks. It can be differentiated.

    A rank that dies meanwhile is left out: the average is over those whose tensors are in it.

    Args:
        tensor: not changed.
        average: what ``op`` was before there was ``op``.
        name: what the ranks' calls are matched by; by their number if there is none.
        compression: see :class:`Compression`.
        op: Average (default), Sum, Min, Max, Product or Adasum.
        prescale_factor, postscale_factor: factors before and after.
        process_set: which ranks.

    Raises:
        HorovodInternalError: dtype, shape or reduction differ between ranks.
        ValueError: the tensor cannot be reduced, or a call of this name is pending.
    """
    scales = (prescale_factor, postscale_factor)
    smaller, context = compression.compress(tensor)
    reduced = _AllReduce.apply(name, chosen_op(op, average), scales, process_set, smaller)  # type: ignore[no-untyped-call]
    return compression.decompress(reduced[0], context)


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """As :func:`allreduce`, in place and without a gradient."""
    handle = allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    return synchronize(handle)  # type: ignore[no-any-return]


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """As :func:`allreduce`, of several tensors at once."""
    scales = (prescale_factor, postscale_factor)
    pairs = [compression.compress(tensor) for tensor in tensors]
    smaller = [tensor for tensor, _ in pairs]
    reduced = _AllReduce.apply(name, chosen_op(op, average), scales, process_set, *smaller)  # type: ignore[no-untyped-call]
    return [compression.decompress(t, context) for t, (_, context) in zip(reduced, pairs, strict=True)]


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """As :func:`grouped_allreduce`, in place and without a gradient."""
    handle = grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    return list(synchronize(handle))


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str | None, op: int, process_set: ProcessSet = global_process_set
) -> Callable[[], torch.Tensor]:
    """Sum or average of sparse tensors, in the background: indices and values of all ranks are gathered.

    Returns:
        A function that waits for the result and returns it.
    """
    name = process_set.queue.name("sparse_allreduce", name)

    def summed(outputs: list[torch.Tensor], rows: list[list[int]], _: int) -> torch.Tensor:
        indices, values = outputs
        values = values / len(rows) if ReduceOp(op) == Average else values
        return torch.sparse_coo_tensor(indices.t(), values, tensor.size(), device=values.device)

    handle = gather([tensor._indices().t().contiguous(), tensor._values()], name, process_set, summed)
    return lambda: synchronize(handle)


def _only(outputs: list[torch.Tensor]) -> torch.Tensor:
    return outputs[0]
