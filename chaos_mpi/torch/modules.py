"""What data parallel training asks of a module, and keeps of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chaos_mpi.elastic.operations import pack_bytes, unpack_bytes
from chaos_mpi.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chaos_mpi.elastic.session import Session


class StableBuffers:
    """Module buffers (BatchNorm statistics, for one) as they were after the last finished step.

    The session puts them back before an emergency save, which is not to have those of half a step.

    Args:
        session: the session.
        buffers: those that all members have alike after each step (none, if they may differ).

    Attributes:
        live: the buffers themselves.
        nbytes: size of all of them.
    """

    def __init__(self, session: Session, buffers: Iterable[torch.Tensor]) -> None:
        self.live = [buffer.detach() for buffer in buffers]
        self.nbytes = sum(buffer.nbytes for buffer in self.live)
        self._kept = torch.empty(self.nbytes, dtype=torch.uint8)
        self.keep()
        session.on_rollback(self._restore)
        session.on_restore(self.keep)

    def keep(self) -> None:
        """A step is finished: these are the ones to go back to."""
        if self.live:
            pack_bytes(self.live, self._kept)

    def _restore(self) -> None:
        if self.live:
            unpack_bytes(self._kept, self.live)


def refuse_unusable_module(module: torch.nn.Module) -> None:
    """Refuse what gradients cannot be reduced of.

    Raises:
        ConfigError: a parameter or buffer is not on the CPU, or a part of the module has sparse gradients.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ConfigError(f"'{name}' is on {tensor.device}; only CPU modules are supported")
    for name, part in module.named_modules():
        if getattr(part, "sparse", False):
            raise ConfigError(f"'{name}' produces sparse gradients, which are not supported; set sparse=False")
