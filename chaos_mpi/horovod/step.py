"""One gradient step with Horovod, as an operation of the session's common sequence.

Horovod reduces the gradients; a small sum of the session's own confirms it. Whoever has that sum knows that all members
have entered it, and all enter it with their gradients reduced: so either all members have this step's gradients, or
nobody has finished the step, and all begin it again with the local gradients that they have kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chaos_mpi.elastic.operations import Operation, pack_bytes, unpack_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos_mpi.horovod.optimizer import KeptGradients
    from chaos_mpi.membership import View
    from chaos_mpi.mpi.world import Pending, World


class HorovodStep(Operation):
    """The gradients of one step, from the end of backward on.

    Args:
        gradients: of this member.
        buffers: module buffers to be made equal to those of rank 0 (empty for none).
        contributes: whether this member's gradients count (they are zero when its samples are spent).
        proposes: asked whether this member has something to propose to the others.
        break_off: ends Horovod's work on a broken communicator.
    """

    is_gradient_step = True

    def __init__(
        self,
        gradients: KeptGradients,
        buffers: list[torch.Tensor],
        contributes: bool,
        proposes: Callable[[], bool],
        break_off: Callable[[World], None],
    ) -> None:
        super().__init__("gradient step")
        self._gradients, self._buffers = gradients, buffers
        self.contributes = contributes
        self._proposes, self._break_off = proposes, break_off
        #: How many members contribute, and how many have something to propose.
        self._control = torch.zeros(2, dtype=torch.float64, device="cpu")
        self._shared = torch.empty(sum(b.nbytes for b in buffers), dtype=torch.uint8, device="cpu")
        self._rank = self._size = 0

    def start(self, pending: Pending, view: View, rank: int) -> None:
        self._rank, self._size = rank, view.size
        self._gradients.submit()

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        super().wait(what, limit_s)  # until all are in this call
        assert self._world is not None
        self._gradients.finish(self._world, what, limit_s)
        self._pending = self._world.pending()
        self._confirm(self._pending)
        self._pending.wait(what, limit_s)
        self._pending = None

    def results(self) -> list[torch.Tensor]:
        return [self._control, self._shared]

    def renew_buffers(self) -> None:
        self._control, self._shared = torch.zeros_like(self._control), torch.empty_like(self._shared)

    def withdraw(self) -> None:
        assert self._world is not None
        super().withdraw()
        self._break_off(self._world)

    def anyone_proposes(self) -> bool:
        return bool(self._control[1] > 0)

    def deliver(self, *, averaged: bool) -> None:
        """Count only those that contributed, and put rank 0's values into the module buffers.

        Args:
            averaged: Horovod has divided by the number of members.
        """
        count = max(self._control[0].item(), 1.0)
        if averaged and count != self._size:
            self._gradients.scale(self._size / count)
        if self._buffers:
            unpack_bytes(self._shared, self._buffers)

    def _confirm(self, pending: Pending) -> None:
        self._control.copy_(torch.tensor([float(self.contributes), float(self._proposes())], device="cpu"))
        pending.reduce(self._control, "sum")
        if self._buffers:
            if self._rank == 0:
                pack_bytes(self._buffers, self._shared)
            else:
                self._shared.zero_()
            pending.reduce(self._shared, "bor")
