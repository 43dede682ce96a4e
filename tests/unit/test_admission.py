"""What newcomers get of a state that is not the same at all members."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from meeting import Meeting
from one_rank import OneRank
from torch import nn

from chaos_mpi import TrainingState
from chaos_mpi.elastic.admission import LiveState
from chaos_mpi.elastic.alike import differing, tensors_of_rank_0

RANKS = 3


class Member(OneRank):
    """One of several."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__()
        self.meeting, self.place = meeting, rank
        self.shared: list[str] = []
        self._sequence.world.rank = rank
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(0.5)
        # Attached to no session, which would compare it between ranks.
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        self.state = TrainingState(model=net, optimizer=optimizer, best=torch.zeros(2), same=torch.ones(1), own=rank)
        self._persistence._state = self.state
        self.net = net

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.place, value)

    def share(self, label: str, tensors: Sequence[torch.Tensor], root: str | None = None) -> None:
        given = self.meeting.exchange(self.place, [tensor.clone() for tensor in tensors])
        for tensor, other in zip(tensors, given[0], strict=True):
            tensor.copy_(other)


def served(change: Any) -> list[tuple[Member, LiveState, dict[str, torch.Tensor]]]:
    """Each member, what it serves after ``change(member)``, and what of it is not its own."""
    meeting = Meeting(RANKS)
    members = [Member(meeting, rank) for rank in range(RANKS)]

    def serve(member: Member) -> tuple[Member, LiveState, dict[str, torch.Tensor]]:
        change(member)
        others = tensors_of_rank_0(member)
        return member, LiveState.of(member, others), others

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(serve, members))


def test_all_members_serve_the_buffers_of_rank_0_and_keep_their_own() -> None:
    def change(member: Member) -> None:
        with torch.no_grad():
            member.net(torch.randn(8, 2) + member.place)
        member.state.best += member.place

    result = served(change)
    _, first, _ = result[0]
    for member, state, others in result:
        assert set(others) == {"state.model.1.running_mean", "state.model.1.running_var", "state.extras.best"}
        assert state.layout.to_json() == first.layout.to_json()
        assert all(torch.equal(state.tensors[name], first.tensors[name]) for name in state.tensors)
        assert member.state.best.tolist() == [member.place] * 2
        assert torch.equal(state.tensors["state.model.1.running_mean"], member.net[1].running_mean) == (
            member.place == 0
        )


@pytest.mark.parametrize("differ", [False, True])
def test_what_optimizers_keep_is_of_rank_0_where_it_is_known_to_differ(differ: bool) -> None:
    def step(member: Member) -> None:
        member.optimizers_differ = differ
        for parameter in member.net.parameters():
            parameter.grad = torch.full_like(parameter, member.place + 1.0)
        optimizer = member.state.optimizers()[0]
        optimizer.step()
        for parameter in member.net.parameters():
            parameter.detach().fill_(0.5)

    result = served(step)
    assert len({member._persistence.digest() for member, _, _ in result}) == (1 if differ else RANKS)
    momenta = [torch.cat([t.flatten() for n, t in state.tensors.items() if "momentum" in n]) for _, state, _ in result]
    assert momenta[0].tolist() == [1.0] * len(momenta[0]) != []
    assert [momentum[0].item() for momentum in momenta] == ([1.0] * RANKS if differ else [1.0, 2.0, 3.0])
    own = [member.state.optimizers()[0].state[member.net[0].weight]["momentum_buffer"] for member, _, _ in result]
    assert [momentum[0, 0].item() for momentum in own] == [1.0, 2.0, 3.0]


def test_at_the_end_buffers_that_were_alike_after_each_step_are_so_again() -> None:
    meeting = Meeting(RANKS)
    members = [Member(meeting, rank) for rank in range(RANKS)]

    def end(member: Member) -> None:
        member.keep_alike(lambda: [member.net[1].running_mean])
        with torch.no_grad():
            member.net[1].running_mean += member.place + 1
            member.net[1].running_var += member.place
        member.state.best += member.place
        member._even_out()

    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(end, members))
    for member in members:
        assert member.net[1].running_mean.tolist() == [1.0] * 3
        assert member.net[1].running_var.tolist() == [1.0 + member.place] * 3, "it may differ"
        assert member.state.best.tolist() == [member.place] * 2


def test_nothing_is_shared_where_nothing_differs() -> None:
    for member, state, others in served(lambda member: member.net(torch.ones(4, 2))):
        assert not others
        assert state.tensors["state.model.1.running_mean"].data_ptr() == member.net[1].running_mean.data_ptr()


def test_what_differs_in_kind_or_is_not_everywhere_is_left_to_those_who_check_it() -> None:
    rows = [
        {"a": ["f [1]", "1"], "b": ["f [1]", "1"], "c": ["f [1]", "1"], "d": ["f [1]", "1"]},
        {"a": ["f [1]", "1"], "b": ["f [1]", "2"], "c": ["f [2]", "2"], "e": ["f [1]", "1"]},
    ]
    assert differing(rows) == ["b"]
    assert differing([{}, *rows]) == []
