"""Collective operations in which it matters which rank a member has: those with a root, and those with a part for each.

A rank is that of the view in which a member made its call. When a member has died since, the parts for it, and from it,
fall away. Members may have made the same call before and after they learned of a death; what counts for each is the
view that it knew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chaos_mpi.elastic.exchanges import Exchange, described, reduced_as
from chaos_mpi.elastic.operations import pack_bytes, unpack_bytes
from chaos_mpi.errors import ConfigError, ViewChangedError
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import Pending


class RankedExchange(Exchange):
    """A collective call of which ``called`` is the view in which it was made.

    Attributes:
        present: the ranks in ``called`` of the members that are left, in their present order.
    """

    def __init__(self, call: str, called: View, sizes: Sequence[int] = ()) -> None:
        super().__init__(call, sizes)
        self.called = called
        self.present = list(range(called.size))

    def start(self, pending: Pending, view: View, rank: int) -> None:
        # Members join between two calls only, so all that are here were in the view of the call.
        self.present = [self.called.members.index(member) for member in view.members]
        self.prepare(view)
        super().start(pending, view, rank)

    def prepare(self, view: View) -> None:
        """Set what is compared, with :attr:`present` known."""

    def compare(self, call: str, sizes: Sequence[int]) -> None:
        """Have this compared in the present try."""
        self.call = call
        self._comparison.say(call, sizes[0])
        self._my_sizes = np.array(sizes, dtype=np.int64)


class RootedExchange(RankedExchange):
    """A collective call with a root: the member that had the rank ``root`` when the call was made.

    When that one has died, rank 0 has a successor, which is the new rank 0, and other roots have none.

    Raises:
        ConfigError: there is no such rank.
    """

    #: Whether the new rank 0 can do in the place of one that has died.
    has_successor = True

    def __init__(self, call: str, called: View, root: int) -> None:
        if not 0 <= root < called.size:
            raise ConfigError(f"{call}: there is no rank {root} among {called.size}")
        super().__init__(call, called, [root])
        self._root = root

    def prepare(self, view: View) -> None:
        root = self.called.members[self._root]
        self._comparison.say(self.call, view.members.index(root) if root in view.members else -1)

    def root(self) -> int:
        """The root's present rank, the same at every member.

        Raises:
            ViewChangedError: it has died.
        """
        named = {int(rank) for rank in self.sizes[:, 0]}
        if self._root == 0 and self.has_successor:
            named = named - {-1} or {0}
        if len(named) > 1 or -1 in named:
            raise ViewChangedError(
                f"the root of '{self.call}' died while the call was made; only rank 0 has a successor, and not for "
                "what it alone has (scatter). Catch this at all ranks, and choose another root"
            )
        return named.pop()


class BroadcastFrom(RootedExchange):
    """The bits of tensors as the root has them, given to every member.

    Args:
        call: what is called; dtypes and shapes are added to it.
        tensors: dense, on the CPU; :meth:`deliver` overwrites them.
    """

    def __init__(self, call: str, called: View, tensors: Sequence[torch.Tensor], root: int) -> None:
        super().__init__(f"{call}[from rank {root}, {described(tensors)}]", called, root)
        self._tensors = [t.detach() for t in tensors]
        self._flat = torch.empty(0, dtype=torch.uint8, device="cpu")

    def move(self, pending: Pending, view: View, rank: int) -> None:
        root = self.root()
        self._flat = torch.empty(sum(t.nbytes for t in self._tensors), dtype=torch.uint8, device="cpu")
        if rank == root:
            pack_bytes(self._tensors, self._flat)
        pending.broadcast(self._flat, root)

    def deliver(self) -> None:
        """Write the root's bits into the tensors."""
        unpack_bytes(self._flat, self._tensors)


class ReduceTo(RootedExchange):
    """Tensors are reduced over the members; only the root has the results.

    Attributes:
        reduced: the results, in the dtypes that they are reduced in; empty at the others.
    """

    def __init__(self, call: str, called: View, tensors: Sequence[torch.Tensor], op: str, root: int) -> None:
        super().__init__(f"{call}[{op}, to rank {root}, {described(tensors)}]", called, root)
        self._inputs, self._op = [t.detach() for t in tensors], op
        self._wide = [reduced_as(call, t.dtype, op) for t in tensors]
        self.reduced: list[torch.Tensor] = []

    def move(self, pending: Pending, view: View, rank: int) -> None:
        root = self.root()
        buffers = [t.to(wide, copy=True).contiguous() for t, wide in zip(self._inputs, self._wide, strict=True)]
        for buffer in buffers:
            pending.reduce_to(buffer, root, self._op)
        self.reduced = buffers if rank == root else []


