"""Adasum: sums of gradients that adapt to how much the gradients agree (Maleki et al., MLSys 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chaos_mpi.elastic.exchanges import Exchange, described
from chaos_mpi.elastic.operations import pack_bytes, unpack_bytes
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import Pending


class Adaptive(Exchange):
    """Adasum of tensors over all ranks.

    Every rank gets all tensors, and adds them up pair by pair, in 64 bits; so all have the same bits. It needs memory
    for the tensors of all ranks.

    Args:
        call: what is called.
        tensors: dense, of floating point dtypes. All is computed on the CPU, where the same kernels give the same bits.
        is_step: whether it ends a training step.
        proposes: whether this member has something to propose to the others at the end of the step.
    """

    model = 0  # what is added up are steps that the optimizers have made

    def __init__(
        self, call: str, tensors: Sequence[torch.Tensor], *, is_step: bool = False, proposes: bool = False
    ) -> None:
        super().__init__(f"{call}[adasum, {described(tensors)}]")
        self.is_gradient_step = is_step
        self._inputs = [t.detach().cpu() for t in tensors]
        # A word in front of each rank's tensors: whether it proposes something.
        self._proposes = torch.tensor([int(proposes)], device="cpu")
        self._bytes = self._proposes.nbytes + sum(t.nbytes for t in self._inputs)
        self._all = torch.empty(0, dtype=torch.uint8, device="cpu")

    def move(self, pending: Pending, view: View, rank: int) -> None:
        mine = torch.empty(self._bytes, dtype=torch.uint8, device="cpu")
        pack_bytes([self._proposes, *self._inputs], mine)
        self._all = torch.empty(view.size * self._bytes, dtype=torch.uint8, device="cpu")
        pending.gather_parts(mine, self._all, [self._bytes] * view.size)

    def anyone_proposes(self) -> bool:
        return bool(self._all.view(-1, self._bytes)[:, : self._proposes.nbytes].any())

    def results(self) -> list[torch.Tensor]:
        """The adaptive sums; empty while there are none, so that there is nothing to hand to other members."""
        return []

    def sums(self) -> list[torch.Tensor]:
        """The adaptive sums, in the dtypes of the tensors."""
        ranks = []
        for row in self._all.view(-1, self._bytes)[:, self._proposes.nbytes :]:
            tensors = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in self._inputs]
            unpack_bytes(row, tensors)
            ranks.append([t.to(torch.float64) for t in tensors])
        if not ranks:
            return [t.clone() for t in self._inputs]
        columns = zip(*ranks, strict=True)
        return [adasum(list(c)).to(t.dtype) for c, t in zip(columns, self._inputs, strict=True)]


def adasum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adaptive sum of float64 tensors: pairs, then pairs of these, and so on; one that is left over waits."""
    while len(values) > 1:
        pairs = [_pair(*values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
        values = [*pairs, values[-1]] if len(values) % 2 else pairs
    return values[0]


def _pair(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Parallel ones are averaged, orthogonal ones added."""
    dot, of_a, of_b = torch.sum(a * b), torch.sum(a * a), torch.sum(b * b)
    share_a = 1.0 - float(dot / (2 * of_a)) if of_a > 0 else 1.0
    share_b = 1.0 - float(dot / (2 * of_b)) if of_b > 0 else 1.0
    return share_a * a + share_b * b
