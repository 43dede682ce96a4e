"""Calls in which every rank gives rows to others, without combining them: allgather, alltoall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from chaos_mpi.elastic.digest import byte_view
from chaos_mpi.elastic.exchanges import AllGather, AllToAll
from chaos_mpi.elastic.operations import Operation
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.handles import start, synchronize
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.negotiation import Asked
from chaos_mpi.horovod.torch.process_sets import ProcessSet, global_process_set
from chaos_mpi.horovod.torch.requests import Group, Request


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the memory of the host.

    Raises:
        ValueError: it is not dense.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"a tensor of {tensor.dtype}, {tensor.layout}, cannot be sent; make it dense first")
    return tensor.detach().cpu().resolve_conj().resolve_neg()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- allgather -----------------------------------------------------------------------------------------


def gather(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    process_set: ProcessSet,
    result: Callable[[list[torch.Tensor], list[list[int]], int], Any],
) -> int:
    """Start to gather tensors, all of them from the same ranks; the handle.

    Args:
        tensors: what this rank gives.
        name: of the call, or None.
        process_set: which ranks.
        result: what the caller gets, of the gathered tensors, the number of rows of each tensor by the rank that they
            are from, and which of these this rank is.
    """
    given = [movable(tensor) for tensor in tensors]
    if not given:
        raise ValueError("a grouped call needs at least one tensor")
    queue = process_set.queue
    name = queue.name("allgather", name)
    call = f"{name}[{'; '.join(f'{_name(t.dtype)}, (*, {tuple(t.shape[1:])})' for t in given)}]"
    sent = given[0] if len(given) == 1 else _packed(given)

    def finish(operation: AllGather, group: Group) -> Any:
        if len(given) == 1:
            gathered, rows = [operation.result], [[length] for length in operation.lengths]
        else:
            gathered, rows = _unpacked(operation.result, given)
        outputs = [output.to(tensor.device) for output, tensor in zip(gathered, tensors, strict=True)]
        return result(outputs, rows, operation.contributors.index(job().session.member))

    return start(queue, Request(Asked(name, call), lambda _: AllGather(call, sent), finish))


def _packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of several tensors, after the number of rows of each, in words of eight bytes: MPI counts them."""
    words = [torch.tensor([tensor.shape[0] if tensor.dim() else 1 for tensor in tensors], device="cpu")]
    for tensor in tensors:
        flat = byte_view(tensor)
        words.append(torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64))
    return torch.cat(words)


