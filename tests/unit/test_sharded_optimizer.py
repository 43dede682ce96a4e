"""Who keeps which part of a sharded optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from meeting import Meeting

from chaos_mpi.torch.sharded_optimizer import ShardedOptimizer, assigned, only_with, split


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 8))
def test_every_parameter_is_in_one_part(sizes: list[int], parts: int) -> None:
    made = split(sizes, parts)
    assert sorted(index for part in made for index in part) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in part) for part in made]
    assert max(totals) - min(totals) <= max(sizes, default=0)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 8))
def test_every_node_keeps_every_part_once(nodes: list[str], parts: int) -> None:
    node_of = {f"m{i}": node for i, node in enumerate(nodes)}
    wanted = assigned(node_of, parts)
    for node in set(nodes):
        kept = sorted(n for member, numbers in wanted.items() if node_of[member] == node for n in numbers)
        assert kept == list(range(parts))
        loads = [len(wanted[m]) for m in node_of if node_of[m] == node]
        assert max(loads) - min(loads) <= 1


@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=6), st.sets(st.integers(0, 5)))
def test_what_only_those_keep_who_leave(rows: list[set[int]], places: set[int]) -> None:
    kept = {f"m{i}": numbers for i, numbers in enumerate(rows)}
    leaving = [f"m{i}" for i in places]
    staying = set().union(*(numbers for member, numbers in kept.items() if member not in leaving))
    assert only_with(kept, leaving) == sorted(set().union(*rows) - staying)


class FakeSession:
    """Of one member, which is a thread."""

    def __init__(self, meeting: Meeting, members: Sequence[str], member: str) -> None:
        self.members, self.member, self.step = tuple(members), member, 0
        self._meeting = meeting
        self.before_leaves: list[Callable[[tuple[str, ...]], None]] = []

    def on_leave(self, hand_over: Callable[[tuple[str, ...]], None]) -> None:
        self.before_leaves.append(hand_over)

    def gather_with_contributors(self, value: Any) -> tuple[list[Any], tuple[str, ...]]:
        return self._meeting.exchange(self.members.index(self.member), value), self.members

    def without(self, gone: str, meeting: Meeting) -> None:
        """This one has left."""
        self.members = tuple(member for member in self.members if member != gone)
        self._meeting = meeting


class Sharded(ShardedOptimizer):
    """Gets what others give without MPI."""

    def _gathered(self, call: str, data: bytes) -> dict[str, bytes]:
        rows, members = self._session.gather_with_contributors(data)
        return dict(zip(members, rows, strict=True))


def test_what_a_rank_that_leaves_keeps_goes_on_with_the_others() -> None:
    members, gone = ("a:1", "a:2", "a:3"), "a:2"
    before, after = Meeting(3), Meeting(2)

    def params() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.full((4,), float(i))) for i in range(3)]

    def step(optimizer: torch.optim.Optimizer, number: int) -> None:
        for index, param in enumerate(optimizer.param_groups[0]["params"]):
            param.grad = torch.full((4,), float(index + number))
        optimizer.step()

    def train(member: str) -> tuple[list[torch.Tensor], tuple[int, ...]]:
        session: Any = FakeSession(before, members, member)
        mine = params()
        optimizer = Sharded(mine, torch.optim.AdamW, session=session, lr=0.1)
        for number in range(4):
            step(optimizer, number)
            if number == 1:
                for hand_over in session.before_leaves:
                    hand_over((gone,))
                if member == gone:
                    break
                session.without(gone, after)
        return mine, optimizer.kept

    plain = params()
    reference = torch.optim.AdamW(plain, lr=0.1)
    for number in range(4):
        step(reference, number)
    with ThreadPoolExecutor(3) as pool:
        (first, kept_first), (_, kept_by_gone), (last, kept_last) = pool.map(train, members)
    assert len(kept_by_gone) == 1
    assert sorted(kept_first + kept_last) == [0, 1, 2]
    for one, other, expected in zip(first, last, plain, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)
