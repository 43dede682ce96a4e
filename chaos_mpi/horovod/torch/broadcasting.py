"""What one rank has, given to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chaos_mpi.elastic import exchanges
from chaos_mpi.elastic.exchanges import described
from chaos_mpi.elastic.operations import Operation, unpack_bytes
from chaos_mpi.horovod.torch.handles import start, synchronize
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.moving import movable
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


def _broadcast(
    tensor: torch.Tensor,
    output: torch.Tensor,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
    result: Callable[[torch.Tensor, bool], Any] = lambda output, _: output,
) -> int:
    """The handle; ``result`` is of ``output``, and of whether it is this rank's tensor that all have got."""
    given = movable(tensor)
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
    given = movable(tensor)
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
