"""The learning-rate rule on a change of size, applied around every optimizer step.

The factor is applied just before ``optimizer.step()`` and taken back just after it, so that learning-rate
schedulers, which compute the next rate from the present one, never see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepHooks:
    """Two functions called before and after every ``step()`` of an optimizer.

    torch calls hooks once for every class that is hooked on the way: of an optimizer that extends another one, and
    calls its ``step()`` from its own, possibly twice. These are called for the outermost one alone.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before, self._after = before, after
        self._depth = 0
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._enter), optimizer.register_step_post_hook(self._leave)
        ]  # fmt: skip

    def remove(self) -> None:
        """Call them no more."""
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._before()

    def _leave(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._after()


def scale_learning_rate(optimizer: Optimizer, factor: Callable[[], float]) -> None:
    """Make every step of ``optimizer`` use its learning rate times ``factor()``."""
    saved: list[Any] = []

    def before() -> None:
        scale = factor()
        if scale == 1.0:
            return
        for group in optimizer.param_groups:
            saved.append(group["lr"])
            group["lr"] = group["lr"] * scale

    def after() -> None:
        if not saved:
            return
        for group, rate in zip(optimizer.param_groups, saved, strict=True):
            group["lr"] = rate
        saved.clear()

    StepHooks(optimizer, before, after)
