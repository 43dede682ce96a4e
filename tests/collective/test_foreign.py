"""Communicators that other software makes of the session's are found, and only these."""

from __future__ import annotations

import pytest

from chaos_mpi import Session
from chaos_mpi.mpi.foreign import ForeignCommunicators
from chaos_mpi.mpi.world import World

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]


def test_only_later_duplicates_of_the_same_members_are_revoked(session: Session) -> None:
    world = session._sequence.world
    before = World(world.comm.Dup())
    foreign = ForeignCommunicators(world)
    theirs, spared = World(world.comm.Dup()), World(world.comm.Dup())
    half = World(world.comm.Split(world.rank % 2))
    session.barrier()
    if session.rank == 0:
        assert foreign.revoke(spared) == 1
    session.barrier()
    limit = 1000
    while not theirs.is_broken() and limit:
        session.barrier()  # so that MPI makes progress everywhere
        limit -= 1
    assert limit
    assert not any(other.is_broken() for other in (world, before, spared, half))
    session.barrier()
    for made in (before, theirs, spared, half):
        made.free()
