"""The learning-rate rule on a change of size, applied around every optimizer step.

The factor is applied just before ``optimizer.step()`` and taken back just after it, so that learning-rate
schedulers, which compute the next rate from the present one, never see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def scale_learning_rate(optimizer: Optimizer, factor: Callable[[], float]) -> None:
    """Make every step of ``optimizer`` use its learning rate times ``factor()``."""
    saved: list[Any] = []

    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scale = factor()
        if scale == 1.0:
            return
        for group in optimizer.param_groups:
            saved.append(group["lr"])
            group["lr"] = group["lr"] * scale

    def after(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not saved:
            return
        for group, rate in zip(optimizer.param_groups, saved, strict=True):
            group["lr"] = rate
        saved.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
