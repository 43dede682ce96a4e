"""The learning-rate rule on a change of size, applied around every optimizer step.

The factor is applied just before ``optimizer.step()`` and taken back just after it, so that learning-rate
schedulers, which compute the next rate from the present one, never see it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

#: Every step of an optimizer runs within a function of this file, whose ``self`` is the optimizer.
_WHERE_HOOKS_ARE_CALLED = Optimizer.profile_hook_step.__code__.co_filename


class StepHooks:
    """Two functions called before and after every ``step()`` of an optimizer.

    torch calls hooks once for every class that is hooked on the way: of an optimizer that extends another one, and
    calls its ``step()`` from its own, possibly twice. These are called for the outermost one alone. torch calls none
    after a step that ends by an exception, as of its closure; if the script survives that, the second one is called
    when the next step begins.
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

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth and _is_within_step(optimizer):
            self._depth += 1
            return
        if self._depth:
            self._after()
        self._depth = 1
        self._before()

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth > 1 and _is_within_step(optimizer):
            self._depth -= 1
            return
        self._depth = 0
        self._after()


def _is_within_step(optimizer: Optimizer) -> bool:
    """Whether the step that calls a hook of this optimizer was called from another step of the same one.

    From the stack, since there is no other sign of a step that has ended by an exception.
    """
    frame: FrameType | None = sys._getframe(2)  # of torch, which calls the hook
    while frame is not None and (frame := frame.f_back) is not None:
        if frame.f_code.co_filename == _WHERE_HOOKS_ARE_CALLED and frame.f_locals.get("self") is optimizer:
            return True
    return False


class ScaledRate:
    """Makes every step of ``optimizer`` use its learning rate times ``factor()``."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[], float]) -> None:
        self._optimizer, self._factor = optimizer, factor
        self._saved: list[Any] = []
        StepHooks(optimizer, self._scale, self._take_back)

    @contextlib.contextmanager
    def taken_back(self) -> Iterator[None]:
        """Within it, the learning rate is that which others are to have: a step may be under way, in its closure."""
        groups = self._optimizer.param_groups
        scaled = [group["lr"] for group in groups] if self._saved else []
        for group, rate in zip(groups, self._saved, strict=False):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(groups, scaled, strict=False):
                group["lr"] = rate

    def _scale(self) -> None:
        scale = self._factor()
        if scale == 1.0:
            return
        for group in self._optimizer.param_groups:
            self._saved.append(group["lr"])
            group["lr"] = group["lr"] * scale

    def _take_back(self) -> None:
        if not self._saved:
            return
        for group, rate in zip(self._optimizer.param_groups, self._saved, strict=True):
            group["lr"] = rate
        self._saved.clear()


@contextlib.contextmanager
def unscaled(rates: Iterable[ScaledRate]) -> Iterator[None]:
    """Within it, no learning rate is scaled."""
    with contextlib.ExitStack() as stack:
        for rate in rates:
            stack.enter_context(rate.taken_back())
        yield
