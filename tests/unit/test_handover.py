"""A rank that joins in the middle of an epoch: from what it is told of the samples it does exactly its part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.elastic.handover import change_from_tree, change_to_tree, plan_from_tree, plan_to_tree
from chaos_mpi.elastic.partition import Change, EpochPlan
from chaos_mpi.elastic.sampler import ElasticSampler
from chaos_mpi.errors import ConfigError


class FakeSession:
    """As much of a session as the sampler sees."""

    def __init__(self, member: str, members: tuple[str, ...], initial_size: int, policy: str) -> None:
        self.member, self.members = member, members
        self.initial_size, self.batch_policy = initial_size, policy

    @property
    def expected_size(self) -> int:
        return len(self.members)

    def attach_sampler(self, sampler: ElasticSampler) -> None:
        pass


def make(n: int, length: int, batch: int, policy: str = "none", **options: Any) -> list[ElasticSampler]:
    members = tuple(f"m{i}" for i in range(n))
    return [ElasticSampler(length, batch, session=FakeSession(m, members, n, policy), **options) for m in members]


def session_of(sampler: ElasticSampler) -> FakeSession:
    assert isinstance(sampler._session, FakeSession)
    return sampler._session


def travel(tree: Any) -> Any:
    """The tree at the other end of a wire: JSON, and int64 tensors that are copies."""

    def pack(tensor: object) -> dict[str, Any]:
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype is torch.int64
        return {"a tensor": tensor.tolist()}

    def unpack(fields: dict[str, Any]) -> Any:
        return torch.tensor(fields["a tensor"], dtype=torch.int64) if "a tensor" in fields else fields

    return json.loads(json.dumps(tree, default=pack), object_hook=unpack)


def reports_of(samplers: Sequence[ElasticSampler]) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(sampler.report())) for sampler in samplers]


def change(samplers: Sequence[ElasticSampler]) -> None:
    """Only these are left, and what the others had is shared out anew."""
    reports, old = reports_of(samplers), session_of(samplers[0]).members
    new = tuple(session_of(sampler).member for sampler in samplers)
    for sampler in samplers:
        session_of(sampler).members = new
        sampler.apply_change(reports, old, new)


def join(samplers: Sequence[ElasticSampler], *names: str, explicitly: bool = False) -> list[ElasticSampler]:
    """Newcomers of these names, once they and all others have made the change."""
    reports, old = reports_of(samplers), session_of(samplers[0]).members
    trees = [travel(sampler.hand_over()) for sampler in samplers]
    assert all(str(tree) == str(trees[0]) for tree in trees), "it matters who is asked"
    one = samplers[0]
    newcomers = []
    for name, tree in zip(names, trees * len(names), strict=False):
        session = FakeSession(name, (name,), 1, session_of(one).batch_policy)
        newcomer = ElasticSampler(one._length, one.batch_size, session=session, drop_last=one.drop_last)
        if explicitly:
            newcomer.take_explicitly()
        newcomer.take_over(tree)
        session.initial_size = session_of(one).initial_size
        newcomers.append(newcomer)
    new = (*old, *names)
    for sampler in (*samplers, *newcomers):
        session_of(sampler).members = new
        sampler.apply_change(reports, old, new)
    return newcomers


def assert_same_plans(samplers: Sequence[ElasticSampler]) -> None:
    """All agree on who has what in all rounds that are not done."""
    first = samplers[0]
    plan, done = first._current_plan(), first.report()["done"]
    for other in samplers[1:]:
        theirs = other._current_plan()
        assert (theirs.epoch, theirs.rounds, other.report()["done"]) == (plan.epoch, plan.rounds, done)
        for round_ in range(done, plan.rounds):
            for member in session_of(first).members:
                np.testing.assert_array_equal(theirs.assignment(round_, member), plan.assignment(round_, member))
        assert str(other.state_dict()) == str(first.state_dict())
        assert str(travel(other.hand_over())) == str(travel(first.hand_over()))


# -- trees -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(0, 60), shuffle=st.booleans(), drop_last=st.booleans())
def test_a_plan_as_a_tree_is_the_same_plan(data: st.DataObject, length: int, shuffle: bool, drop_last: bool) -> None:
    members = [f"m{i}" for i in range(data.draw(st.integers(1, 4)))]
    plan = EpochPlan.fresh(
        epoch=2, seed=5, length=length, members=members, sizes=[3] * len(members), shuffle=shuffle, drop_last=drop_last
    )
    done = 0
    for i in range(data.draw(st.integers(0, 4), label="changes")):
        done = data.draw(st.integers(done, plan.rounds))
        horizon = data.draw(st.integers(done, min(done + 3, plan.rounds)))
        members = data.draw(st.lists(st.sampled_from([*members, f"n{i}"]), min_size=1, unique=True))
        plan = plan.after_change(done, horizon, members, [data.draw(st.integers(1, 4))] * len(members))
    again = plan_from_tree(travel(plan_to_tree(plan)))
    assert (again.rounds, again.first_round) == (plan.rounds, plan.first_round)
    for round_ in range(plan.first_round, plan.rounds):
        for member in ("m0", "m1", "m2", "m3", "n0", "n1", "n2", "n3"):
            np.testing.assert_array_equal(again.assignment(round_, member), plan.assignment(round_, member))
    following = [p.after_change(done, done + 1, ["x", *members], [2] * (len(members) + 1)) for p in (plan, again)]
    assert str(following[0].to_state(done)) == str(following[1].to_state(done))
    assert str(travel(plan_to_tree(again))) == str(travel(plan_to_tree(plan)))


def test_samples_travel_only_where_they_are_not_the_end_of_the_permutation() -> None:
    plan = EpochPlan.fresh(epoch=0, seed=0, length=1000, members=["a", "b"], sizes=[2, 2])
    tree = plan_to_tree(plan.after_change(3, 3, ["a", "b", "c"], [2, 2, 2]))
    assert [segment["pool"] for segment in tree["segments"]] == [None]
    tree = plan_to_tree(plan.after_change(3, 5, ["a"], [2]))
    assert [segment["pool"] is None for segment in tree["segments"]] == [True, False]
    assert len(tree["segments"][1]["pool"]) == 1000 - 3 * 4 - 2 * 2  # what a keeps of the two rounds is not in it


def test_a_plan_from_a_tree_does_not_share_its_samples() -> None:
    plan = EpochPlan.fresh(epoch=0, seed=0, length=20, members=["a", "b"], sizes=[2, 2])
    tree = plan_to_tree(plan.after_change(1, 2, ["a"], [2]))
    again = plan_from_tree(tree)
    before = again.assignment(2, "a").tolist()
    tree["segments"][1]["pool"].zero_()
    assert again.assignment(2, "a").tolist() == before
    with pytest.raises(ValueError, match="read-only"):
        again.assignment(2, "a")[0] = 0


def test_a_change_as_a_tree_is_the_same_change() -> None:
    here = Change(lap=3, epoch=2, old=("a", "b"), new=("b", "c"), done=4, horizon=7, seen=5, over=True)
    assert change_from_tree(travel(change_to_tree(here))) == here


# -- the whole way -----------------------------------------------------------------------------------------


class Rank:
    """A rank running a training script over some epochs. It stops at each collective operation."""

    def __init__(self, sampler: ElasticSampler, epochs: int, style: dict[str, Any], depth: int, steps: int = 0) -> None:
        self.sampler, self.depth = sampler, depth
        self.epoch = sampler.epoch
        self.steps = steps
        self.due = False  # all have agreed to negotiate at the next boundary
        self.waits_for = ""  # the operation it is in: "step 3", "settle 3", "evaluate 0", "close"
        self.program = self._script(epochs, **style)
        if depth:
            sampler.take_explicitly()

    def _batches(self) -> Iterator[list[int]]:
        """A loader that fetches up to ``depth`` batches ahead, as the real one does."""
        source = iter(self.sampler)
        if not self.depth:
            yield from source
            return
        waiting: list[list[int]] = []
        while True:
            while len(waiting) < self.depth and (batch := next(source, None)) is not None:
                waiting.append(batch)
            if not waiting:
                break
            self.sampler.take()
            yield waiting.pop(0)
        self.sampler.finish()

    def _script(self, epochs: int, accumulate: int, with_set_epoch: bool, flush: bool) -> Iterator[str]:
        for self.epoch in range(self.epoch, epochs):
            if with_set_epoch:
                self.sampler.set_epoch(self.epoch)
                yield ""
            # Counted from the last step: a loop that a death has made longer, and another one that a newcomer has just
            # begun, may be at different multiples of it.
            since_step = 0
            for i, batch in enumerate(self._batches(), start=1):
                since_step += 1
                yield ""
                assert self.sampler.epoch == self.epoch
                assert self.sampler.ghost_round() or self.sampler.in_flight()[-len(batch) :] == batch
                if self.due:  # a boundary is at the first forward pass after a finished step
                    self.due = False
                    yield f"settle {self.steps}"
                self.sampler.note_backward()
                if since_step == accumulate or (flush and i == len(self.sampler)):
                    yield f"step {self.steps}"
                    since_step = 0
            yield f"evaluate {self.epoch}"
        yield "close"

    def run(self, moves: int = 1000) -> None:
        """Go on for so many moves, or to the next operation."""
        while moves and not self.waits_for:
            moves -= 1
            self.waits_for = next(self.program)

    def leave_operation(self, due: bool = False) -> None:
        if self.waits_for.startswith("step"):
            self.sampler.commit()
            self.steps += 1
            self.due = due
        if self.waits_for != "close":
            self.waits_for = ""


class Job:
    """Ranks that die, leave and join while they train; of each epoch it is counted what was trained on."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = draw = data.draw
        self.length, self.epochs = draw(st.integers(0, 50), label="length"), draw(st.integers(1, 3), label="epochs")
        self.style = {
            "accumulate": draw(st.integers(1, 3), label="accumulate"),
            "with_set_epoch": draw(st.booleans(), label="with_set_epoch"),
            "flush": draw(st.sampled_from([True, True, False]), label="flush"),
        }
        policy = draw(st.sampled_from(["none", "keep_global_batch"]), label="policy")
        samplers = make(draw(st.integers(1, 4), label="n"), self.length, draw(st.integers(1, 5)), policy)
        self.alive = [Rank(s, self.epochs, self.style, self.depth()) for s in samplers]
        self.trained: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(self.epochs)}
        self.born = self.joined = 0

    def depth(self) -> int:
        return self.draw(st.integers(0, 4), label="prefetch")

    @property
    def samplers(self) -> list[ElasticSampler]:
        return [rank.sampler for rank in self.alive]

    def kill(self) -> bool:
        victims = self.draw(st.sets(st.integers(0, len(self.alive) - 1), max_size=len(self.alive) - 1), label="victims")
        self.alive = [rank for i, rank in enumerate(self.alive) if i not in victims]
        return bool(victims)

    def die_on_the_way(self) -> None:
        for rank in self.alive:
            rank.run(self.draw(st.integers(0, 6)))
        if self.kill():
            for rank in self.alive:
                rank.run()
            change(self.samplers)

    def operation(self, calm: bool) -> None:
        """Everybody comes to the next operation, and it is finished, by some a moment before others."""
        for rank in self.alive:
            rank.run()
        assert len({rank.waits_for for rank in self.alive}) == 1, "ranks are in different operations"
        what = self.alive[0].waits_for
        if what.startswith("settle"):
            self.settle()
            return
        used = [(t.lap, t.indices) for rank in self.alive for t in rank.sampler._in_flight]
        due = not calm and self.draw(st.booleans(), label="somebody proposes something")
        first: list[Rank] = []
        if not calm and self.draw(st.booleans(), label="finished by some first"):
            first = [rank for rank in self.alive if self.draw(st.booleans())] or self.alive[:1]
            for rank in first:
                rank.leave_operation(due)
                rank.run(self.draw(st.integers(0, 12)))  # ahead, perhaps into the next epoch
            before = len(self.alive)
            died = self.kill()
            if died and not any(rank in self.alive for rank in first):  # the result is lost with those who had it
                change(self.samplers)
                return
            for rank in self.alive:
                if rank not in first:
                    rank.leave_operation(due)
                elif died:
                    rank.run()
            if len(self.alive) < before:
                change(self.samplers)
        else:
            for rank in self.alive:
                rank.leave_operation(due)
        if what.startswith("step"):
            for lap, indices in used:
                self.trained[lap].update(indices)

    def settle(self) -> None:
        """A boundary at which members leave and newcomers come in."""
        # Who leaves says no more; what it has taken since the last step goes back.
        if self.draw(st.booleans(), label="leave") and self.kill():
            change(self.samplers)
        # A newcomer is not told of changes that the round at hand has seen already, by which the others decide whether
        # it is the last one, so here it does not come in such a round.
        one = self.alive[0].sampler
        changed = any(seen >= one.report()["taken"] for seen, _ in one._lengths)
        count = self.draw(st.integers(0, 2), label="newcomers") if len(self.alive) < 7 and not changed else 0
        if count:
            names = [f"n{self.born + i}" for i in range(count)]
            self.born += count
            depths = [self.depth() for _ in names]
            epoch, steps = self.alive[0].epoch, self.alive[0].steps
            newcomers = join(self.samplers, *names)
            self.joined += count
            assert_same_plans([*self.samplers, *newcomers])
            for sampler, depth in zip(newcomers, depths, strict=True):
                assert sampler.epoch == epoch
                self.alive.append(Rank(sampler, self.epochs, self.style, depth, steps))
        for rank in self.alive:
            rank.leave_operation()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_epoch_is_exact_whoever_joins_leaves_or_dies(data: st.DataObject) -> None:
    job = Job(data)
    guard = 0
    while any(rank.waits_for != "close" for rank in job.alive):
        guard += 1
        assert guard < 1000, "training does not end"
        calm = guard > 30  # then let it come to its end
        if not calm and data.draw(st.integers(0, 3), label="die on the way to the operation") == 0:
            job.die_on_the_way()
        job.operation(calm)
    for epoch, counts in job.trained.items():
        assert not counts or max(counts.values()) == 1
        if job.style["flush"] or job.style["accumulate"] == 1:
            assert sorted(counts) == list(range(job.length)), f"epoch {epoch}"
    assert len({rank.sampler.report()["done"] for rank in job.alive}) == 1
    assert_same_plans(job.samplers)


