"""What carries out the calls of a process group: the session for the default group, a subgroup for others."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from chaos_mpi.elastic.operations import Operation
from chaos_mpi.elastic.session import Session
from chaos_mpi.elastic.subgroup import Subgroup
from chaos_mpi.errors import ConfigError, GroupBrokenError, WaitTimeoutError
from chaos_mpi.membership import View
from chaos_mpi.mpi.point_to_point import PointToPoint

#: Numbers of the groups that exist for messages between members of the default group; torch's own groups count up.
_MESSAGE_GROUP = 9000


class Carrier(ABC):
    """Carries out the calls of one process group."""

    session: Session

    @property
    @abstractmethod
    def view(self) -> View:
        """The members, in rank order."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process's rank."""

    @abstractmethod
    def execute(self, operation: Operation) -> None:
        """Run a collective operation to its end."""

    @abstractmethod
    def messages(self) -> PointToPoint:
        """What messages go over."""

    @abstractmethod
    def line(self, rank: int) -> int:
        """A rank's number in :meth:`messages`."""

    @abstractmethod
    def rank_of_line(self, number: int) -> int:
        """The reverse of :meth:`line`; -1 for a member that is not there any more."""

    @abstractmethod
    def close(self) -> None:
        """End it, in good order."""

    def submit(self, call: Callable[[], object]) -> Future[object]:
        """Have ``call`` made in the background, after those before it."""
        return self.session.submit(call)


class SessionCarrier(Carrier):
    """The session: members may die, leave and join.

    Args:
        session: the open session.
        owned: whether it is to be closed along with the group.
    """

    def __init__(self, session: Session, owned: bool) -> None:
        self.session, self._owned = session, owned
        self._group = _group_for_messages(session)
        self._messages = PointToPoint(self._group.world, session.attend) if self._group is not None else None

    @property
    def view(self) -> View:
        return self.session.view

    @property
    def rank(self) -> int:
        return self.session.rank

    def execute(self, operation: Operation) -> None:
        self.session.execute(operation)

    def messages(self) -> PointToPoint:
        if self._messages is None:
            raise ConfigError(
                "this rank has nobody to exchange messages with: it was alone when its process group was made. "
                "Ranks that joined later get messages in groups that are made with new_group"
            )
        return self._messages

    def line(self, rank: int) -> int:
        members = self.session.members
        known = self._group.members if self._group is not None else ()
        if not 0 <= rank < len(members):
            raise ConfigError(f"there is no rank {rank} among {len(members)}")
        if members[rank] not in known:
            raise ConfigError(
                f"rank {rank} ({members[rank]}) joined after the process group was made, and gets messages only in "
                "groups that are made with new_group since then"
            )
        return known.index(members[rank])

    def rank_of_line(self, number: int) -> int:
        assert self._group is not None
        member = self._group.members[number]
        return self.session.members.index(member) if member in self.session.members else -1

    def close(self) -> None:
        if self._owned:
            self.session.let_error_go_on()
        # Where messages are under way, MPI would take them for those of the communicator that gets the number next.
        if self._group is not None and self._messages is not None and not self._messages.under_way:
            self._group.free()
        if self._owned:
            self.session.close()


class SubgroupCarrier(Carrier):
    """Some members, as long as all of them live."""

    def __init__(self, session: Session, group: Subgroup) -> None:
        self.session, self._group = session, group
        self._view = View(0, group.members)
        self._messages = PointToPoint(group.world, session.attend)

    @property
    def view(self) -> View:
        return self._view

    @property
    def rank(self) -> int:
        return self._group.rank

    def execute(self, operation: Operation) -> None:
        try:
            self._group.execute(operation)
        except WaitTimeoutError as error:
            raise WaitTimeoutError(f"the timeout of this process group has passed: {error}") from error

    def messages(self) -> PointToPoint:
        return self._messages

    def line(self, rank: int) -> int:
        if not 0 <= rank < self._group.size:
            raise ConfigError(f"there is no rank {rank} in this group of {self._group.size}")
        return rank

    def rank_of_line(self, number: int) -> int:
        return number

    def close(self) -> None:
        # With an error under way the others may never come to the calls that would be waited for here.
        if not self.session.ends_well or sys.exc_info()[1] is not None:
            return
        self.session.ready_for_subgroup()
        if not self._messages.under_way:
            self._group.free()


def subgroup(session: Session, ranks: Sequence[int], number: int, limit_s: float) -> SubgroupCarrier:
    """A group of some ranks, which alone call this."""
    return SubgroupCarrier(session, Subgroup(session, ranks, number, limit_s))


def _group_for_messages(session: Session) -> Subgroup | None:
    """All members, in a communicator of their own, which is not revoked when one of them dies."""
    while session.size > 1:
        made: Subgroup | None = None
        try:
            made = Subgroup(session, range(session.size), _MESSAGE_GROUP + session.epoch, session.settings.timeout_s)
        except GroupBrokenError:
            made = None
        if all(session.gather(made is not None)):
            return made
        if made is not None:
            made.free()
    return None
