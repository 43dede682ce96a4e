"""The collective calls that a session offers: each survives the death of a member while it is under way."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic.operations import GatherRows, Operation, Reduce, Share, reducible
from chaos_mpi.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SHARE_CHUNK_BYTES = 32 << 20
#: What is not longer is gathered in one round.
_SHORT_BYTES = 1016


class CollectiveCalls(ABC):
    """Collective calls, to be made by every member in the same order, from the main thread."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This member's rank in the present view."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of members in the present view."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Number of the present view; one more after every committed change of membership."""

    @abstractmethod
    def execute(self, operation: Operation) -> None:
        """Run one collective operation to its end, whatever happens to other members."""

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce a tensor over all members, in place, and return it.

        One on a GPU goes through the memory of the host. Half precisions are summed in float32, small integers in
        int64; a sum of truth values is true if any is. A member that dies meanwhile is left out.

        Args:
            op: ``sum``, ``max`` or ``min``.

        Raises:
            ConfigError: unknown ``op``, or the tensor is not dense, or of a dtype that has no sum here (complex,
                quantised, 8-bit floating point, unsigned of more than 8 bits).
        """
        if op not in ("sum", "max", "min"):
            raise ConfigError(f"all_reduce knows sum, max and min, not {op!r}")
        refuse_unusable("all_reduce", tensor)
        if not reducible(tensor.dtype):
            raise ConfigError(f"all_reduce cannot reduce a tensor of {tensor.dtype}; convert it to a wider dtype first")
        operation = Reduce("all_reduce", tensor, op)
        self.execute(operation)
        with torch.no_grad():
            tensor.copy_(operation.results()[0])
        return tensor

    def gather(self, value: Any, label: str = "gather") -> list[Any]:
        """Every member's JSON-able ``value``, in rank order, of the members that took part.

        Args:
            value: it.
            label: what for, the same at every member.

        Raises:
            ConfigError: JSON does not know the value.
        """
        return self.gather_with_contributors(value, label)[0]

    def gather_with_contributors(self, value: Any, label: str = "gather") -> tuple[list[Any], tuple[str, ...]]:
        """The same, and whose values they are: the same at every member, whoever died meanwhile."""
        try:
            payload = json.dumps(value).encode()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"gather takes what JSON knows (numbers, text, lists, dicts): {error}") from None
        operation = GatherRows(label, payload, _SHORT_BYTES)
        self.execute(operation)
        if (longest := operation.longest) > _SHORT_BYTES:  # all see the same lengths
            operation = GatherRows(label, payload, longest)
            self.execute(operation)
        return operation.decoded(), operation.contributors

    def share(self, label: str, tensors: Sequence[torch.Tensor], root: str | None = None) -> None:
        """Give every member the bits that the member ``root`` (else rank 0) has in ``tensors``.

        Any dtype, in place.

        Raises:
            ConfigError: a tensor is not dense, or has no values.
            RecoveryError: ``root`` was named and died meanwhile.
        """
        for tensor in tensors:
            refuse_unusable(label, tensor)
        chunk: list[torch.Tensor] = []
        for index, tensor in enumerate(tensors, start=1):
            chunk.append(tensor)
            if sum(t.nbytes for t in chunk) >= _SHARE_CHUNK_BYTES or index == len(tensors):
                operation = Share(f"{label}[{sum(t.nbytes for t in chunk)} bytes]", chunk, root)
                self.execute(operation)
                operation.deliver()
                chunk = []

    def barrier(self) -> None:
        """Return once every member has called it."""
        self.all_reduce(torch.zeros(1, device="cpu"))

    def evaluate(self, n_items: int, fn: Callable[[range], torch.Tensor]) -> torch.Tensor:
        """Sum ``fn`` over a partition of ``range(n_items)`` among the members, every item exactly once.

        When a member dies meanwhile, the survivors share all items out again and repeat.

        Args:
            n_items: number of items to share out.
            fn: takes the item indices of this member (a ``range``, possibly empty) and returns a 1-D tensor.

        Returns:
            The sum, float64, on the CPU, shape as returned by ``fn``; the same bits at every member.

        Raises:
            ConfigError: ``fn`` returned something that has no sum here, as complex numbers.
        """
        while True:
            epoch, rank, size = self.epoch, self.rank, self.size
            counted = fn(range(rank, n_items, size)).detach()
            refuse_unusable("evaluate", counted)
            if counted.is_complex():
                raise ConfigError(
                    f"evaluate cannot sum a tensor of {counted.dtype}; return its real and imaginary parts"
                )
            part = counted.to("cpu", torch.float64).reshape(-1)
            # A member may learn of a death one call later than another. Only if all used the same view, and all of
            # that view are in the sum, was every item counted once. All see the same sums, so all decide alike.
            tags = torch.tensor([1.0, epoch, epoch**2, size], dtype=torch.float64, device="cpu")
            total = self.all_reduce(torch.cat([part, tags]))
            count, epochs, squares, sizes = total[-4:].tolist()
            if count * squares == epochs**2 and sizes == count**2:
                return total[:-4]


def refuse_unusable(what: str, tensor: torch.Tensor) -> None:
    """Raise ConfigError for a tensor that is not dense, or has no values."""
    if tensor.is_meta:
        raise ConfigError(f"{what} takes tensors that have values; this one, of {tensor.dtype}, is on meta")
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise ConfigError(
            f"{what} cannot take a tensor of {tensor.dtype} and layout {tensor.layout}; make it dense first"
        )
