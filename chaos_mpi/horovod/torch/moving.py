"""Calls that move tensors without combining them: allgather, broadcast, alltoall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from chaos_mpi.elastic import exchanges
from chaos_mpi.elastic.exchanges import AllGather, AllToAll, described
from chaos_mpi.elastic.operations import Operation, unpack_bytes
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.handles import start, synchronize
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.negotiation import Asked
from chaos_mpi.horovod.torch.process_sets import ProcessSet, global_process_set
from chaos_mpi.horovod.torch.requests import Group, Request
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import Pending


class Broadcast(exchanges.Broadcast):
    """As that one; if the root dies, the rank counts that has its number then, or the last one.

    Args:
        member: the root, if it may have another number by now.
    """

    def __init__(self, call: str, tensors: Sequence[torch.Tensor], root: int, member: str | None = None) -> None:
        super().__init__(call, tensors, root)
        self.bound_to_view = False
        self._number, self._member = root, member
        self.is_of_this_rank = False  # until it is known: the tensor that all get

    def move(self, pending: Pending, view: View, rank: int) -> None:
        if self._member is not None and self._member in view.members:
            self._root = view.members.index(self._member)
        else:
            self._root = min(self._number, view.size - 1)
        self.is_of_this_rank = rank == self._root
        super().move(pending, view, rank)

    def deliver_into(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the root's bits into other tensors."""
        unpack_bytes(self._flat, list(tensors))


class BroadcastOf(Broadcast):
    """As that one, but of one member: if it dies meanwhile, nobody gets anything, and all get an error."""

    def __init__(self, call: str, tensors: Sequence[torch.Tensor], member: str) -> None:
        super().__init__(call, tensors, 0, member)
        self._of = member

    def start(self, pending: Pending, view: View, rank: int) -> None:
        self.for_size = for_those_with(self._of, view)
        super().start(pending, view, rank)


def for_those_with(member: str, view: View) -> int | None:
    """What an exchange is to be for if this member is its root: any number of ranks, or none if the member is gone."""
    return None if member in view.members else 0


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"a tensor of {tensor.dtype}, {tensor.layout}, cannot be sent; make it dense first")
    return tensor.detach().cpu()


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
    given = [_movable(tensor) for tensor in tensors]
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
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
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


# -- broadcast -----------------------------------------------------------------------------------------


def _broadcast(
    tensor: torch.Tensor,
    output: torch.Tensor,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
    result: Callable[[torch.Tensor, bool], Any] = lambda output, _: output,
) -> int:
    """The handle; ``result`` is of ``output``, and of whether it is this rank's tensor that all have got."""
    given = _movable(tensor)
    root, member = process_set.place_of(root_rank), process_set.member_at(root_rank)
    queue = process_set.queue
    name = queue.name("broadcast", name)
    call = f"{name}[from rank {root_rank}, {described([given])}]"

    def make(group: Group) -> Operation:
        return Broadcast(call, [given], root, member)

    def finish(operation: Broadcast, group: Group) -> Any:
        operation.deliver_into([output])
        return result(output, operation.is_of_this_rank)

    return start(queue, Request(Asked(name, call), make, finish))


def broadcast_of(tensor: torch.Tensor, member: str, name: str | None) -> int:
    """Start to give this member's tensor to all ranks, in place; the handle. The call fails if the member dies."""
    given = _movable(tensor)
    queue = job().queue
    name = queue.name("broadcast", name)
    call = f"{name}[from {member}, {described([given])}]"

    def finish(operation: BroadcastOf, group: Group) -> torch.Tensor:
        operation.deliver_into([tensor])
        return tensor

    return start(queue, Request(Asked(name, call), lambda _: BroadcastOf(call, [given], member), finish, anew=False))


def broadcast_async(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """As :func:`broadcast`, in the background and without a gradient; returns a handle for :func:`synchronize`."""
    output = torch.empty_like(tensor.detach(), memory_format=torch.contiguous_format)
    return _broadcast(tensor, output, root_rank, name, process_set)


def broadcast_async_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """As :func:`broadcast_async`, in place."""
    return _broadcast(tensor, tensor, root_rank, name, process_set)


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet
    ) -> torch.Tensor:
        job().note_in_graph(ctx)
        ctx.process_set = process_set
        output = torch.empty_like(tensor.detach(), memory_format=torch.contiguous_format)
        handle = _broadcast(tensor, output, root_rank, name, process_set, lambda *both: both)
        output, ctx.is_of_this_rank = synchronize(handle)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        ctx.made.in_backward = True
        from chaos_mpi.horovod.torch.reduce_ops import Average
        from chaos_mpi.horovod.torch.reducing import allreduce

        average = allreduce(gradient, op=Average, process_set=ctx.process_set)
        if not ctx.is_of_this_rank:
            average = torch.zeros_like(average)
        return average, None, None, None


def broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """The tensor of one rank, at every rank. It can be differentiated.

    Args:
        tensor: of the same dtype and shape everywhere; not changed.
        root_rank: whose tensor, as ranks are numbered in the whole job now. If it dies meanwhile, the rank counts that
            has its number then.
        name: what the ranks' calls are matched by; by their number if there is none.
        process_set: which ranks.

    Raises:
        HorovodInternalError: dtype, shape or root differ between ranks.
    """
    return _Broadcast.apply(tensor, root_rank, name, process_set)  # type: ignore[no-any-return, no-untyped-call]


def broadcast_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """As :func:`broadcast`, in place and without a gradient."""
    return synchronize(broadcast_async_(tensor, root_rank, name, process_set))  # type: ignore[no-any-return]


# -- alltoall ------------------------------------------------------------------------------------------


def alltoall_async(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """As :func:`alltoall`, in the background and without a gradient; the result has the received splits always."""
    given = _movable(tensor)
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
