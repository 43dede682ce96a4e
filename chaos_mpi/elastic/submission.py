"""Operations that are carried out in the background, one after the other, in the order in which they were handed in."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

#: How long the thread without work stays: to start one anew takes longer than most operations.
_IDLE_S = 5.0


class BackgroundCalls:
    """Runs calls in a thread of its own, in their order. The thread is there only while there is something to do.

    All members have to hand in the same calls in the same order, so a call that another thread makes itself has to
    wait until those before it are done: :meth:`settle`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._under_way = False
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], object]) -> Future[object]:
        """Have ``call`` made in its turn; the future has what it returns, or the exception that it raises.

        One that is handed in by what the end of another one has set off is made at once.
        """
        future: Future[object] = Future()
        if threading.current_thread() is self._thread:  # within another call's end, whose thread nobody is to wait for
            _carry_out(call, future)
            return future
        with self._changed:
            self._waiting.append((call, future))
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="chaos_mpi-collectives", daemon=True)
                self._thread.start()
        return future

    def settle(self) -> None:
        """Return when all calls that were handed in are done. At once in a call that is made in the background."""
        if self._thread is None or threading.current_thread() is self._thread:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._under_way)

    @property
    def busy_elsewhere(self) -> bool:
        """Whether a call is under way, or waits for its turn, in the background; False in such a call itself."""
        if self._thread is None or threading.current_thread() is self._thread:
            return False
        with self._changed:
            return bool(self._waiting) or self._under_way

    def _run(self) -> None:
        while (work := self._next()) is not None:
            _carry_out(*work)
            with self._changed:
                self._under_way = False
                self._changed.notify_all()

    def _next(self) -> tuple[Callable[[], object], Future[object]] | None:
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._waiting), _IDLE_S):
                self._thread = None
                return None
            self._under_way = True
            return self._waiting.popleft()


def _carry_out(call: Callable[[], object], future: Future[object]) -> None:
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
