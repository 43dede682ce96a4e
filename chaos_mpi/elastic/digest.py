"""Digests over tensors: equal exactly when names, dtypes, shapes and every bit of the values are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import xxhash

from chaos_mpi.replication.devices import await_devices


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor in row-major order, where it is; a view of its memory if that is possible."""
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view of its memory where that is possible, not a copy.

    Works for every dense dtype, also those that numpy does not know. Do not write into it.
    """
    if tensor.numel() == 0:
        return memoryview(b"")
    flat: Any = byte_view(tensor.detach().cpu()).numpy()
    return memoryview(flat)


class Hash(Protocol):
    """An algorithm of :mod:`hashlib`, or one like those."""

    def update(self, data: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def params_digest(
    named_tensors: Iterable[tuple[str, torch.Tensor]], algorithm: Callable[[], Hash] = xxhash.xxh3_128
) -> str:
    """Hexadecimal digits over names, dtypes, shapes and values, in the given order.

    The comparison is bitwise: 0.0 and -0.0 differ, and a NaN equals a NaN with the same bits. XXH3 tells apart what has
    come to differ by accident, about as fast as memory is read; it is no proof against who looks for a collision.

    Args:
        named_tensors: pairs of names and tensors.
        algorithm: another one; XXH3 with 128 bits gives 32 digits.
    """
    digest = algorithm()
    named_tensors = list(named_tensors)
    await_devices(tensor for _, tensor in named_tensors)
    for name, tensor in named_tensors:
        # repr() quotes the name, so that no name can imitate the end of a heading.
        digest.update(f"{name!r} {tensor.dtype} {list(tensor.shape)}\n".encode(errors="backslashreplace"))
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