# -- cases -------------------------------------------------------------------------------------------------


def begun(n: int = 2, length: int = 40, batch: int = 2, ahead: int = 1, **options: Any) -> Any:
    """Samplers of a job that has made two steps, with so many rounds taken of the next; and their loops."""
    samplers = make(n, length, batch, **options)
    loops = [iter(sampler) for sampler in samplers]
    trained: list[int] = []
    for _ in range(2):
        for sampler, loop in zip(samplers, loops, strict=True):
            trained += next(loop)
            sampler.commit()
    for _ in range(ahead):
        for loop in loops:
            next(loop)
    return samplers, loops, trained


def test_a_newcomer_idles_in_rounds_that_were_handed_out_and_works_in_those_after() -> None:
    samplers, loops, trained = begun(ahead=3)
    (newcomer,) = join(samplers, "n")
    assert newcomer.report() == {"lap": 0, "epoch": 0, "done": 2, "taken": 2, "issued": 2, "ended": False}
    loop = iter(newcomer)
    for _ in range(3):
        assert next(loop)  # some sample, to keep in step
        assert newcomer.ghost_round()
        assert newcomer.step_is_ghost()
    assert len(next(loop)) == 2
    assert not newcomer.ghost_round()
    everybody = [*samplers, newcomer]
    for each in (*loops, loop):
        list(each)
    seen = trained + [i for sampler in everybody for i in sampler.in_flight()]
    assert sorted(seen) == list(range(40))


