"""What torch's calls pass to a process group: checked, and translated into what the session understands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ReduceOp

from chaos_mpi.elastic.collectives import refuse_unusable
from chaos_mpi.elastic.exchanges import Exchange
from chaos_mpi.errors import ConfigError
from chaos_mpi.mpi.point_to_point import MAX_TAG

_OPS = {
    ReduceOp.SUM: "sum",
    ReduceOp.AVG: "sum",
    ReduceOp.PRODUCT: "product",
    ReduceOp.MIN: "min",
    ReduceOp.MAX: "max",
    ReduceOp.BAND: "band",
    ReduceOp.BOR: "bor",
    ReduceOp.BXOR: "bxor",
}


def reduction(call: str, opts: Any) -> tuple[str, bool]:
    """The name of a reduction, and whether its result is then divided by the number of contributors."""
    op = getattr(opts, "reduceOp", opts) if opts is not None else ReduceOp.SUM
    for known, name in _OPS.items():
        if op == known:
            return name, bool(known == ReduceOp.AVG)
    raise ConfigError(f"{call} knows the reductions SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR and BXOR, not {op}")


def averaged(result: torch.Tensor, operation: Exchange, average: bool) -> torch.Tensor:
    """A reduction's result, divided by the number of contributors if it is an average."""
    if not average:
        return result
    mode = None if result.is_floating_point() else "trunc"
    return torch.div(result, len(operation.contributors), rounding_mode=mode)


def usable(call: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, which must be dense and on the CPU."""
    for tensor in tensors:
        refuse_unusable(call, tensor)
        if tensor.device.type != "cpu":
            raise ConfigError(f"{call} takes CPU tensors; this one, of {tensor.dtype}, is on {tensor.device}")
    return list(tensors)


def fill(call: str, output: torch.Tensor, flat: torch.Tensor) -> None:
    """Write ``flat`` into an output of as many elements."""
    if output.numel() != flat.numel():
        raise ConfigError(f"{call} got {flat.numel()} elements for an output of shape {tuple(output.shape)}")
    output.detach().copy_(flat.view(output.shape))


def checked_tag(tag: int) -> int:
    """A tag that messages can have."""
    if not 0 <= tag < MAX_TAG:
        raise ConfigError(f"the tag of a message is {tag}; it must be at least 0 and less than {MAX_TAG}")
    return tag
