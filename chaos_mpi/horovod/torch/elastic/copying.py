"""Copies of a state that is saved again and again."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def copied(state: T, before: Any) -> T:
    """A deep copy of ``state``, in the memory of an earlier one where that has tensors of the same kind.

    Fresh memory takes longer to get than to fill, as the kernel clears each page of it first, and would be needed
    beside that of the copy before.

    Args:
        state: what :func:`copy.deepcopy` can copy.
        before: an earlier copy, which is of no use from now on; None if there is none.
    """
    free: dict[_Kind, deque[torch.Tensor]] = {}
    for alike in _by_memory(before):
        free.setdefault(_kind(alike[0]), deque()).append(alike[0])
    memo: dict[int, Any] = {}
    reused: list[tuple[torch.Tensor, torch.Tensor]] = []
    for alike in _by_memory(state):
        if buffers := free.get(_kind(alike[0])):
            reused.append((buffers.popleft(), alike[0]))
            memo |= {id(tensor): reused[-1][0] for tensor in alike}
    made = copy.deepcopy(state, memo)
    for buffer, tensor in reused:  # last: where something cannot be copied, the copy before is still whole
        buffer.copy_(tensor)
    return made


_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...], torch.device]


def _kind(tensor: torch.Tensor) -> _Kind:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _by_memory(state: Any) -> Iterator[list[torch.Tensor]]:
    """The plain tensors that are all of their memory; those in the same memory, tied parameters for one, together."""
    by_memory: dict[int, list[torch.Tensor]] = {}
    for tensor in _tensors(state):
        if (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.layout is torch.strided
            and tensor.device.type != "meta"
        ):
            by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for tensors in by_memory.values():
        if len({_kind(tensor) for tensor in tensors}) == 1 and all(map(_is_whole, tensors)):
            yield tensors


def _is_whole(tensor: torch.Tensor) -> bool:
    special = (
        type(tensor) is not torch.Tensor
        or tensor.requires_grad
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
    )
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes > 0
    return whole and not special and not tensor.is_inference()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those in dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)