def _unpacked(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The tensors of all ranks along the first dimension, out of what each has packed, one after the other.

    And how many rows of each tensor are from which rank.
    """
    found: list[list[torch.Tensor]] = [[] for _ in like]
    rows_of: list[list[int]] = []
    place = 0

    def take(words: int) -> torch.Tensor:
        nonlocal place
        place += words
        return packed[place - words : place]

    while place < packed.numel():
        rows_of.append(rows := take(len(like)).tolist())
        for parts, tensor, count in zip(found, like, rows, strict=True):
            shape = [count, *tensor.shape[1:]]
            nbytes = prod(shape) * tensor.element_size()
            parts.append(take(-(-nbytes // 8)).view(torch.uint8)[:nbytes].clone().view(tensor.dtype).view(shape))
    return [torch.cat(parts) for parts in found], rows_of


def allgather_async(tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """As :func:`allgather`, in the background and without a gradient; returns a handle for :func:`synchronize`."""
    return gather([tensor], name, process_set, lambda outputs, *_: outputs[0])


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """As :func:`allgather_async`, of several tensors."""
    return gather(tensors, name, process_set, lambda outputs, *_: tuple(outputs))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, process_set: ProcessSet, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        job().note_in_graph(ctx)
        ctx.shapes, ctx.process_set = [t.shape for t in tensors], process_set
        handle = gather(tensors, name, process_set, lambda *gathered: gathered)
        outputs, rows, own = synchronize(handle)
        # Of those whose rows they are: a rank with a lower number may be gone when the gradients come.
        ctx.starts = [sum(counts[i] for counts in rows[:own]) for i in range(len(tensors))]
        ctx.rows = rows[own]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        ctx.made.in_backward = True
        from chaos_mpi.horovod.torch.reduce_ops import Average
        from chaos_mpi.horovod.torch.reducing import grouped_allreduce

        averages = grouped_allreduce(list(gradients), op=Average, process_set=ctx.process_set)
        parts = zip(averages, ctx.starts, ctx.rows, ctx.shapes, strict=True)
        return None, None, *(a.narrow(0, first, count).view(shape) for a, first, count, shape in parts)


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """The tensors of all ranks one after the other, along the first dimension. It can be differentiated.

    Args:
        tensor: its first dimension may differ between ranks.
        name: what the ranks' calls are matched by; by their number if there is none.
        process_set: which ranks.

    Raises:
        HorovodInternalError: dtype or further dimensions differ between ranks.
    """
    return _AllGather.apply(name, process_set, tensor)[0]  # type: ignore[no-any-return, no-untyped-call]


def grouped_allgather(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[torch.Tensor]:
    """As :func:`allgather`, of several tensors."""
    return list(_AllGather.apply(name, process_set, *tensors))  # type: ignore[no-untyped-call]


# -- alltoall ------------------------------------------------------------------------------------------


def alltoall_async(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """As :func:`alltoall`, in the background and without a gradient; the result has the received splits always."""
    given = movable(tensor)
    wanted = _checked_splits(given, splits, process_set)
    queue = process_set.queue
    name = queue.name("alltoall", name)
    call = f"{name}[{_name(given.dtype)}, (*, {tuple(given.shape[1:])})]"

    size, rows = process_set.size() or 1, given.shape[0]

    tried = False

    def make(group: Group) -> Operation:
        nonlocal tried
        fits, was_tried, tried = wanted is None and rows % group.size == 0, tried, True
        if fits:
            return AllToAll(call, given, None, group.size)
        if was_tried:
            raise ValueError(f"{rows} rows cannot be shared out equally to {group.size} ranks")
        # Also a rank that knows that it is for other ranks than there are takes part, so that all find out together.
        request.anew = wanted is None
        return AllToAll(call, given, wanted if wanted is not None else [rows // size] * size, size)

    def finish(operation: AllToAll, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        return operation.result.to(tensor.device), torch.tensor(operation.received, dtype=torch.int32, device="cpu")

    request = Request(Asked(name, call), make, finish)
    return start(queue, request)


def refuse_changed(call: str, ctx: Any) -> None:
    """Raise HorovodInternalError if ranks have died since the forward of this call; at every rank."""
    if ctx.process_set is global_process_set and job().members != ctx.members:
        raise HorovodInternalError(
            f"{call}: a rank has died since this was called in forward, so its gradient cannot be computed"
        )


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, splits: Any, name: str | None, process_set: ProcessSet
    ) -> tuple[torch.Tensor, torch.Tensor]:
        job().note_in_graph(ctx)
        result, received = synchronize(alltoall_async(tensor, splits, name, process_set))
        ctx.received, ctx.process_set, ctx.members = received, process_set, job().members
        ctx.mark_non_differentiable(received)
        return result, received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
        ctx.made.in_backward = True
        refuse_changed("alltoall", ctx)
        returned, _ = alltoall(gradient, ctx.received, process_set=ctx.process_set)
        return returned, None, None, None


def alltoall(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every rank's tensor is split along the first dimension, and each rank gets its part of all. Differentiable.

    Args:
        tensor: not changed.
        splits: rows for each rank, as 32-bit integers; None for equal parts.
        name: what the ranks' calls are matched by; by their number if there is none.
        process_set: which ranks.

    Returns:
        What this rank got; with ``splits`` also how many rows came from each rank.

    Raises:
        HorovodInternalError: dtype or further dimensions differ between ranks.
        ValueError: the splits do not fit the tensor.
    """
    result, received = _AllToAll.apply(tensor, splits, name, process_set)  # type: ignore[no-untyped-call]
    return result if splits is None else (result, received)


def _checked_splits(
    tensor: torch.Tensor, splits: torch.Tensor | Sequence[int] | None, process_set: ProcessSet
) -> list[int] | None:
    size = process_set.size() or 1
    if tensor.dim() == 0:
        raise ValueError("alltoall shares out the first dimension, which a scalar has not got")
    if splits is None:
        if tensor.shape[0] % size:
            raise ValueError(f"{tensor.shape[0]} rows cannot be shared out equally to {size} ranks; give splits")
        return None
    if isinstance(splits, torch.Tensor) and splits.dtype != torch.int32:
        raise ValueError(f"splits are to be 32-bit integers, not {splits.dtype}")
    rows = [int(n) for n in splits]
    if len(rows) != size or min(rows, default=0) < 0 or sum(rows) != tensor.shape[0]:
        raise ValueError(f"splits {rows} do not share {tensor.shape[0]} rows out to {size} ranks")
    return rows
