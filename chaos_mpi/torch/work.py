"""What a call of the ``chaos`` backend returns: torch's handle of a communication that may still be under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work

from chaos_mpi.errors import WaitTimeoutError
from chaos_mpi.mpi.point_to_point import Message

#: What torch passes where its caller gave no timeout.
_NO_TIMEOUT = timedelta(0)


class CollectiveWork(Work):
    """A collective call that is made in the background, or has been made.

    Args:
        call: its name, for messages.
        done: the call.
        outputs: the tensors that it fills; the value of :meth:`get_future`.
    """

    def __init__(self, call: str, done: Future[Any], outputs: list[Any]) -> None:
        super().__init__()
        self._call, self._done, self._outputs = call, done, outputs

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Return when the outputs are filled, or raise what the call has raised.

        Raises:
            WaitTimeoutError: not done within ``timeout``; it goes on all the same.
        """
        try:
            self._done.result(_seconds(timeout))
        except FutureTimeoutError:
            raise WaitTimeoutError(f"'{self._call}' was not done within {timeout.total_seconds():g} s") from None
        return True

    def is_completed(self) -> bool:
        """Whether it has come to its end, good or bad."""
        return self._done.done()

    def is_success(self) -> bool:
        """Whether it has come to a good end."""
        return self._done.done() and self._done.exception() is None

    def exception(self) -> BaseException | None:
        """What it has raised; None if nothing, or not yet."""
        return self._done.exception() if self._done.done() else None

    def result(self) -> list[Any]:
        """The outputs, once they are filled."""
        self.wait()
        return self._outputs

    def synchronize(self) -> None:
        """Wait for it."""
        self.wait()

    def source_rank(self) -> int:
        """Only receives have one."""
        raise RuntimeError(f"'{self._call}' has no source rank; only a receive has one")

    def _source_rank(self) -> int:
        return self.source_rank()

    def get_future(self) -> torch.futures.Future[Any]:
        """A future with the outputs, also for callers in C++, as DDP's reducer."""
        return as_torch_future(self._done, self._outputs)


class MessageWork(Work):
    """A tensor that is being sent or received.

    Args:
        message: the message.
        limit_s: longest wait for the other side.
        finish: called once when it is done: puts what was received where it belongs.
    """

    def __init__(
        self, message: Message, limit_s: float, outputs: list[torch.Tensor], finish: Callable[[], None]
    ) -> None:
        super().__init__()
        self._message, self._limit_s, self._outputs, self._finish = message, limit_s, outputs, finish
        self._lock = threading.Lock()
        self._ended = False
        self._error: BaseException | None = None

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Return when the tensor has been received, here or there.

        Raises:
            GroupBrokenError: the other side has died.
            MismatchError: what was sent does not fit.
            WaitTimeoutError: not done within ``timeout``, else the timeout of the group.
        """
        limit = _seconds(timeout) or self._limit_s
        self._advance(lambda: self._message.wait(limit))
        if self._error is not None:
            raise self._error
        return True

    def __del__(self) -> None:
        if not self._ended:  # MPI goes on with the memory of the tensor
            self._message.let_go()

    def is_completed(self) -> bool:
        """Whether it has come to its end, good or bad."""
        self._advance(self._message.test, wait=False)
        return self._ended

    def is_success(self) -> bool:
        """Whether it has come to a good end."""
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        """What went wrong; None if nothing did, or it is under way."""
        self.is_completed()
        return self._error

    def result(self) -> list[torch.Tensor]:
        """The tensor, once it is there."""
        self.wait()
        return self._outputs

    def synchronize(self) -> None:
        """Wait for it."""
        self.wait()

    def source_rank(self) -> int:
        """Where the tensor came from; known when it is there."""
        return self._message.source

    def _source_rank(self) -> int:
        return self.source_rank()

    def get_future(self) -> torch.futures.Future[Any]:
        """A future with the tensor; a thread waits for it from now on."""
        done: Future[Any] = Future()

        def wait() -> None:
            try:
                done.set_result(self.wait())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=wait, name="chaos_mpi-message", daemon=True).start()
        return as_torch_future(done, self._outputs)

    def _advance(self, call: Callable[[], object], *, wait: bool = True) -> None:
        """See how far it is, unless another thread does."""
        if not self._lock.acquire(blocking=wait):
            return
        try:
            if self._ended:
                return
            try:
                self._ended = call() is not False
                if self._ended:
                    self._finish()
            except BaseException as error:
                self._ended, self._error = True, error
        finally:
            self._lock.release()


def finished(value: object = None) -> Future[Any]:
    """A future that is done."""
    done: Future[Any] = Future()
    done.set_result(value)
    return done


def as_torch_future(done: Future[Any], outputs: list[Any]) -> torch.futures.Future[Any]:
    """A torch future that has ``outputs`` when ``done`` is, or its exception, also for those that wait in C++."""
    inner: torch.futures.Future[Any] = torch.futures.Future()

    def value(_: torch.futures.Future[Any]) -> list[Any]:
        error = done.exception()
        if error is not None:
            raise error
        return outputs

    # An exception that is set from Python is seen from Python only; one that is raised in a callback, by C++ too.
    outer = inner.then(value)
    try:
        done.add_done_callback(lambda _: inner.set_result(None))
    except InvalidStateError:
        inner.set_result(None)
    return outer


def _seconds(timeout: timedelta) -> float | None:
    seconds = timeout.total_seconds()
    return seconds if seconds > 0 else None
