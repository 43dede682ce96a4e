"""Process sets of Horovod's interface, with a session in which members come and go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chaos_mpi.elastic import subgroup
from chaos_mpi.elastic.subgroup import Subgroup
from chaos_mpi.errors import GroupBrokenError, PeerFailedError
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch import optimizer as optimizers
from chaos_mpi.horovod.torch import process_sets
from chaos_mpi.horovod.torch.optimizer import DistributedOptimizer
from chaos_mpi.horovod.torch.process_sets import ProcessSet, add_process_set
from chaos_mpi.membership import View


class FakeWorld:
    """A communicator that notes what is made of it."""

    def __init__(self) -> None:
        self.rank = 0
        self.made: list[list[int]] = []
        self.fails = self.revoked = False

    def subset(self, ranks: list[int], tag: int, limit_s: float) -> FakeWorld:
        if self.fails:
            raise PeerFailedError("died")
        self.made.append(list(ranks))
        return self

    def revoke(self) -> None:
        self.revoked = True


@dataclasses.dataclass
class FakeSession:
    """Of member b; what comes later is seen when all calls are settled."""

    members: tuple[str, ...] = ("a", "b", "c", "d")
    later: tuple[str, ...] = ("a", "b", "c", "d")
    member: str = "b"
    awaits_entry: bool = False
    world: FakeWorld = dataclasses.field(default_factory=FakeWorld)

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def settings(self) -> Any:
        return type("Settings", (), {"timeout_s": 1.0})

    def ready_for_subgroup(self) -> tuple[Any, View]:
        self.members = self.later
        return self.world, View(1, self.members)

    def attend(self) -> None:
        pass


class FakeJob:
    """The job of that member."""

    is_alone = False

    def __init__(self, session: FakeSession) -> None:
        self.session = session

    @property
    def members(self) -> tuple[str, ...]:
        return self.session.members

    @property
    def rank(self) -> int:
        return self.members.index(self.session.member)

    def gather(self, what: str, row: torch.Tensor) -> tuple[list[Any], tuple[str, ...]]:
        return [int(row)] * self.session.size, self.session.members

    def new_queue(self, group: Any) -> Any:
        return type("Queue", (), {"group": group})()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSession]:
    here = FakeSession()
    for module in (process_sets, optimizers):
        monkeypatch.setattr(module, "job", lambda: FakeJob(here))
    yield here
    process_sets._sets.clear()


def test_ranks_of_a_set_are_those_of_its_members_after_a_recovery(session: FakeSession) -> None:
    session.later = ("b", "c", "d")
    made = add_process_set([1, 2])
    assert session.world.made == [[0, 1]]
    assert (made.size(), made.rank()) == (2, 0)


def test_a_set_one_of_which_has_died_is_refused(session: FakeSession) -> None:
    session.later = ("a", "b", "d")
    with pytest.raises(HorovodInternalError, match="c has died"):
        add_process_set([1, 2])
    session.members = session.later = ("a", "b", "c", "d")
    session.world.fails = True
    with pytest.raises(HorovodInternalError, match="while it was made"):
        add_process_set([1, 2])


def test_a_group_that_is_given_up(session: FakeSession) -> None:
    group = Subgroup(session, ["b", "c"], 1, 1.0)  # type: ignore[arg-type]
    group.give_up()
    assert session.world.revoked
    with pytest.raises(GroupBrokenError, match="was given up"):
        group.execute(subgroup.Operation)  # type: ignore[arg-type]


def set_and_optimizer(param: torch.nn.Parameter, ranks: list[int]) -> tuple[ProcessSet, torch.optim.Optimizer]:
    made = add_process_set(ranks)
    return made, DistributedOptimizer(torch.optim.SGD([param], lr=0.1), process_set=made)


def test_an_optimizer_whose_set_has_ended_takes_no_step(session: FakeSession) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    _, optimizer = set_and_optimizer(param, [0, 2])
    param.sum().backward()
    optimizer.step()  # this rank is not in it, and steps by itself
    stepped = param.detach().clone()
    assert not torch.equal(stepped, torch.ones(2))
    session.world.free = session.world.is_broken = lambda: False  # type: ignore[attr-defined]
    process_sets.forget()
    optimizer.zero_grad()
    param.sum().backward()
    for take in (optimizer.step, optimizer.synchronize):  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"has ended.*elastic.run.*Make the set, and an optimizer"):
            take()
    assert torch.equal(param, stepped)
    # The one that takes its place has the same parameters.
    _, optimizer = set_and_optimizer(param, [0, 3])
    for _ in range(3):
        optimizer.zero_grad()
        param.sum().backward()
        optimizer.step()


def test_an_optimizer_of_a_process_that_joins_takes_no_step(session: FakeSession) -> None:
    session.awaits_entry = True
    param = torch.nn.Parameter(torch.ones(2))
    _, optimizer = set_and_optimizer(param, [1, 2])
    param.sum().backward()
    with pytest.raises(ValueError, match="joins a running job makes its sets"):
        optimizer.step()
    assert torch.equal(param, torch.ones(2))


def test_a_gradient_that_is_not_reduced_is_refused(session: FakeSession) -> None:
    frozen, param = torch.nn.Parameter(torch.ones(2), requires_grad=False), torch.nn.Parameter(torch.ones(3))
    made = add_process_set([1, 2])
    optimizer = DistributedOptimizer(torch.optim.SGD([frozen, param], lr=0.1), process_set=made)
    assert optimizer._takes_part()  # type: ignore[attr-defined]
    frozen.requires_grad_(True)
    (frozen.sum() + param.sum()).backward()
    for take in (optimizer.step, optimizer.synchronize):  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"shape \(2,\) has a gradient that is not reduced"):
            take()
    with optimizer.skip_synchronize(), pytest.raises(ValueError, match="not reduced"):  # type: ignore[attr-defined]
        optimizer.step()
    assert torch.equal(frozen, torch.ones(2))
