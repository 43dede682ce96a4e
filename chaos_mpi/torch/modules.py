"""What data parallel training asks of a module, and keeps of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
        self._kept = [buffer.clone() for buffer in self.live]
        session.on_rollback(self._restore)
        session.on_restore(self.keep)

    def keep(self) -> None:
        """A step is finished: these are the ones to go back to."""
        _copy(self._kept, self.live)

    def _restore(self) -> None:
        _copy(self.live, self._kept)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)


def refuse_unusable_module(module: torch.nn.Module) -> None:
    """Refuse what gradients cannot be reduced of.

    Raises:
        ConfigError: a part of it has no values, or sparse gradients.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise ConfigError(f"'{name}' is on meta and has no values; materialise the module first")
    for name, part in module.named_modules():
        if getattr(part, "sparse", False):
            raise ConfigError(f"'{name}' produces sparse gradients, which are not supported; set sparse=False")
