"""What torch keeps of a process group, and asks of it: names, devices, and the ranks of the default group.

Torch's own groups have their backends in C++, one for each kind of device, and as many ranks as they were made with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _world


class PresentRanks(Mapping[int, int]):
    """The ranks of the default group, as torch has them of every group: by global rank the rank in the group.

    Args:
        size: how many there are at the time.
    """

    def __init__(self, size: Callable[[], int]) -> None:
        self._size = size

    def __getitem__(self, rank: int) -> int:
        if rank not in range(self._size()):
            raise KeyError(rank)
        return rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._size()))

    def __len__(self) -> int:
        return self._size()


class RegisteredGroup(ProcessGroup):
    """A process group that is its own backend, for CPU tensors."""

    #: What backends in C++ can do, and this one cannot.
    supports_splitting = supports_coalescing = supports_shrinking = supports_time_estimate = False

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # torch's stub is incomplete
        self._name = self._text = ""
        self._is_noted = False

    @abstractmethod
    def size(self) -> int:
        """Number of ranks."""

    def note_ranks(self) -> None:
        """Have torch find the present ranks where it has noted those that the default group was made with."""
        if self._is_noted or self not in _world.pg_group_ranks:
            return
        self._is_noted = True
        if self is dist.group.WORLD:
            known: Any = _world.pg_group_ranks
            known[self] = PresentRanks(self.size)

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """For callers in C++."""
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        """For callers in C++."""
        return self._name

    def setGroupDesc(self, text: str) -> None:  # noqa: N802
        """For callers in C++."""
        self._text = text

    def getGroupDesc(self) -> str:  # noqa: N802
        """For callers in C++."""
        return self._text

    def getBackendName(self) -> str:  # noqa: N802
        """For callers in C++."""
        return "chaos"

    def _get_backend_name(self) -> str:
        return "chaos"

    def name(self) -> str:
        """The backend's name."""
        return "chaos"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> RegisteredGroup:  # type: ignore[override]  # there is none in C++
        if torch.device(device).type != "cpu":
            raise RuntimeError(f"the backend chaos takes CPU tensors, and has nothing for {device}")
        return self

    def supports_tensor_alloc(self, _: torch.device) -> bool:
        """Whether it has memory of its own for tensors."""
        return False
