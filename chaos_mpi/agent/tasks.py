"""The end of tasks of an asyncio program."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 0.05


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and return when they have ended.

    They are cancelled again and again: ``asyncio.wait_for`` loses a cancellation that comes as it is done (Python 3.11,
    python/cpython#86296), and a task that goes on forever would then never be rid of.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
