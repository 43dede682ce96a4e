from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.elastic.partition import EpochPlan, permutation
from chaos_mpi.elastic.scaling import member_batches


def fresh(length: int, sizes: Sequence[int], *, drop_last: bool = False, epoch: int = 0) -> EpochPlan:
    members = [f"m{i}" for i in range(len(sizes))]
    return EpochPlan.fresh(epoch=epoch, seed=3, length=length, members=members, sizes=sizes, drop_last=drop_last)


@dataclasses.dataclass
class Rank:
    """One member of the model cluster: it holds its own plan and what it was handed, as a real rank would."""

    name: str
    plan: EpochPlan
    depth: int  # how many rounds it fetches ahead
    taken: int
    issued: int
    handed: dict[int, np.ndarray]


class Cluster:
    """A cluster that trains one epoch in steps of ``accumulate`` rounds while members die and join."""

    def __init__(self, length: int, members: int, batch: int, policy: str, accumulate: int, drop_last: bool) -> None:
        self.policy, self.batch, self.initial, self.accumulate = policy, batch, members, accumulate
        sizes = member_batches(policy, batch, members, members)
        self.ranks = {f"m{i}": Rank(f"m{i}", fresh(length, sizes, drop_last=drop_last), 1, 0, 0, {})
                      for i in range(members)}  # fmt: skip
        self.done, self.trained, self.born = 0, Counter[int](), members
        self.largest = sum(sizes)

    @property
    def plan(self) -> EpochPlan:
        return next(iter(self.ranks.values())).plan

    def step_end(self) -> int:
        return min(self.done + self.accumulate, self.plan.rounds)

    def advance(self, rank: Rank, moves: int) -> None:
        for _ in range(moves):
            if rank.issued < min(rank.plan.rounds, rank.taken + rank.depth):
                rank.handed[rank.issued] = rank.plan.assignment(rank.issued, rank.name)
                rank.issued += 1
            elif rank.taken < min(rank.issued, self.step_end()):
                rank.taken += 1

    def finish_step(self) -> None:
        """Everybody gets to the end of the step, and its gradients are averaged."""
        end = self.step_end()
        for rank in self.ranks.values():
            while rank.taken < end:
                self.advance(rank, 1)
            for round_ in range(self.done, end):
                np.testing.assert_array_equal(rank.handed[round_], rank.plan.assignment(round_, rank.name))
                self.trained.update(rank.handed[round_].tolist())
        self.done = end

    def change(self, dying: set[str], joining: int) -> None:
        """The dead lose the step in flight; the rest work out the next plan, each for itself."""
        self.ranks = {name: rank for name, rank in self.ranks.items() if name not in dying}
        horizon = max(rank.issued for rank in self.ranks.values())
        survivors = [*self.ranks, *(f"m{self.born + i}" for i in range(joining))]
        self.born += joining
        sizes = member_batches(self.policy, self.batch, self.initial, len(survivors))
        self.largest = max(self.largest, sum(sizes))
        for rank in self.ranks.values():
            rank.plan = rank.plan.after_change(self.done, horizon, survivors, sizes)
        for name in survivors[len(self.ranks) :]:
            self.ranks[name] = Rank(name, self.plan, 1, self.done, self.done, {})

    def check_agreement(self) -> None:
        plans = [rank.plan for rank in self.ranks.values()]
        for plan in plans[1:]:
            assert plan.rounds == plans[0].rounds
            for round_ in range(self.done, plan.rounds):
                for name in self.ranks:
                    np.testing.assert_array_equal(plan.assignment(round_, name), plans[0].assignment(round_, name))


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_every_sample_is_trained_exactly_once_whatever_dies(data: st.DataObject) -> None:
    draw = data.draw
    length = draw(st.integers(0, 90), label="length")
    drop_last = draw(st.booleans(), label="drop_last")
    policy = draw(st.sampled_from(["keep_global_batch", "none"]), label="policy")
    cluster = Cluster(
        length, draw(st.integers(1, 6)), draw(st.integers(1, 7)), policy, draw(st.integers(1, 3)), drop_last
    )
    for rank in cluster.ranks.values():
        rank.depth = draw(st.integers(1, 5), label="prefetch")
    guard = 0
    while cluster.done < cluster.plan.rounds:
        guard += 1
        assert guard < 400, "the epoch does not end"
        for rank in cluster.ranks.values():
            cluster.advance(rank, draw(st.integers(0, 8), label="moves"))
        event = draw(st.sampled_from(["finish", "finish", "die", "finish+die", "join"])) if guard < 40 else "finish"
        if event in ("finish", "finish+die"):
            cluster.finish_step()
        if event in ("die", "finish+die"):
            names = sorted(cluster.ranks)
            dying = draw(st.sets(st.sampled_from(names), max_size=len(names) - 1), label="dying")
            cluster.change(dying, draw(st.integers(0, 1)) if len(cluster.ranks) < 8 else 0)
            cluster.check_agreement()
        elif event == "join" and len(cluster.ranks) < 8:
            cluster.change(set(), 1)
    counts = cluster.trained
    assert not counts or max(counts.values()) == 1
    assert set(counts) <= set(range(length))
    if drop_last:
        assert length - len(counts) < cluster.largest
    else:
        assert len(counts) == length


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(0, 200),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    drop_last=st.booleans(),
)
def test_a_fresh_plan(length: int, sizes: list[int], drop_last: bool) -> None:
    plan = fresh(length, sizes, drop_last=drop_last)
    members, batch = plan.segments[0].members, sum(sizes)
    seen = [plan.assignment(r, m) for r in range(plan.rounds) for m in members]
    flat = np.concatenate(seen).tolist() if seen else []
    used = length // batch * batch if drop_last else length
    assert flat == permutation(length, 3, 0, True)[:used].tolist()  # rank after rank, in the order of the pool
    for round_ in range(plan.rounds):
        got = [len(plan.assignment(round_, m)) for m in members]
        if round_ < plan.rounds - 1 or sum(got) == batch:
            assert got == list(sizes)
        else:
            assert max(got) - min(got) <= 1
            assert got == sorted(got, reverse=True)
        assert min(got) >= 1 or length < len(sizes)  # a member goes empty only if there never was enough


