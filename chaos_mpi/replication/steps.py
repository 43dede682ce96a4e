"""An optimizer step as it is kept and repeated; the state between two, and a copy of a part of it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from chaos_mpi.errors import CheckpointError
from chaos_mpi.replication.layout import Layout, Piece, Range, dense
from chaos_mpi.replication.tree import pack
from chaos_mpi.sharding.plan import joined

#: Keys of a parameter group that are no hyper-parameters.
_NOT_HYPER = frozenset({"params", "param_names"})


@dataclass(frozen=True, slots=True)
class Step:
    """One call of ``optimizer.step()``, as one member keeps it.

    Attributes:
        meta: which optimizer, which parameters had a gradient, the hyper-parameters, and what the gradients look like.
        part: this member's slice of the gradients, one after the other.
    """

    meta: dict[str, Any]
    part: torch.Tensor


class Gradients(NamedTuple):
    """What the gradients of one step look like.

    Attributes:
        layout: of them.
        digest: of the layout.
        strides: those that are not laid out in memory as their parameters are, by name.
    """

    layout: Layout
    digest: str
    strides: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Cut:
    """The state between two steps, and who sends what of it.

    Attributes:
        layout, tensors: of the state; the tensors are the live ones.
        ranges: what this member is going to send.
        index, count: this member keeps slice ``index`` of ``count`` of every later gradient.
        invitation: what the newcomers are told.
    """

    layout: Layout
    tensors: Mapping[str, torch.Tensor]
    ranges: Sequence[Range]
    index: int
    count: int
    invitation: dict[str, Any]


class Snapshot:
    """A copy of some byte ranges of a state."""

    def __init__(self, ranges: Sequence[Range], layout: Layout, tensors: Mapping[str, torch.Tensor]) -> None:
        self._ranges = joined(ranges)
        self._memory = [torch.empty(stop - start, dtype=torch.uint8, device="cpu") for start, stop in self._ranges]
        for (start, stop), memory in zip(self._ranges, self._memory, strict=True):
            copy_pieces(layout.pieces(tensors, start, stop), memory)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Where bytes ``start`` to ``stop`` are in the copy; ValueError when they are not in it."""
        for (low, high), memory in zip(self._ranges, self._memory, strict=True):
            if low <= start and stop <= high:
                return [(memory.data_ptr() + start - low, stop - start)]
        raise ValueError(f"bytes {start} to {stop} are not in this member's copy")


def can_follow(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether steps of these optimizers can be repeated from their gradients and hyper-parameters alone."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            return False  # it evaluates the model inside its step
        try:
            hyper_parameters(optimizer)
        except CheckpointError:
            return False
    return bool(optimizers)  # without any, what changes the parameters is not known


def hyper_parameters(optimizer: torch.optim.Optimizer) -> str:
    """Those of all parameter groups, packed.

    Raises:
        CheckpointError: one is a tensor, or of a kind that cannot be packed.
    """
    groups = [{k: v for k, v in group.items() if k not in _NOT_HYPER} for group in optimizer.param_groups]
    packed = pack(groups, clone=False)
    if packed.tensors:
        raise CheckpointError(f"{next(iter(packed.tensors))} is a tensor")
    return packed.skeleton


def slice_of(total_bytes: int, index: int, count: int) -> Range:
    """Slice ``index`` of ``count`` equal ones."""
    return total_bytes * index // count, total_bytes * (index + 1) // count


def gradient_name(index: int) -> str:
    """The name of a gradient in the layout of all gradients of an optimizer; their order is that of their numbers."""
    return f"{index:08d}"


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimizer, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def copy_pieces(pieces: Sequence[Piece], memory: torch.Tensor) -> None:
    """Copy pieces of memory one after the other into ``memory`` (uint8). Other threads run meanwhile."""
    target = memory.data_ptr()
    for address, nbytes in pieces:
        ctypes.memmove(target, address, nbytes)
        target += nbytes


def unusual_strides(optimizer: torch.optim.Optimizer, gradients: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """The strides of the gradients that differ from those of memory made for them from their parameters alone."""
    parameters = {gradient_name(i): parameter for i, parameter in enumerate(parameters_of(optimizer))}
    return {
        name: list(gradient.stride())
        for name, gradient in gradients.items()
        if gradient.stride() != torch.empty_like(parameters[name], device="meta").stride()
    }


def gradients_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The gradients by name, and for each parameter whether it has one."""
    parameters = parameters_of(optimizer)
    gradients = {gradient_name(i): dense(p.grad) for i, p in enumerate(parameters) if p.grad is not None}
    return gradients, [int(p.grad is not None) for p in parameters]
