"""What data parallel training asks of a module, and keeps of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import torch

from chaos_mpi.errors import ConfigError

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session

_T = TypeVar("_T")


class StableBuffers:
    """Module buffers (BatchNorm statistics, for one) as they were after the last finished step.

    The session puts them back before an emergency save, which is not to have those of half a step.

    Args:
        session: the session.
        module: whose buffers all members have alike after each step, but those of :func:`ignored_names`; None if they
            may differ.

    Attributes:
        nbytes: size of all of them.
    """

    def __init__(self, session: Session, module: torch.nn.Module | None) -> None:
        self._places: list[tuple[dict[str, torch.Tensor | None], str]] = []
        self._tensors: list[torch.Tensor] = []
        known: set[int] = set()
        ignored = ignored_names(module) if module is not None else frozenset()
        for prefix, part in module.named_modules() if module is not None else ():
            for name, buffer in part._buffers.items():
                if f"{prefix}.{name}".removeprefix(".") in ignored:
                    continue
                if buffer is not None and id(buffer) not in known:
                    known.add(id(buffer))
                    self._places.append((part._buffers, name))
                    self._tensors.append(buffer)
        self._live = [_alias(buffer) for buffer in self._tensors]
        self.nbytes = sum(buffer.nbytes for buffer in self._live)
        self._kept = [buffer.clone() for buffer in self._live]
        session.on_rollback(_while_it_lives(self._restore, None))
        session.on_restore(_while_it_lives(self.keep, None))
        session.keep_alike(_while_it_lives(self._to_be_alike, []))

    @property
    def live(self) -> list[torch.Tensor]:
        """The buffers themselves. A module may have put others in their place (``self.mean = 0.9 * self.mean + ...``).

        One of another shape or dtype than at first, a cache that grows for instance, is left alone: what all members
        would have alike is the tensor that there was before.
        """
        for index, (owner, name) in enumerate(self._places):
            tensor, kept = owner.get(name), self._kept[index]
            if tensor is self._tensors[index] or tensor is None:
                continue
            if tensor.shape == kept.shape and tensor.dtype == kept.dtype:
                self._tensors[index], self._live[index] = tensor, _alias(tensor)
        return self._live

    def keep(self) -> None:
        """A step is finished: these are the ones to go back to."""
        _copy(self._kept, self.live)

    def forget(self) -> None:
        """Somebody else takes care of them from now on."""
        self._places, self._tensors, self._live, self._kept = [], [], [], []

    def _restore(self) -> None:
        _copy(self.live, self._kept)

    def _to_be_alike(self) -> list[torch.Tensor]:
        return self.live


def _while_it_lives(method: Callable[[], _T], gone: _T) -> Callable[[], _T]:
    """Calls the method of an object as long as somebody else keeps that: a session may outlive many models."""
    reference = weakref.WeakMethod(method)

    def call() -> _T:
        alive = reference()
        return gone if alive is None else alive()

    return call


def _alias(buffer: torch.Tensor) -> torch.Tensor:
    """The same memory, which autograd does not see being written to.

    A second backward pass through a graph that has the buffer in it is to go on: what all members have alike after the
    first one is as good for it as what this one had.
    """
    return buffer.data


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)


def ignored_names(module: torch.nn.Module) -> frozenset[str]:
    """Names of parameters and buffers that each rank has for itself, because the script has said so to torch's DDP."""
    return frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def refuse_unfrozen(frozen: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Refuse gradients that are not reduced, after a backward pass.

    Args:
        frozen: the parameters that were not trained when the module was wrapped, with their names.

    Raises:
        ConfigError: one of them has a gradient now.
    """
    for name, param in frozen:
        if param.requires_grad and param.grad is not None:
            raise ConfigError(
                f"'{name}' has a gradient, and was not trained when the module was wrapped, so its gradient is not "
                "averaged, and the ranks would grow apart: wrap the module with all parameters trainable; give those "
                "that are to learn later a parameter group whose learning rate is 0 until then"
            )


def refuse_unusable_module(module: torch.nn.Module) -> None:
    """Refuse what gradients cannot be reduced of.

    Raises:
        ConfigError: a part of it has no values, or sparse gradients.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise ConfigError(f"'{name}' is on meta and has no values; materialise the module first")
    for name, part in module.named_modules():
        if isinstance(part, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad:
            raise ConfigError(f"'{name}' produces sparse gradients, which are not supported; set sparse=False")
