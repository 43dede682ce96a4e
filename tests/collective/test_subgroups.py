"""Collective calls among some of the members."""

from __future__ import annotations

import pytest
import torch

from chaos_mpi import ConfigError, Session
from chaos_mpi.elastic.exchanges import AllGather, AllReduce, Broadcast
from chaos_mpi.elastic.subgroup import Subgroup

pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(60)]


def test_halves_work_apart_and_beside_the_whole(session: Session) -> None:
    mine = [rank for rank in range(session.size) if rank % 2 == session.rank % 2]
    group = Subgroup(session, mine, 1, 30.0)
    assert (group.rank, group.size) == (mine.index(session.rank), len(mine))
    operation = AllReduce("test", [torch.tensor([session.rank])])
    group.execute(operation)
    assert operation.results()[0].item() == sum(mine)
    assert session.all_reduce(torch.ones(1)).item() == session.size
    gathered = AllGather("test", torch.tensor([session.rank]))
    group.execute(gathered)
    assert gathered.result.tolist() == mine
    session.barrier()
    group.free()


def test_ranks_in_an_order_of_their_own(session: Session) -> None:
    if session.rank < 2:
        group = Subgroup(session, [1, 0], 2, 30.0)
        tensor = torch.tensor([session.rank])
        operation = Broadcast("test", [tensor], 0)
        group.execute(operation)
        operation.deliver()
        assert tensor.item() == 1
        assert group.rank == 1 - session.rank
    session.barrier()


def test_a_group_outlives_a_change_of_the_order_of_the_members(session: Session) -> None:
    mine = [rank for rank in range(session.size) if rank % 2 == session.rank % 2]
    group, before, place = Subgroup(session, mine, 4, 30.0), session.members, session.rank
    # The agents ask for it, in a job on several hosts, when they have found slow links.
    order = (before[0], *reversed(before[1:]))
    session._negotiator.requests.order(order)
    session.meet(True)
    assert session.members == order
    assert session.rank == order.index(session.member)
    operation = AllGather("test", torch.tensor([place]))
    group.execute(operation)
    assert operation.result.tolist() == mine
    assert session.gather(place) == [before.index(member) for member in order]
    session._negotiator.requests.order(before)
    session.meet(True)
    assert session.members == before
    group.free()


def test_refusals(session: Session) -> None:
    with pytest.raises(ConfigError, match="not possible"):
        Subgroup(session, [session.rank, session.size], 3, 30.0)
    with pytest.raises(ConfigError, match="not possible"):
        Subgroup(session, [session.rank, session.rank], 3, 30.0)
    with pytest.raises(ConfigError, match="which it is not in"):
        Subgroup(session, [(session.rank + 1) % session.size], 3, 30.0)
    session.barrier()
