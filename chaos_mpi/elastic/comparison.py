"""Whether all members make the same collective call: found out before any data moves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from chaos_mpi.errors import MismatchError, ViewChangedError
from chaos_mpi.mpi.world import Pending, World

#: What stands for the call, one number that the others need, and whether it was made for other members.
_CALL, _NUMBER, _MOVED = range(3)


class Comparison:
    """One member's part in the comparison. What travels is equally long for all calls, or MPI could not compare them.

    Args:
        call: what is called, with all that has to be the same at every member.
        number: one that the others need.
    """

    def __init__(self, call: str, number: int = 0) -> None:
        self._mine = np.zeros(3, dtype=np.int64)
        self._rows = np.zeros((0, 3), dtype=np.int64)
        self.say(call, number)

    def say(self, call: str, number: int) -> None:
        """What this member says from the next :meth:`start` on."""
        self._mine[_CALL] = int.from_bytes(hashlib.blake2b(call.encode(), digest_size=8).digest(), signed=True)
        self._mine[_NUMBER] = number

    def start(self, pending: Pending, *, moved: bool = False) -> None:
        """Tell the others, and hear what they say.

        Args:
            pending: of the communicator on which the call is made.
            moved: whether the call was made for other members than are there.
        """
        self._mine[_MOVED] = moved
        self._rows = np.zeros((pending.size, 3), dtype=np.int64)
        pending.gather(self._mine.view(np.uint8), self._rows.view(np.uint8))

    @property
    def anyone_moved(self) -> bool:
        """Whether a member's call was made for others than are there."""
        return bool(self._rows[:, _MOVED].any())

    @property
    def differs(self) -> bool:
        """Whether the members' calls differ."""
        return bool((self._rows[:, _CALL] != self._rows[0, _CALL]).any())

    @property
    def numbers(self) -> np.ndarray:
        """What each member said, in rank order; shape (size, 1)."""
        return self._rows[:, _NUMBER : _NUMBER + 1]


def refuse_moved(world: World, message: str, what: Callable[[], str], limit_s: float) -> NoReturn:
    """All members have found that one of the calls is for others than are there: leave it together.

    Whoever left it at once could be further, when one more dies, than one that does not know yet, and would have to
    hand it a result that is not there.

    Raises:
        ViewChangedError: always, and at every member.
        PeerFailedError, WaitTimeoutError: as :meth:`chaos_mpi.mpi.world.Pending.wait`.
    """
    world.all_gather(b"", what, limit_s)
    raise ViewChangedError(message)


def refuse_mismatch(world: World, call: str, what: Callable[[], str], limit_s: float) -> NoReturn:
    """All members have found that their calls differ: tell each other which.

    Raises:
        MismatchError: always, and the same at every member.
        PeerFailedError, WaitTimeoutError: as :meth:`chaos_mpi.mpi.world.Pending.wait`.
    """
    calls = [row.decode() for row in world.all_gather(call.encode(), what, limit_s)]
    told = "; ".join(
        f"{', '.join(str(rank) for rank, other in enumerate(calls) if other == call)}: {call}"
        for call in dict.fromkeys(calls)
    )
    raise MismatchError(
        "ranks make different collective calls, which all of them have to make alike and in the same order (rank: "
        f"call): {told}"
    )
