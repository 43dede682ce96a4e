"""The end of tasks."""

from __future__ import annotations

import asyncio
import contextlib

from chaos_mpi.agent import tasks


def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    lost = []

    async def forgetful() -> None:
        while len(lost) < 3:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            lost.append(True)

    async def over() -> None:
        return None

    async def run() -> None:
        made = [asyncio.create_task(forgetful()), asyncio.create_task(over())]
        await asyncio.sleep(0)
        await asyncio.wait_for(tasks.cancel(made), 10)
        assert all(task.done() for task in made)
        await tasks.cancel([])

    asyncio.run(run())
    assert len(lost) == 3