def test_a_small_remainder_joins_the_last_full_round() -> None:
    plan = fresh(12, [2, 2])
    assert [len(plan.assignment(r, "m0")) for r in range(plan.rounds)] == [2, 2, 2]
    plan = fresh(10, [2, 2])  # a round of single samples would be no good to BatchNorm
    assert [len(plan.assignment(r, "m0")) for r in range(plan.rounds)] == [2, 3]
    plan = fresh(5, [1, 1])
    assert [[len(plan.assignment(r, m)) for m in ("m0", "m1")] for r in range(plan.rounds)] == [[1, 1], [2, 1]]
    plan = fresh(9, [2, 2])
    assert [[len(plan.assignment(r, m)) for m in ("m0", "m1")] for r in range(plan.rounds)] == [
        [2, 2],
        [3, 2],
    ]
    assert fresh(9, [2, 2], drop_last=True).rounds == 2


def test_ghost_round() -> None:
    plan = fresh(2, [4, 4, 4])
    assert plan.rounds == 1
    assert [len(plan.assignment(0, m)) for m in ("m0", "m1", "m2")] == [1, 1, 0]


def test_departed_samples_come_first_in_the_new_segment() -> None:
    plan = fresh(40, [2, 2, 2])
    lost = np.concatenate([plan.assignment(r, "m1") for r in (2, 3)])
    changed = plan.after_change(2, 4, ["m0", "m2"], [3, 3])
    np.testing.assert_array_equal(changed.assignment(3, "m2"), plan.assignment(3, "m2"))
    assert len(changed.assignment(3, "m1")) == 0
    np.testing.assert_array_equal(changed.assignment(4, "m0"), lost[:3])
    assert changed.segments[-1].pool[4:].tolist() == permutation(40, 3, 0, True)[24:].tolist()


def test_done_segments_are_forgotten() -> None:
    plan = fresh(10_000, [2, 2, 2])
    for i in range(50):
        plan = plan.after_change(i * 3, i * 3 + 1, ["m0", "m1", f"x{i}"], [2, 2, 2])
        assert len(plan.segments) <= 3
    with pytest.raises(IndexError, match="not in the plan"):
        plan.assignment(0, "m0")
    with pytest.raises(IndexError):
        plan.assignment(plan.rounds, "m0")


def test_a_finished_epoch_stays_finished() -> None:
    plan = fresh(11, [4, 4], drop_last=True)  # 3 left over: enough for one rank with a batch of 2, but too late
    assert plan.after_change(plan.rounds, plan.rounds, ["m0"], [2]).rounds == plan.rounds
    values, rest = plan.to_state(plan.rounds)
    assert EpochPlan.from_state(values, rest, ["m0"], [2]).rounds == plan.rounds


