"""One call, from where the script makes it until it has waited for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from chaos_mpi.elastic.operations import Operation
from chaos_mpi.errors import GroupBrokenError, MismatchError, ViewChangedError
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.negotiation import Asked

T = TypeVar("T")


class Group(Protocol):
    """All ranks, or some of them."""

    @property
    def members(self) -> tuple[str, ...]: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def execute(self, operation: Operation) -> None: ...


class Request:
    """One call.

    Args:
        asked: how it is compared with those of other ranks.
        make: makes the operation, when its turn has come.
        finish: what the caller gets, of the finished operation.
        anew: whether it is made anew for those that are left, when it was for others.

    Attributes:
        members: who took part, when it is done and was a call of all ranks.
        place: in their order, see :meth:`Waiting.next_place`; 0 if it was none.
    """

    def __init__(
        self,
        asked: Asked,
        make: Callable[[Group], Operation],
        finish: Callable[[Any, Group], Any] = lambda *_: None,
        *,
        anew: bool = True,
    ) -> None:
        self.asked, self.make, self._finish, self.anew = asked, make, finish, anew
        self.result: Any = None
        self.error: BaseException | None = None
        self.members: tuple[str, ...] = ()
        self.place = 0
        self._done = threading.Event()
        self._inference = torch.is_inference_mode_enabled()

    @property
    def name(self) -> str:
        """What it is matched by."""
        return self.asked.name

    @property
    def done(self) -> bool:
        """Whether the result is there, or the error."""
        return self._done.is_set()

    def complete(self, operation: Operation, group: Group) -> None:
        """The operation is finished."""
        try:
            # As in the caller's thread: no code outside of inference mode may write to its tensors.
            with torch.inference_mode(self._inference):
                finish = getattr(operation, "finish", None)
                if finish is not None:
                    finish()
                with torch.no_grad():
                    self.result = self._finish(operation, group)
        except BaseException as error:  # whatever it is, somebody waits
            self.fail(error)
        else:
            self._done.set()

    def complete_join(self, last: int) -> None:
        """All ranks have joined."""
        self.result = last
        self._done.set()

    def fail(self, error: BaseException) -> None:
        """It came to nothing."""
        if isinstance(error, (MismatchError, GroupBrokenError, ViewChangedError)):
            broken = HorovodInternalError(f"{self.asked.call}: {error}")
            broken.__cause__ = error
            error = broken
        self.error = error
        self._done.set()

    def wait(self) -> Any:
        """The result, when it is there.

        Raises:
            HorovodInternalError: the ranks' calls do not fit, or a process set has lost a member.
        """
        self._done.wait()
        if self.error is not None:
            raise self.error
        return self.result


class Waiting:
    """What the script of this rank waits for.

    Args:
        members: all ranks.

    Attributes:
        members: who took part in the last call of all ranks that the script has waited for, or for whom it could not
            be done. Where the script is at the same line, they are the same at every rank, while one may hear of a
            death one call earlier than another.
    """

    def __init__(self, members: tuple[str, ...] = ()) -> None:
        self.members = members
        self._place = self._last_place = 0
        self._for: Request | None = None

    @property
    def blocked(self) -> bool:
        """Whether it cannot make any other call."""
        return self._for is not None and not self._for.done

    def wait(self, request: Request) -> Any:
        """See :meth:`Request.wait`."""
        try:
            return self.during(request, request.wait)
        finally:
            if request.place > self._place:
                self._place, self.members = request.place, request.members

    def note(self, members: tuple[str, ...]) -> None:
        """All ranks have come to one place, and these are they."""
        self._place, self.members = self._last_place, members

    def next_place(self) -> int:
        """The place of a call of all ranks that is done now, after those that were done before."""
        self._last_place += 1
        return self._last_place

    def during(self, request: Request, call: Callable[[], T]) -> T:
        """Make a call that returns when the request is done."""
        self._for = request
        try:
            return call()
        finally:
            self._for = None
