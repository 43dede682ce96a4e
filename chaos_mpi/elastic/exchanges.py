"""Collective operations in which members give and get different amounts: gather, all-to-all, broadcast, scatter.

Each has three parts. First the members compare what they call, so that a call that does not fit the others' is
refused before any data moves. Then the data moves. Last, where a member could have its data before all others have
entered, they confirm to each other that they have theirs. So whoever has finished knows that every survivor has its
own result, complete, and after a death nothing has to be handed to those that had not finished.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch

from chaos_mpi.elastic.comparison import Comparison, refuse_mismatch, refuse_moved
from chaos_mpi.elastic.operations import Operation, pack_bytes, reducible, transport_dtype, unpack_bytes
from chaos_mpi.errors import ConfigError, EngineError, MismatchError
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import Pending

_OPS = ("sum", "product", "max", "min", "band", "bor", "bxor")


class Exchange(Operation):
    """A collective call whose members compare it first.

    Args:
        call: what is called, with all that has to be the same at every member.
        sizes: numbers of this member that the others need, as many at each.

    Attributes:
        sizes: after the comparison, those of each member, in rank order; shape (size, number of numbers).
    """

    checks_label = False  # its own comparison does that, and before data moves
    #: Whether a member that has its data could be further than others by more than this call.
    confirms = True
    #: Whether it makes no sense in another view than the one that it was called in.
    bound_to_view = False
    #: The number of ranks that it is for, if it is for just so many.
    for_size: int | None = None

    def __init__(self, call: str, sizes: Sequence[int] = ()) -> None:
        # Members in calls that do not fit are at one place of the common sequence all the same.
        super().__init__("collective call")
        self.call = call
        self.sizes = np.zeros((0, len(sizes)), dtype=np.int64)
        self._my_sizes = np.array(sizes, dtype=np.int64)
        self._comparison = Comparison(call, sizes[0] if sizes else 0)  # one size has room in it
        self._view: View | None = None
        self._has_data = self._differs = False

    @property
    def phase(self) -> str:
        return self.call

    @abstractmethod
    def move(self, pending: Pending, view: View, rank: int) -> None:
        """Start to move the data, into new memory, with :attr:`sizes` known."""

    def start(self, pending: Pending, view: View, rank: int) -> None:
        moved = self.bound_to_view and self._view is not None and self._view.members != view.members
        self._view, self._has_data, self._differs = view, False, False
        self._comparison.start(pending, moved=moved or self.for_size not in (None, view.size))

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        """Wait until this member has its result, and knows that all others have theirs.

        Raises:
            MismatchError: the members' calls differ; the same at every member.
            ViewChangedError: it was called for other members than there are now; the same at every member.
            PeerFailedError, WaitTimeoutError: as :meth:`chaos_mpi.mpi.world.Pending.wait`.
        """
        super().wait(what, limit_s)
        world, view = self._world, self._view
        if world is None or view is None:
            raise EngineError(f"'{self.call}' was awaited before it was launched")
        if self._comparison.anyone_moved:
            self._differs = True
            message = (
                f"'{self.call}' was called before a member died, and cannot be done without it: call it anew, for the "
                f"{world.size} ranks that are left"
            )
            refuse_moved(world, message, what, limit_s)
        if self._comparison.differs:
            self._differs = True
            refuse_mismatch(world, self.call, what, limit_s)
        self._pending = pending = world.pending()
        self.sizes = self._comparison.numbers
        if len(self._my_sizes) > 1:
            self.sizes = np.zeros((world.size, len(self._my_sizes)), dtype=np.int64)
            pending.gather(self._my_sizes.view(np.uint8), self.sizes.view(np.uint8))
            pending.wait(what, limit_s)
        self.move(pending, view, world.rank)
        pending.wait(what, limit_s)
        self._has_data = True
        if self.confirms:
            confirmed = torch.zeros(1, dtype=torch.uint8, device="cpu")
            pending.reduce(confirmed, "max")
            pending.wait(what, limit_s)
        self._pending = None

    def results(self) -> list[torch.Tensor]:
        return []

    def renew_buffers(self) -> None:
        """Nothing is kept from one try to the next: :meth:`move` takes new memory."""

    def finish(self) -> None:
        """To be called when the operation is finished, before its result is used.

        Raises:
            MismatchError: a member has found that the calls differ, and then another one died.
        """
        if self._differs or not (self._has_data or not self.confirms):
            raise MismatchError(f"ranks make different collective calls; this rank: {self.call}")


class AllReduce(Exchange):
    """Sum, or another reduction, of tensors over the members: one for each of theirs.

    Args:
        call: what is called; dtypes, shapes and ``op`` are added to it.
        tensors: dense, on the CPU; they are not changed, and must not be until the operation is finished.
        op: ``sum``, ``product``, ``max``, ``min``, ``band``, ``bor`` or ``bxor``.

    Raises:
        ConfigError: the dtype has no such reduction.
    """

    confirms = False  # nobody has a sum before all have given their part

    def __init__(self, call: str, tensors: Sequence[torch.Tensor], op: str = "sum") -> None:
        super().__init__(f"{call}[{op}, {described(tensors)}]")
        self._op = op
        self._inputs = [t.detach() for t in tensors]
        self._wide = [reduced_as(call, t.dtype, op) for t in tensors]
        self._buffers = self._new_buffers()

    def move(self, pending: Pending, view: View, rank: int) -> None:
        for buffer, given in zip(self._buffers, self._inputs, strict=True):
            buffer.copy_(given)
            pending.reduce(buffer, self._op)

    def results(self) -> list[torch.Tensor]:
        """The reduced tensors, of the inputs' shapes, in the dtypes that they are reduced in."""
        return [] if self._differs else self._buffers

    def renew_buffers(self) -> None:
        self._buffers = self._new_buffers()

    def _new_buffers(self) -> list[torch.Tensor]:
        pairs = zip(self._inputs, self._wide, strict=True)
        return [torch.empty(t.shape, dtype=wide, device="cpu") for t, wide in pairs]


