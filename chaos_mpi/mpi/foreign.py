"""Communicators that other software in this process makes of ours, and keeps to itself.

Horovod duplicates the communicator that it is given and works on the duplicates in a thread of its own. When a member
dies, that thread may have to be told like everybody else: by a revoke of what it works on. MPI numbers every
communicator of a process for Fortran (``MPI_Comm_c2f``), so the duplicates can be found by going through the numbers.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chaos_mpi.mpi.world import MPI

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos_mpi.mpi.world import World

#: So many unused numbers in a row, and there are none in use above them: a number that was given back is used again
#: before a new one is.
_GAP = 256


class ForeignCommunicators:
    """The duplicates of ``world`` that are made from now on; to be made just before the other software starts."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known = frozenset(number for number, _ in _communicators())

    def revoke(self, spared: World) -> int:
        """Make every operation on them fail at every member; how many there are.

        Only after a failure, and while the other software is stuck in a call to MPI: what it gives back meanwhile
        must not be touched.

        Args:
            spared: is no duplicate, even if it looks like one.
        """
        group, count = self._world.comm.Get_group(), 0
        for number, comm in _communicators():
            if number in self._known or comm in (self._world.comm, spared.comm) or comm.Is_inter():
                continue
            with contextlib.suppress(MPI.Exception):  # it was given back just now
                theirs = comm.Get_group()
                alike = MPI.Group.Compare(group, theirs) == MPI.IDENT
                theirs.Free()
                if alike:
                    comm.Revoke()
                    count += 1
        group.Free()
        return count


def _communicators() -> Iterator[tuple[int, MPI.Comm]]:
    """All communicators there are, with their numbers."""
    number = unused = 0
    while unused < _GAP:
        try:
            comm = MPI.Comm.f2py(number)
            unused = 0
            if comm != MPI.COMM_NULL:
                yield number, comm
        except MPI.Exception:
            unused += 1
        number += 1
