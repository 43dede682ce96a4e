"""What torch keeps of the groups of the backend ``chaos``, and asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from chaos_mpi.elastic.operations import Operation
from chaos_mpi.elastic.ranked import BroadcastFrom, GatherTo, ReduceTo, ScatterFrom
from chaos_mpi.errors import ViewChangedError
from chaos_mpi.membership import View
from chaos_mpi.torch.process_group import ChaosProcessGroup


class Called(Exception):
    """Nobody else is here to make the call."""


class FakeCarrier:
    """Of the last of several members."""

    def __init__(self, members: str) -> None:
        self.view = View(0, tuple(members))
        self.operations: list[Any] = []

    @property
    def rank(self) -> int:
        return self.view.size - 1

    def dies(self, member: str) -> None:
        self.view = View(self.view.epoch + 1, tuple(m for m in self.view.members if m != member))

    def execute(self, operation: Operation) -> None:
        self.operations.append(operation)
        raise Called


@pytest.fixture
def carrier() -> Iterator[FakeCarrier]:
    """Of the default group, of five."""
    found: Any = FakeCarrier("abcde")
    group = ChaosProcessGroup(found, timedelta(seconds=1))
    c10d._update_default_pg(group)
    # As init_process_group does it, which asks for the rank afterwards.
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(group.size())}
    c10d._world.pg_map[group] = ("chaos", None)
    c10d._world.pg_names[group] = "0"
    dist.get_rank()
    yield found
    c10d._update_default_pg(None)
    for kept in (c10d._world.pg_group_ranks, c10d._world.pg_map, c10d._world.pg_names):
        kept.clear()  # type: ignore[attr-defined]


def test_torch_finds_the_ranks_that_are_there(carrier: FakeCarrier) -> None:
    assert dist.get_process_group_ranks(None) == [0, 1, 2, 3, 4]
    carrier.dies("b")
    assert dist.get_process_group_ranks(None) == dist.get_process_group_ranks(dist.group.WORLD) == [0, 1, 2, 3]
    known = c10d._world.pg_group_ranks[dist.group.WORLD]
    assert (3 in known, 4 in known, len(known), dict(known)) == (True, False, 4, {n: n for n in range(4)})
    assert DeviceMesh.from_group(dist.group.WORLD, "cpu").mesh.tolist() == [0, 1, 2, 3]


def test_ranks_of_other_groups_stay_as_they_were_made(carrier: FakeCarrier) -> None:
    others: Any = FakeCarrier("de")
    group = ChaosProcessGroup(others, timedelta(seconds=1))
    c10d._world.pg_group_ranks[group] = {3: 0, 4: 1}
    assert (group.rank(), group.size()) == (1, 2)
    assert dist.get_process_group_ranks(group) == [3, 4]


def test_it_is_for_tensors_on_the_cpu(carrier: FakeCarrier) -> None:
    group: Any = dist.group.WORLD
    assert group._device_types == [torch.device("cpu")]
    with pytest.warns(UserWarning, match="will be deprecated"):
        assert c10d._get_pg_default_device() == torch.device("cpu")
    assert c10d._device_capability() == ["cpu"]
    assert group._get_backend(torch.device("cpu")) is group
    with pytest.raises(RuntimeError, match="CPU tensors"):
        group._get_backend(torch.device("cuda"))


HANDING_OUT: dict[str, Callable[[], object]] = {
    "broadcast_object_list": lambda: dist.broadcast_object_list([None], src=0),
    "scatter_object_list": lambda: dist.scatter_object_list([None], None, src=0),
}


@pytest.mark.parametrize("call", HANDING_OUT)
def test_objects_that_only_a_dead_rank_had_have_no_successor(carrier: FakeCarrier, call: str) -> None:
    with pytest.raises(Called):
        HANDING_OUT[call]()
    assert isinstance(carrier.operations[0], BroadcastFrom)
    assert not carrier.operations[0].has_successor


def test_who_has_a_successor_as_root() -> None:
    called, tensor = View(0, ("a", "b", "c")), torch.ones(2)
    rooted: dict[Any, bool] = {
        BroadcastFrom("call", called, [tensor], 0): True,
        ReduceTo("call", called, [tensor], "sum", 0): True,
        GatherTo("call", called, tensor, 0): True,
        ScatterFrom("call", called, tensor, [], 0): False,
    }
    for operation, has_successor in rooted.items():
        operation.sizes = np.array([[-1], [-1]])  # what both that are left know: it has died
        if has_successor:
            assert operation.root() == 0
        else:
            with pytest.raises(ViewChangedError, match="only rank 0 has a successor"):
                operation.root()
