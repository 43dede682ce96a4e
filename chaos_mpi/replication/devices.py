"""Tensors of a GPU in the memory of the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch


def await_devices(tensors: Iterable[torch.Tensor]) -> None:
    """Return when all that was begun on the GPUs of these tensors is done, on whichever stream.

    Another thread, or the same one outside of a ``with torch.cuda.stream``, copies on another stream than the one that
    training writes on.
    """
    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class OnHost(Mapping[str, torch.Tensor]):
    """Tensors by name, in the memory of the host. Those of a GPU are copied there when they are first asked for.

    Args:
        tensors: which must not change until then.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        await_devices(self._tensors.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        self._tensors[name] = self._tensors[name].to("cpu")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