def test_the_length_of_the_loop_is_what_is_left_of_it() -> None:
    samplers, loops, _ = begun()
    (newcomer,) = join(samplers, "n")
    rounds = newcomer._current_plan().rounds
    loop = iter(newcomer)
    next(loop)
    # In the round of the change the length is as it was before at all; one that decides by it decides alike.
    assert len(newcomer) == len(samplers[0]) - 2 == 40 // 4 - 2
    next(loop)
    next(loops[0])
    assert len(newcomer) == len(samplers[0]) - 2 == rounds - 2
    assert 2 + sum(1 for _ in loop) == rounds - 2


def test_the_next_epoch_is_shared_with_the_newcomer() -> None:
    samplers, loops, _ = begun()
    (newcomer,) = join(samplers, "n")
    everybody = [*samplers, newcomer]
    for each in (*loops, iter(newcomer)):
        list(each)
    for sampler in everybody:
        sampler.commit()
    for sampler in everybody:
        sampler.set_epoch(1)
    assert_same_plans(everybody)
    seen = [i for sampler in everybody for batch in sampler for i in batch]
    assert sorted(seen) == list(range(40))


def test_a_newcomer_can_hand_over_what_it_took_over_and_outlive_the_others() -> None:
    samplers, _, trained = begun(ahead=2)
    (first,) = join(samplers, "n1")
    loop = iter(first)
    next(loop)
    (second,) = join([*samplers, first], "n2")
    change([first, second])
    assert_same_plans([first, second])
    for each in (loop, iter(second)):
        list(each)
    seen = trained + first.in_flight() + second.in_flight()
    assert sorted(seen) == list(range(40))


