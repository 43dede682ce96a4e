"""The small parts of the sampler: what it needs of a session, what it keeps of a round, and one iteration over it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol, Self, TypeVar

log = logging.getLogger("chaos_mpi.elastic")

#: Held by whoever moves a sampler, for that moment, and by a thread that recovers while a training loop goes on in
#: another one: from when it reports where the samplers are until they have followed the change.
_moving = threading.RLock()

P = ParamSpec("P")
R = TypeVar("R")


def moves(method: Callable[P, R]) -> Callable[P, R]:
    """Marks what changes where a sampler is: it waits while :func:`samplers_stand_still`."""

    @functools.wraps(method)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        with _moving:
            return method(*args, **kwargs)

    return held


@contextlib.contextmanager
def samplers_stand_still() -> Iterator[None]:
    """Within it, no other thread moves a sampler.

    Not so in the main thread, which has the training loop: nobody is to wait for that while it waits for other members.
    """
    if threading.current_thread() is threading.main_thread():
        yield
        return
    with _moving:
        yield


class SamplerSession(Protocol):
    """What the sampler needs of the session."""

    @property
    def member(self) -> str:
        """This process's id."""

    @property
    def members(self) -> tuple[str, ...]:
        """Ids of the members, in rank order."""

    @property
    def expected_size(self) -> int:
        """The number of members that there will be when this process is one."""

    @property
    def batch_policy(self) -> str:
        """The rule for the batch size on a change of size."""

    @property
    def initial_size(self) -> int:
        """The number of ranks that ``batch_size`` was chosen for."""

    def attach_sampler(self, sampler: Any) -> None:
        """Have the sampler told of finished steps and of changes of membership."""


@dataclasses.dataclass(frozen=True)
class Taken:
    """A round handed to the training loop and not yet part of a finished step."""

    lap: int
    indices: list[int]  # none in a ghost round


def warn(session: SamplerSession, text: str, *values: object) -> None:
    """Warn of what all members have to say alike: it is shown at one of them."""
    log.log(logging.WARNING if session.member == session.members[0] else logging.DEBUG, text, *values)


class ReadingAhead:
    """Notices a loop that takes batches before it is done with those it has, and warns of it once.

    At its first step such a loop has batches that it has not used, and at later ones it takes fewer than it uses in
    all. One that makes each step of several batches at once takes as many for all of them, until the end.
    """

    def __init__(self) -> None:
        self._generation = self._at_first = 0
        self._warned = False

    def note_step(self, session: SamplerSession, generation: int, unused: int, at_end: bool) -> None:
        """A step is finished.

        Args:
            session: of the sampler.
            generation: of the loop.
            unused: batches taken since the last step, less the backward passes made since then.
            at_end: whether the loop has all batches of the epoch.
        """
        if generation != self._generation:
            self._generation, self._at_first = generation, unused
        elif self._at_first > max(unused, 0) and not at_end and not self._warned:
            self._warned = True
            warn(session,
                "the loop had taken %d more batches than it used when it made its first step, but not at a later one. "
                "If it reads ahead (a prefetcher, pairwise(loader)), samples are not counted right when ranks die, and "
                "no rank can join: have the loader fetch ahead, by num_workers.",
                self._at_first,
            )  # fmt: skip


class IssuesRounds(Protocol):
    """What an iteration needs of the sampler."""

    @property
    def generation(self) -> int:
        """A number that changes whenever a new iteration begins or the epoch is left."""

    def issue(self) -> list[int] | None:
        """The indices of the next round; None when there is none left."""


class Rounds(Iterator[list[int]]):
    """One iteration. Not a generator, since it can have more to give after it ran dry: returned samples."""

    def __init__(self, sampler: IssuesRounds, generation: int) -> None:
        self._sampler = sampler
        self._generation = generation

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[int]:
        if self._sampler.generation != self._generation:
            raise RuntimeError(
                "this iteration over the ElasticSampler is over: another was begun, or the epoch changed"
            )
        indices = self._sampler.issue()
        if indices is None:
            raise StopIteration
        return indices