def test_change_before_anything_was_handed_out_is_a_fresh_plan() -> None:
    plan = fresh(50, [4, 4]).after_change(0, 0, ["m1"], [8])
    assert plan.rounds == 7
    assert len(plan.segments) == 1
    np.testing.assert_array_equal(plan.assignment(0, "m1"), permutation(50, 3, 0, True)[:8])
    assert plan.to_state(2)[0]["offset"] == 16


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    length=st.integers(0, 80),
    n=st.integers(1, 4),
    batch=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_state_goes_on_with_exactly_what_is_left(
    data: st.DataObject, length: int, n: int, batch: int, drop_last: bool
) -> None:
    plan = fresh(length, [batch] * n, drop_last=drop_last)
    members = list(plan.segments[0].members)
    trained: list[int] = []
    done = 0
    for _ in range(data.draw(st.integers(0, 3))):
        upto = data.draw(st.integers(done, plan.rounds))
        trained += [int(i) for r in range(done, upto) for m in members for i in plan.assignment(r, m)]
        done = upto
        horizon = data.draw(st.integers(done, min(done + 3, plan.rounds)))
        members = data.draw(st.lists(st.sampled_from(members), min_size=1, unique=True))
        plan = plan.after_change(done, horizon, members, [batch] * len(members))
    finished = done == plan.rounds
    values, rest = plan.to_state(done)
    values = json.loads(json.dumps(values))
    others = [f"n{i}" for i in range(data.draw(st.integers(1, 4)))]
    resumed = EpochPlan.from_state(values, rest, others, [2] * len(others))
    assert resumed.first_round == done
    assert not (finished and resumed.rounds > done)
    trained += [int(i) for r in range(done, resumed.rounds) for m in others for i in resumed.assignment(r, m)]
    assert len(set(trained)) == len(trained)
    if drop_last:
        assert length - len(trained) < max(2 * len(others), batch * n)
    else:
        assert sorted(trained) == list(range(length))


def test_state_is_compact_while_nothing_changed() -> None:
    plan = fresh(1000, [4, 4, 4])
    values, rest = plan.to_state(7)
    assert rest is None
    assert values["offset"] == 84
    resumed = EpochPlan.from_state(values, rest, ["a", "b"], [6, 6])
    assert resumed.to_state(8)[0]["offset"] == 96
    values, rest = plan.after_change(7, 8, ["m0", "m2"], [6, 6]).to_state(7)
    assert values["offset"] is None
    assert rest is not None
    assert len(rest) == 1000 - 84


def test_bad_states_are_refused() -> None:
    values, _ = fresh(20, [2, 2]).to_state(1)
    with pytest.raises(ValueError, match="either"):
        EpochPlan.from_state(values, np.arange(3), ["a"], [1])
    values["offset"] = None
    with pytest.raises(ValueError, match="distinct"):
        EpochPlan.from_state(values, np.array([1, 1]), ["a"], [1])
    with pytest.raises(ValueError, match="distinct"):
        EpochPlan.from_state(values, np.array([20]), ["a"], [1])
    with pytest.raises(ValueError, match="negative"):
        EpochPlan.from_state({**values, "done": -1}, np.array([1]), ["a"], [1])


def test_bad_members_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        EpochPlan.fresh(epoch=0, seed=0, length=5, members=["a", "a"], sizes=[1, 1])
    with pytest.raises(ValueError, match="batch size"):
        fresh(5, [2, 1]).after_change(0, 0, ["m0"], [0])


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    orders = {(s, e): permutation(100, s, e, True).tolist() for s in range(3) for e in range(3)}
    assert len({tuple(order) for order in orders.values()}) == 9
    assert permutation(100, 1, 2, True).tolist() == orders[1, 2]
    assert permutation(5, 1, 2, False).tolist() == [0, 1, 2, 3, 4]


def test_a_change_makes_no_object_for_each_sample() -> None:
    length = 1_000_000
    plan = EpochPlan.fresh(epoch=0, seed=0, length=length, members=list("abcd"), sizes=[8] * 4)
    tracemalloc.start()
    try:
        plan.after_change(10, 14, list("abd"), [8] * 3).after_change(14, 15, list("ab"), [8] * 2)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 8 * length, "a Python integer alone takes 28 bytes"
