"""Collective calls among some of the members.

A subgroup is not elastic: it exists as long as all of its members do. When one dies, or gives it up, the calls under
way in it, and those to come, raise :class:`~chaos_mpi.errors.GroupBrokenError` at the others, while the session
recovers as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from chaos_mpi.elastic.operations import Operation
from chaos_mpi.errors import ConfigError, GroupBrokenError, PeerFailedError, WaitTimeoutError
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import World

#: Tags of subgroups in MPI, which must be alike at the members of one and different for two that are made at a time.
_TAGS = 1 << 14
#: How long ranks are waited for when it is made, at least: then this process ends, and not with an error to catch.
_MAKING_LIMIT_S = 300.0


class GroupHolder(Protocol):
    """What a subgroup needs of the session."""

    member: str

    def ready_for_subgroup(self) -> tuple[World, View]:
        """The present communicator and view, when no other call is under way."""

    def attend(self) -> None:
        """Take part in a recovery that other members have begun, if there is one."""


class Subgroup:
    """Some members of the present view, in an order of their own. Its members alone make it, all of them.

    Args:
        holder: the session.
        members: in the order of their ranks in the group: ids, or ranks in the present view. A recovery that comes
            first may give other ranks to members, but not other ids.
        number: the same at every member, another one for each group.
        limit_s: longest wait for the others, seconds.

    Raises:
        ConfigError: this member is not one of them, or a rank is not there, or is there twice.
        GroupBrokenError: a member has died.

    Attributes:
        members: ids, in the order of their ranks in the group.
        rank: this member's rank in the group.
    """

    def __init__(
        self, holder: GroupHolder, members: Sequence[int] | Sequence[str], number: int, limit_s: float
    ) -> None:
        world, view = holder.ready_for_subgroup()
        ranks = [_rank_of(member, view) for member in members]
        if len(set(ranks)) != len(ranks) or not all(0 <= rank < view.size for rank in ranks):
            raise ConfigError(f"a group of ranks {list(ranks)} is not possible in a job of {view.size}")
        self.members = tuple(view.members[rank] for rank in ranks)
        if holder.member not in self.members:
            raise ConfigError(f"rank {world.rank} cannot make a group of ranks {list(ranks)}, which it is not in")
        self.rank = self.members.index(holder.member)
        self._limit_s = limit_s
        self._view = View(0, self.members)
        self._holder = holder
        self._broken = ""
        try:
            self._world = world.subset(ranks, number % _TAGS, max(limit_s, _MAKING_LIMIT_S))
        except PeerFailedError as error:
            raise self._break(error, "it was made") from error
        self._world.meanwhile = holder.attend

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)

    @property
    def world(self) -> World:
        """Its communicator."""
        return self._world

    def execute(self, operation: Operation) -> None:
        """Run one collective operation to its end.

        Raises:
            GroupBrokenError: a member of the group has died.
            MismatchError: the members are in different calls.
            WaitTimeoutError: not all members made the call in time.
        """
        if self._broken:
            raise GroupBrokenError(self._broken)
        self._holder.ready_for_subgroup()
        try:
            operation.launch(self._world, self._view)
            operation.wait(lambda: f"the other members of a group of {self.size} in '{operation.phase}'", self._limit_s)
        except PeerFailedError as error:
            self._world.revoke()
            operation.withdraw()
            raise self._break(error, f"'{operation.phase}' was under way") from error
        except WaitTimeoutError:
            self._world.revoke()
            operation.withdraw()
            self._broken = "a call in this group of members was given up, because not all of them made it in time"
            raise
        operation.contributors = self.members

    def give_up(self) -> None:
        """End it for all members: whoever is in a call of it, or makes one, gets a GroupBrokenError.

        It may be called while a call is under way in another thread.
        """
        self._broken = self._broken or f"a group of {self.size} members ({', '.join(self.members)}) was given up"
        self._world.revoke()

    def free(self) -> None:
        """Give its communicator back, if nothing went wrong in it. No member uses it afterwards.

        Otherwise messages may still be under way in it, and MPI would take them for those of the next communicator
        that gets its number. Where one member keeps it, no communicator with that member gets the number.
        """
        if not self._broken and not self._world.is_broken():
            self._world.free()

    def _break(self, error: PeerFailedError, when: str) -> GroupBrokenError:
        self._broken = (
            f"a group of {self.size} members ({', '.join(self.members)}) has lost one of them, or one has given it up, "
            f"while {when}: {error}. "
            "Groups of some members end with any of them: make a new one of those that are left."
        )
        return GroupBrokenError(self._broken)


def _rank_of(member: int | str, view: View) -> int:
    if isinstance(member, int):
        return member
    if member not in view.members:
        raise GroupBrokenError(f"{member} has died, and cannot be in a new group")
    return view.members.index(member)