def test_changes_of_an_epoch_that_some_have_begun_are_handed_over() -> None:
    """A rank dies while some are in the next epoch; at the boundary there all know of it, the newcomer too."""
    samplers = make(3, 12, 2)
    for sampler in samplers:
        list(sampler)
        sampler.commit()
    next(iter(samplers[0]))
    change(samplers[:2])
    next(iter(samplers[1]))
    (newcomer,) = join(samplers[:2], "n")
    assert_same_plans([*samplers[:2], newcomer])
    assert newcomer.epoch == 1
    assert newcomer.hand_over()["changes"]["1"][0]["new"] == ["m0", "m1"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_seed_and_order_are_those_of_the_job(shuffle: bool) -> None:
    (before,) = make(1, 30, 2, seed=9, shuffle=shuffle)
    next(iter(before))
    before.commit()
    samplers = make(2, 30, 2, seed=4)
    for sampler in samplers:
        sampler.load_state_dict(before.state_dict())
        next(iter(sampler))
    (newcomer,) = join(samplers, "n")
    assert (newcomer.seed, newcomer.shuffle) == (9, shuffle)
    assert_same_plans([*samplers, newcomer])
    for sampler in (*samplers, newcomer):
        sampler.set_epoch(1)
    assert_same_plans([*samplers, newcomer])


def test_another_dataset_is_refused() -> None:
    samplers, _, _ = begun()
    other = make(1, 41, 2)[0]
    with pytest.raises(ConfigError, match="the others train on 40 samples, this dataset has 41"):
        other.take_over(travel(samplers[0].hand_over()))


# -- loops that begin somewhere else -----------------------------------------------------------------------


def joined_in_epoch_1() -> ElasticSampler:
    samplers = make(2, 20, 2)
    for sampler in samplers:
        sampler.set_epoch(1)
        next(iter(sampler))
    return join(samplers, "n")[0]


def test_a_loop_that_begins_before_the_epoch_of_the_job_is_refused_with_the_remedy() -> None:
    newcomer = joined_in_epoch_1()
    with pytest.raises(ConfigError) as caught:
        newcomer.set_epoch(0)
    for words in ("joined in epoch 1", "begins with epoch 0", "TrainingState(..., epoch=0)",
                  "for state.epoch in range(state.epoch, N)"):  # fmt: skip
        assert words in str(caught.value)


def test_a_loop_that_begins_in_the_epoch_of_the_job_goes_on_there() -> None:
    newcomer = joined_in_epoch_1()
    before = newcomer.report()
    newcomer.set_epoch(1)
    assert newcomer.report() == before
    rounds = newcomer._current_plan().rounds
    assert rounds > 1
    assert sum(1 for _ in newcomer) == rounds
    newcomer.set_epoch(0)  # later on everybody may go where they like
    assert newcomer.epoch == 0


def test_a_loop_without_set_epoch_goes_on_where_the_job_is() -> None:
    newcomer = joined_in_epoch_1()
    for _ in newcomer:
        assert newcomer.epoch == 1
    next(iter(newcomer))
    assert newcomer.epoch == 2


def test_joining_in_the_first_epoch_suits_any_loop() -> None:
    samplers, _, _ = begun()
    (newcomer,) = join(samplers, "n")
    newcomer.set_epoch(0)
    assert newcomer.report()["done"] == 2
