"""How values are combined, and scaled before and after."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch

from chaos_mpi.elastic.operations import reducible

_HALVES = (torch.float16, torch.bfloat16)


class ReduceOp(enum.IntEnum):
    """How values are combined."""

    AVERAGE = 0
    SUM = 1
    ADASUM = 2
    MIN = 3
    MAX = 4
    PRODUCT = 5


Average, Sum, Adasum, Min, Max, Product = ReduceOp


def chosen_op(op: int | None, average: bool | None) -> ReduceOp:
    """The reduction, given the argument of today and the one of old.

    Raises:
        ValueError: both are given.
    """
    if op is not None and average is not None:
        raise ValueError("give op, and not average, which it has replaced")
    if op is not None:
        return ReduceOp(op)
    return Average if average is None or average else Sum


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The tensor times a number, in its own dtype; computed in 64 bits for integers, and in 32 for half precisions."""
    if factor == 1.0:
        return tensor
    wide = tensor.dtype if tensor.dtype.is_floating_point else torch.float64
    wide = torch.float32 if tensor.dtype in _HALVES else wide
    return (tensor.to(wide) * torch.tensor(factor, dtype=wide, device="cpu")).to(tensor.dtype)


def averaged(total: torch.Tensor, count: int) -> torch.Tensor:
    """A sum divided by the number of its parts; integers are rounded towards zero."""
    if total.dtype.is_floating_point or total.dtype.is_complex:
        return total / count
    return torch.div(total, count, rounding_mode="trunc")


def checked(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in the memory of the host.

    Raises:
        ValueError: one is of a dtype that cannot be reduced, or not dense, or there is none.
    """
    if not tensors:
        raise ValueError("a grouped call needs at least one tensor")
    for tensor in tensors:
        if tensor.layout != torch.strided or not reducible(tensor.dtype):
            raise ValueError(f"a tensor of {tensor.dtype}, {tensor.layout}, cannot be reduced")
    return [tensor.detach().cpu().resolve_conj().resolve_neg() for tensor in tensors]