class GatherTo(RootedExchange):
    """Equally large tensors of all members; only the root has them.

    The successor of rank 0 has given no room for them, so they are lost with rank 0. That is no error: one rank alone
    would have had them, and the others are to train on.

    Attributes:
        parts: at the root, the flat tensor of each rank in the view of its call that is left; else empty.
    """

    def __init__(self, call: str, called: View, tensor: torch.Tensor, root: int) -> None:
        super().__init__(f"{call}[to rank {root}, {described([tensor])}]", called, root)
        self._input = tensor.detach().contiguous().view(-1)
        self.parts: dict[int, torch.Tensor] = {}

    def move(self, pending: Pending, view: View, rank: int) -> None:
        root, each = self.root(), self._input.numel()
        everyones = torch.empty((view.size if rank == root else 0, each), dtype=self._input.dtype, device="cpu")
        pending.gather_to(self._input, everyones, [each] * view.size, root)
        self.parts = dict(zip(self.present, everyones, strict=True)) if rank == root else {}


class ScatterFrom(RootedExchange):
    """The root has a tensor for each rank, all equally large, and every member gets its own.

    Args:
        like: a tensor of the shape and dtype of one part.
        parts: at the root, one for each rank of its view; else empty.
    """

    has_successor = False  # it would have no parts

    def __init__(self, call: str, called: View, like: torch.Tensor, parts: Sequence[torch.Tensor], root: int) -> None:
        super().__init__(f"{call}[from rank {root}, {described([like])}]", called, root)
        self._parts = [t.detach() for t in parts]
        self.result = torch.empty(like.shape, dtype=like.dtype, device="cpu")

    def move(self, pending: Pending, view: View, rank: int) -> None:
        root, each = self.root(), self.result.numel()
        self.result = torch.empty_like(self.result)
        mine = rank == root
        whole = [self._parts[i].reshape(-1) for i in self.present] if mine else []
        everyones = torch.cat(whole) if whole else torch.empty(0, dtype=self.result.dtype, device="cpu")
        pending.scatter_from(everyones, self.result, [each] * view.size, root)


class ReduceScatterParts(RankedExchange):
    """A tensor for each rank is reduced over the members, and each gets its own.

    Args:
        call: what is called; ``op``, dtypes and shapes are added to it.
        parts: one for each rank, of one dtype.

    Attributes:
        result: flat, in the dtype that it is reduced in.
    """

    def __init__(self, call: str, called: View, parts: Sequence[torch.Tensor], op: str) -> None:
        super().__init__(call, called)
        _refuse_other_number(call, parts, called)
        self._parts, self._op, self._name = [t.detach() for t in parts], op, call
        self._wide = reduced_as(call, parts[0].dtype, op)
        self.result = torch.empty(0, device="cpu")

    def prepare(self, view: View) -> None:
        self.compare(f"{self._name}[{self._op}, {described([self._parts[i] for i in self.present])}]", [0])

    def move(self, pending: Pending, view: View, rank: int) -> None:
        chosen = [self._parts[i].reshape(-1) for i in self.present]
        whole = torch.cat(chosen).to(self._wide)
        self.result = torch.empty(chosen[rank].numel(), dtype=self._wide, device="cpu")
        pending.reduce_parts(whole, self.result, [t.numel() for t in chosen], self._op)


class AllToAllParts(RankedExchange):
    """Every member has a tensor for each rank, of any size, and gets those of all members that are for itself.

    Attributes:
        parts: the flat tensor from each rank in the view of the call that is left.
    """

    def __init__(self, call: str, called: View, parts: Sequence[torch.Tensor]) -> None:
        super().__init__(call, called)
        _refuse_other_number(call, parts, called)
        self._inputs = [t.detach() for t in parts]
        self._name = f"{call}[{str(parts[0].dtype).removeprefix('torch.')}"
        self.parts: dict[int, torch.Tensor] = {}

    def prepare(self, view: View) -> None:
        counts = [self._inputs[i].numel() for i in self.present]
        self.compare(f"{self._name}, {len(counts)} parts]", counts)

    def move(self, pending: Pending, view: View, rank: int) -> None:
        chosen = [self._inputs[i].reshape(-1) for i in self.present]
        received = [int(n) for n in self.sizes[:, rank]]
        theirs = torch.empty(sum(received), dtype=chosen[0].dtype, device="cpu")
        pending.exchange_parts(torch.cat(chosen), [t.numel() for t in chosen], theirs, received)
        self.parts = dict(zip(self.present, torch.split(theirs, received), strict=True))


def _refuse_other_number(call: str, parts: Sequence[torch.Tensor], called: View) -> None:
    if len(parts) != called.size:
        raise ConfigError(
            f"{call} takes a tensor for each of the {called.size} ranks that there are now, not {len(parts)}"
        )
    if len({t.dtype for t in parts}) > 1:
        raise ConfigError(f"{call} takes tensors of one dtype")