class AllGather(Exchange):
    """The tensors of all members one after the other, along the first dimension, which may differ between members.

    Args:
        call: what is called; dtype and the further dimensions are added to it.
        tensor: dense, on the CPU.
    """

    def __init__(self, call: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
        super().__init__(f"{call}[{_name(tensor.dtype)}, (*, {tuple(tensor.shape[1:])})]", [tensor.shape[0]])
        self._input = tensor.contiguous()
        self.result = torch.empty(0, device="cpu")

    @property
    def lengths(self) -> list[int]:
        """The first dimension of each member's tensor, in rank order."""
        return [int(n) for n in self.sizes[:, 0]]

    def move(self, pending: Pending, view: View, rank: int) -> None:
        rest = self._input.shape[1:]
        self.result = torch.empty((sum(self.lengths), *rest), dtype=self._input.dtype, device="cpu")
        pending.gather_parts(self._input, self.result, [n * rest.numel() for n in self.lengths])


class AllToAll(Exchange):
    """Each member's tensor is split along the first dimension, and every member gets its part of all of them.

    Args:
        call: what is called; dtype and the further dimensions are added to it.
        tensor: dense, on the CPU.
        splits: rows for each rank; None for equal parts.

    Raises:
        ConfigError: the splits do not fit the tensor, or the number of members.
    """

    bound_to_view = True

    def __init__(self, call: str, tensor: torch.Tensor, splits: Sequence[int] | None, size: int) -> None:
        splits = _equal_parts(call, tensor.shape[0], size) if splits is None else [int(n) for n in splits]
        if len(splits) != size or sum(splits) != tensor.shape[0] or min(splits) < 0:
            raise ConfigError(
                f"{call}: splits {splits} do not share {tensor.shape[0]} rows out to {size} ranks; they must be {size} "
                f"numbers with the sum {tensor.shape[0]}"
            )
        super().__init__(f"{call}[{_name(tensor.dtype)}, (*, {tuple(tensor.shape[1:])}), {size} parts]", splits)
        self._input = tensor.detach().contiguous()
        self._splits, self.for_size = splits, size
        self.result = torch.empty(0, device="cpu")
        self.received: list[int] = []

    def move(self, pending: Pending, view: View, rank: int) -> None:
        rest = self._input.shape[1:]
        self.received = [int(n) for n in self.sizes[:, rank]]
        self.result = torch.empty((sum(self.received), *rest), dtype=self._input.dtype, device="cpu")
        each = rest.numel()
        sent = [n * each for n in self._splits]
        pending.exchange_parts(self._input, sent, self.result, [n * each for n in self.received])


class Broadcast(Exchange):
    """The bits of tensors as one rank has them, given to every member.

    Args:
        call: what is called; dtypes and shapes are added to it.
        tensors: dense, on the CPU; :meth:`deliver` overwrites them.
        root: rank that has the values. If it is 0, that may become another member when one dies meanwhile.
    """

    def __init__(self, call: str, tensors: Sequence[torch.Tensor], root: int) -> None:
        super().__init__(f"{call}[from rank {root}, {described(tensors)}]")
        self.bound_to_view = root != 0
        self._tensors, self._root = [t.detach() for t in tensors], root
        self._flat = torch.empty(0, dtype=torch.uint8, device="cpu")

    def move(self, pending: Pending, view: View, rank: int) -> None:
        self._flat = torch.empty(sum(t.nbytes for t in self._tensors), dtype=torch.uint8, device="cpu")
        if rank == self._root:
            pack_bytes(self._tensors, self._flat)
        pending.broadcast(self._flat, self._root)

    def deliver(self) -> None:
        """Write the root's bits into the tensors."""
        unpack_bytes(self._flat, self._tensors)


class ReduceScatter(Exchange):
    """A tensor is reduced over the members, and each gets its own part of the rows of the result.

    Args:
        call: what is called; dtype, shape, rows and ``op`` are added to it.
        tensor: dense, on the CPU.
        rows: how many rows of the result each rank gets.
        op: as for :class:`AllReduce`.

    Raises:
        ConfigError: the dtype has no such reduction, or ``rows`` does not fit the tensor.
    """

    bound_to_view = True

    def __init__(self, call: str, tensor: torch.Tensor, rows: Sequence[int], op: str = "sum") -> None:
        if sum(rows) != tensor.shape[0]:
            raise ConfigError(f"{call}: rows {list(rows)} do not share out the {tensor.shape[0]} rows of the tensor")
        super().__init__(f"{call}[{op}, {described([tensor])}, rows {list(rows)}]")
        self._input = tensor.detach()
        self._wide = reduced_as(call, tensor.dtype, op)
        self._rows_of, self._op, self.for_size = list(rows), op, len(rows)
        self._whole = self.result = torch.empty(0, device="cpu")

    def move(self, pending: Pending, view: View, rank: int) -> None:
        rest = self._input.shape[1:]
        self._whole = self._input.to(self._wide).contiguous()
        self.result = torch.empty((self._rows_of[rank], *rest), dtype=self._wide, device="cpu")
        pending.reduce_parts(self._whole, self.result, [n * rest.numel() for n in self._rows_of], self._op)


class Barrier(Exchange):
    """Ends when every member has called it."""

    confirms = False  # the comparison is what is waited for

    def __init__(self, call: str = "barrier") -> None:
        super().__init__(call)

    def move(self, pending: Pending, view: View, rank: int) -> None:
        pass


def described(tensors: Sequence[torch.Tensor]) -> str:
    """Dtypes and shapes, in words; of many tensors a digest of them."""
    words = ", ".join(f"{_name(t.dtype)} {tuple(t.shape)}" for t in tensors)
    if len(words) <= 120:
        return words
    digest = hashlib.blake2b(words.encode(), digest_size=4).hexdigest()
    return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors)} elements, {digest}"


def equal_rows(n_rows: int, size: int) -> list[int]:
    """Rows for each of ``size`` ranks: as equal as can be, the first ones get one more."""
    return [n_rows // size + (rank < n_rows % size) for rank in range(size)]


def _equal_parts(call: str, n_rows: int, size: int) -> list[int]:
    if n_rows % size:
        raise ConfigError(f"{call}: {n_rows} rows cannot be shared out equally to {size} ranks; give splits")
    return [n_rows // size] * size


def reduced_as(call: str, dtype: torch.dtype, op: str) -> torch.dtype:
    """The dtype in which a tensor is reduced; ConfigError if it cannot be."""
    if op not in _OPS:
        raise ConfigError(f"{call} knows the reductions {', '.join(_OPS)}, not {op!r}")
    if not reducible(dtype) or (op in ("band", "bor", "bxor") and dtype.is_floating_point):
        raise ConfigError(f"{call} has no {op} of tensors of {dtype}; convert them first")
    return transport_dtype(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
