"""Reductions of which each rank gets a part: reducescatter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chaos_mpi.elastic.exchanges import ReduceScatter, described, equal_rows
from chaos_mpi.elastic.operations import Operation
from chaos_mpi.horovod.torch.compression import Compression, Compressor
from chaos_mpi.horovod.torch.handles import start, synchronize
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.moving import grouped_allgather, refuse_changed
from chaos_mpi.horovod.torch.negotiation import Asked
from chaos_mpi.horovod.torch.process_sets import ProcessSet, global_process_set
from chaos_mpi.horovod.torch.reduce_ops import Average, ReduceOp, Sum, averaged, checked, scaled
from chaos_mpi.horovod.torch.requests import Group, Request


def _scatter(
    tensors: Sequence[torch.Tensor], name: str | None, op: int, process_set: ProcessSet,
    scales: tuple[float, float], result: Callable[[list[torch.Tensor]], Any],
) -> int:  # fmt: skip
    reduce_op = ReduceOp(op)
    if reduce_op not in (Average, Sum):
        raise NotImplementedError(f"reducescatter knows Average and Sum, not {reduce_op.name}")
    if any(tensor.dim() == 0 for tensor in tensors):
        raise ValueError("reducescatter shares out the first dimension, which a scalar has not got")
    before, after = scales
    given = checked(tensors)
    queue = process_set.queue
    name = queue.name("reducescatter", name)
    factors = "" if scales == (1.0, 1.0) else f", scaled by {before}, {after}"
    call = f"{name}[{reduce_op.name.lower()}{factors}, {described(given)}]"
    outputs: list[torch.Tensor] = []

    def part(index: int) -> Request:
        tensor, own, own_call = given[index], name if index == 0 else f"{name}.{index}", f"{call} {index}"

        def make(group: Group) -> Operation:
            rows = equal_rows(tensor.shape[0], group.size)
            return ReduceScatter(own_call, scaled(tensor, before), rows)

        def finish(operation: ReduceScatter, group: Group) -> Any:
            value = operation.result
            value = averaged(value, len(operation.contributors)) if reduce_op == Average else value
            value = value if value.dtype in (torch.float32, tensor.dtype) else value.to(tensor.dtype)
            outputs.append(scaled(value, after).to(tensor.dtype).to(tensors[index].device))
            return result(outputs)

        return Request(Asked(own, own_call), make, finish)

    for index in range(len(given) - 1):
        queue.put(part(index))
    return start(queue, part(len(given) - 1))


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """As :func:`reducescatter`, in the background and without a gradient."""
    return _scatter([tensor], name, op, process_set, (prescale_factor, postscale_factor), _only)


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """As :func:`reducescatter_async`, of several tensors."""
    return _scatter(tensors, name, op, process_set, (prescale_factor, postscale_factor), tuple)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, op: int, process_set: ProcessSet, scales: tuple[float, float],
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        job().note_in_graph(ctx)
        parts = synchronize(_scatter(tensors, name, op, process_set, scales, tuple))
        ctx.how, ctx.process_set, ctx.members = (op, process_set, scales), process_set, job().members
        return parts  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        ctx.made.in_backward = True
        refuse_changed("reducescatter", ctx)
        op, process_set, (before, after) = ctx.how
        factor = before * after * (process_set.size() if op == Sum else 1)
        whole = grouped_allgather([g * factor for g in gradients], process_set=process_set)
        refuse_changed("reducescatter", ctx)
        return None, None, None, None, *whole


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Average or sum of the tensors of all ranks, of which each gets its part of the rows. It can be differentiated.

    Rows are shared out as equally as can be; the first ranks get one more.

    Raises:
        HorovodInternalError: dtype, shape or reduction differ between ranks.
        NotImplementedError: another ``op``.
    """
    scales = (prescale_factor, postscale_factor)
    smaller, context = compression.compress(tensor)
    return compression.decompress(_ReduceScatter.apply(name, op, process_set, scales, smaller)[0], context)  # type: ignore[no-untyped-call]


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """As :func:`reducescatter`, of several tensors."""
    scales = (prescale_factor, postscale_factor)
    pairs = [compression.compress(tensor) for tensor in tensors]
    reduced = _ReduceScatter.apply(name, op, process_set, scales, *[tensor for tensor, _ in pairs])  # type: ignore[no-untyped-call]
    return [compression.decompress(t, context) for t, (_, context) in zip(reduced, pairs, strict=True)]


def _only(outputs: list[torch.Tensor]) -> torch.Tensor:
    return outputs[0]
