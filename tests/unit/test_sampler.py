from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.elastic.sampler import ElasticSampler
from chaos_mpi.errors import ConfigError


class FakeSession:
    """As much of a session as the sampler sees."""

    def __init__(self, member: str, members: tuple[str, ...], policy: str = "none") -> None:
        self.member = member
        self.members = members
        self.initial_size = len(members)
        self.batch_policy = policy
        self.samplers: list[ElasticSampler] = []

    @property
    def expected_size(self) -> int:
        return len(self.members)

    def attach_sampler(self, sampler: ElasticSampler) -> None:
        self.samplers.append(sampler)


def make(n: int, length: int, batch: int, policy: str = "none", **options: Any) -> list[ElasticSampler]:
    members = tuple(f"m{i}" for i in range(n))
    return [ElasticSampler(length, batch, session=FakeSession(m, members, policy), **options) for m in members]


def session_of(sampler: ElasticSampler) -> FakeSession:
    assert isinstance(sampler._session, FakeSession)
    return sampler._session


def change(samplers: list[ElasticSampler]) -> None:
    """What the session does on the survivors ``samplers`` after they have adopted the last finished step."""
    reports = [json.loads(json.dumps(sampler.report())) for sampler in samplers]
    new = tuple(session_of(sampler).member for sampler in samplers)
    for sampler in samplers:
        sampler.apply_change(reports, session_of(sampler).members, new)
        session_of(sampler).members = new


def test_what_was_fetched_and_never_trained_on_comes_again() -> None:
    (one,) = make(1, 12, 4)
    first = next(iter(one))
    batches = iter(one)
    assert next(batches) == first
    one.note_backward()
    one.commit()
    again = iter(one)
    assert next(again) != first
    assert len(one) == 2


@pytest.mark.parametrize("policy", ["keep_global_batch", "none"])
def test_a_process_that_is_to_join_knows_how_long_an_epoch_is(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = make(4, 6400, 16, policy)
    (newcomer,) = make(1, 6400, 16, policy)
    session_of(newcomer).initial_size = 4
    monkeypatch.setattr(FakeSession, "expected_size", 4)
    assert len(newcomer) == len(members[0]) == 100


class Rank:
    """A rank running a training script over some epochs. It stops at each collective operation."""

    def __init__(self, sampler: ElasticSampler, epochs: int, style: dict[str, Any], depth: int) -> None:
        self.sampler = sampler
        self.depth = depth
        self.waits_for = ""  # the operation it is in: "step 3", "evaluate 0", "close"
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
        steps = 0
        for epoch in range(epochs):
            if with_set_epoch:
                self.sampler.set_epoch(epoch)
                yield ""
            for i, batch in enumerate(self._batches(), start=1):
                yield ""
                assert self.sampler.epoch == epoch
                assert self.sampler.ghost_round() or self.sampler.in_flight()[-len(batch) :] == batch
                self.sampler.note_backward()
                if i % accumulate == 0 or (flush and i == len(self.sampler)):
                    yield f"step {steps}"
                    steps += 1
            yield f"evaluate {epoch}"
        yield "close"

    def run(self, moves: int = 1000) -> None:
        """Go on for so many moves, or to the next operation."""
        while moves and not self.waits_for:
            moves -= 1
            self.waits_for = next(self.program)

    def leave_operation(self) -> None:
        if self.waits_for.startswith("step"):
            self.sampler.commit()
        if self.waits_for != "close":
            self.waits_for = ""


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_epoch_is_exact_whatever_dies_and_when(data: st.DataObject) -> None:
    """A cluster of ranks that each run a script; kills strike in any phase, also when some are an epoch ahead.

    As in the session, a death is dealt with when every survivor is in an operation, and survivors that are
    one operation behind adopt its result if any survivor has it.
    """
    draw = data.draw
    length, epochs = draw(st.integers(0, 60), label="length"), draw(st.integers(1, 3), label="epochs")
    style = {
        "accumulate": draw(st.integers(1, 3), label="accumulate"),
        "with_set_epoch": draw(st.booleans(), label="with_set_epoch"),
        "flush": draw(st.sampled_from([True, True, False]), label="flush"),
    }
    policy = draw(st.sampled_from(["none", "keep_global_batch"]), label="policy")
    samplers = make(draw(st.integers(1, 5), label="n"), length, draw(st.integers(1, 6), label="batch"), policy)
    alive = [Rank(s, epochs, style, draw(st.integers(0, 4), label="prefetch")) for s in samplers]
    trained: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(epochs)}

    def kill() -> None:
        victims = draw(st.sets(st.integers(0, len(alive) - 1), max_size=len(alive) - 1), label="victims")
        alive[:] = [rank for i, rank in enumerate(alive) if i not in victims]

    guard = 0
    while any(rank.waits_for != "close" for rank in alive):
        guard += 1
        assert guard < 1000, "training does not end"
        calm = guard > 40  # then let it come to its end
        if not calm and draw(st.booleans(), label="die on the way to the operation"):
            for rank in alive:
                rank.run(draw(st.integers(0, 6)))
            kill()
            for rank in alive:
                rank.run()
            change([rank.sampler for rank in alive])
        for rank in alive:
            rank.run()
        assert len({rank.waits_for for rank in alive}) == 1, "ranks are in different operations"
        used = [(t.lap, t.indices) for rank in alive for t in rank.sampler._in_flight]
        is_step = alive[0].waits_for.startswith("step")
        left: list[Rank] = []
        before = len(alive)
        if not calm and draw(st.booleans(), label="finished by some first"):
            left = [alive[i] for i in sorted(draw(st.sets(st.integers(0, before - 1), min_size=1), label="first"))]
            for rank in left:
                rank.leave_operation()
                rank.run(draw(st.integers(0, 12)))  # ahead, perhaps into the next epoch
            kill()
            if not any(rank in alive for rank in left):  # the result is lost with those who had it
                change([rank.sampler for rank in alive])
                continue
        for rank in alive:
            if rank not in left:
                rank.leave_operation()
            elif len(alive) < before:
                rank.run()
        if len(alive) < before:
            change([rank.sampler for rank in alive])
        if is_step:
            for lap, indices in used:
                trained[lap].update(indices)
    for epoch in range(epochs):
        counts = trained[epoch]
        assert not counts or max(counts.values()) == 1
        if style["flush"] or style["accumulate"] == 1:
            assert sorted(counts) == list(range(length)), f"epoch {epoch}"
    assert len({rank.sampler.report()["done"] for rank in alive}) == 1


def test_a_death_in_the_middle() -> None:
    a, b, c = make(3, 30, 2)
    loops = [iter(s) for s in (a, b, c)]
    first = [next(loop) for loop in loops]
    assert a.in_flight() == first[0]
    for sampler in (a, b, c):
        sampler.commit()
    lost = next(loops[2])
    kept = [next(loops[0]), next(loops[1])]
    change([a, b])
    assert [a.in_flight(), b.in_flight()] == kept
    assert [*next(loops[0]), *next(loops[1])][:2] == lost  # the first to be shared out anew
    assert len(a) == len(b) == 2 + 5  # two were had, and 20 samples are left for two


def test_going_on_to_the_next_epoch_without_set_epoch() -> None:
    (sampler,) = make(1, 10, 3, seed=5)
    assert len(sampler) == 3  # of 3, 3, and 4 samples
    first = list(sampler)
    assert sorted(i for batch in first for i in batch) == list(range(10))
    assert len(sampler) == 3
    second = list(sampler)
    assert sampler.epoch == 1
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(0)  # once complete, the same number means: again
    assert list(sampler) == first


def test_breaking_off_and_going_on() -> None:
    (sampler,) = make(1, 10, 2, shuffle=False)
    for batch in sampler:
        if batch[0] == 4:  # not trained on
            break
        sampler.note_backward()
        sampler.commit()
    assert list(sampler) == [[4, 5], [6, 7], [8, 9]]
    for _ in sampler:
        break
    sampler.set_epoch(7)
    assert sum(len(batch) for batch in sampler) == 10
    assert sampler.epoch == 7


def test_breaking_off_at_the_last_batch_completes_the_epoch() -> None:
    (sampler,) = make(1, 6, 2)
    for i, _ in enumerate(sampler, start=1):
        if i == len(sampler):
            break
    assert sum(len(batch) for batch in sampler) == 6
    assert sampler.epoch == 1


def test_an_old_iteration_is_refused() -> None:
    (sampler,) = make(1, 10, 2)
    old = iter(sampler)
    iter(sampler)
    with pytest.raises(RuntimeError, match="another was begun"):
        next(old)
    old = iter(sampler)
    sampler.set_epoch(3)
    with pytest.raises(RuntimeError, match="epoch changed"):
        next(old)


def test_ghosts() -> None:
    a, b = make(2, 3, 1)
    loop_a, loop_b = iter(a), iter(b)
    assert len(a) == 1  # a remainder of one would leave a rank without work: it joins the round
    assert (len(next(loop_a)), len(next(loop_b))) == (2, 1)
    c, d = make(2, 1, 4)
    loop_c, loop_d = iter(c), iter(d)
    assert next(loop_c) == [0]
    assert next(loop_d) == [0, 0]  # a stand-in is large enough for BatchNorm
    assert not c.ghost_round()
    assert not c.step_is_ghost()
    assert d.ghost_round()
    assert d.step_is_ghost()
    assert d.in_flight() == []
    d.commit()
    assert d.step_is_ghost()  # a second step over the same batch
    assert next(loop_d, None) is None
    assert not d.ghost_round()
    assert not d.step_is_ghost()


def test_an_accumulated_step_counts_if_any_of_its_batches_does() -> None:
    _, b = make(2, 5, 2)  # rounds of 2 + 2 and, m0 being alone to have a sample, of 3 + 2
    assert len(b) == 1
    _, b = make(2, 1, 2)
    loop = iter(b)
    next(loop)
    assert b.ghost_round()
    assert b.step_is_ghost()
    b.set_epoch(1)  # the stand-in is still part of the step, and so is what comes now
    b._length = 8
    next(iter(b))
    assert not b.ghost_round()
    assert not b.step_is_ghost()


def test_commit_takes_all_batches_of_an_accumulated_step() -> None:
    (sampler,) = make(1, 12, 2)
    loop = iter(sampler)
    used = [*next(loop), *next(loop)]
    assert sampler.report()["done"] == 0
    assert sampler.in_flight() == used
    sampler.commit()
    assert sampler.report() == {"lap": 0, "epoch": 0, "done": 2, "taken": 2, "issued": 2, "ended": False}


@pytest.mark.parametrize("kill_first", [False, True])
@pytest.mark.parametrize("others", [1, 2, 3])
def test_resume_from_state(kill_first: bool, others: int) -> None:
    samplers = make(3, 50, 3, seed=9)
    seen: list[int] = []
    loops = [iter(s) for s in samplers]
    for _ in range(3):
        for sampler, loop in zip(samplers, loops, strict=True):
            next(loop)
            seen += sampler.in_flight()
            sampler.commit()
    for loop in loops:
        next(loop)  # in flight when the state is taken: not part of it
    if kill_first:
        samplers.pop(1)
        change(samplers)
    states = [s.state_dict() for s in samplers]
    for state in states:
        assert all(isinstance(v, int | str | list) or v.dtype == torch.int64 for v in state.values())
        assert str(state) == str(states[0])
    assert ("remaining" in states[0]) == kill_first
    resumed = make(others, 50, 3, seed=1)
    for sampler in resumed:
        sampler.load_state_dict(states[0])
        sampler.set_epoch(0)
        assert sampler.seed == 9
        for _ in sampler:
            seen += sampler.in_flight()
            sampler.commit()
    assert sorted(seen) == list(range(50))


def test_resume_from_a_complete_epoch_goes_on_with_the_next() -> None:
    (sampler,) = make(1, 8, 2)
    for _ in sampler:
        sampler.commit()
    (resumed,) = make(1, 8, 2)
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(0)
    assert list(resumed) == []
    assert len(list(resumed)) == 4
    assert resumed.epoch == 1


def test_state_of_a_sampler_that_was_not_used() -> None:
    (sampler,) = make(1, 8, 2, seed=4)
    (other,) = make(1, 8, 2)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == list(sampler)


@pytest.mark.parametrize("resuming", [False, True])
def test_a_rank_that_is_slow_to_begin_learns_what_it_missed(resuming: bool) -> None:
    """A rank has drawn a batch when another dies, while this one has not even loaded the state to go on from."""
    (before,) = make(1, 40, 2)
    loop = iter(before)
    applied = [i for _ in range(5) for i in next(loop)]
    before.commit()
    a, _, c = make(3, 40, 2)
    if resuming:
        a.load_state_dict(before.state_dict())
    loop_a = iter(a)
    seen = [*next(loop_a)]
    change([a, c])
    if resuming:
        c.load_state_dict(before.state_dict())
    seen += [i for loop in (loop_a, iter(c)) for batch in loop for i in batch]
    assert sorted(seen) == sorted(set(range(40)) - set(applied if resuming else []))


def test_samples_of_an_accumulation_that_crossed_epochs_are_dropped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samplers = make(3, 18, 2)
    for sampler in samplers:
        list(sampler)  # three rounds, no step
    with caplog.at_level(logging.WARNING):
        change(samplers[:2])
    assert "6 samples of epoch 0 are dropped: ['m2']" in caplog.text
    assert [next(iter(s), None) is not None and s.epoch for s in samplers[:2]] == [1, 1]
    with caplog.at_level(logging.WARNING):
        change(samplers[:1])
    assert "an earlier epoch that ['m1'] had accumulated" in caplog.text


def test_prefetching_without_our_loader_is_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    (sampler,) = make(1, 20, 1)
    loop = iter(sampler)
    for _ in range(2):
        for _ in range(3):
            next(loop)
        sampler.note_backward()
        sampler.commit()
    assert caplog.text.count("chaos_mpi.DataLoader") == 1
    caplog.clear()
    (sampler,) = make(1, 20, 1)
    loop = iter(sampler)
    for _ in range(3):
        next(loop)
        sampler.note_backward()
    sampler.commit()
    assert not caplog.text


def steps_of(sampler: ElasticSampler, taken: list[int], backwards: list[int]) -> None:
    """A loop over batches of our loader, which makes a step of so many batches and backward passes each."""
    loop = iter(sampler)
    for count, passes in zip(taken, backwards, strict=True):
        for _ in range(count):
            next(loop)
            sampler.take()
        for _ in range(passes):
            sampler.note_backward()
        sampler.commit()


def test_a_loop_that_reads_ahead_is_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    (sampler,) = make(1, 20, 1)
    sampler.take_explicitly()
    for _ in range(2):
        steps_of(sampler, [2, 1, 1], [1, 1, 1])
    assert caplog.text.count("the loop had taken 1 more") == 1


@pytest.mark.parametrize(
    ("taken", "backwards"),
    [
        ([1] * 20, [1] * 20),
        ([4] * 5, [4] * 5),  # accumulated
        ([1, 4, 4, 4, 4, 3], [1, 4, 4, 4, 4, 3]),
        ([3] * 6 + [2], [1] * 7),  # of three batches at once
        ([1, 0] * 20, [1] * 40),  # two models in turn
        ([1, 1, 3] + [1] * 15, [1] * 18),  # some are left out
    ],
)
def test_other_loops_do_not_read_ahead(
    taken: list[int], backwards: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    (sampler,) = make(1, 20, 1)
    sampler.take_explicitly()
    for _ in range(2):
        steps_of(sampler, taken, backwards)
    assert not caplog.text


def test_batches_follow_the_policy() -> None:
    samplers = make(4, 1000, 6, "keep_global_batch")
    change(samplers[:3])
    assert [len(next(iter(s))) for s in samplers[:3]] == [8, 8, 8]
    samplers = make(4, 1000, 6, "linear")
    change(samplers[:3])
    assert [len(next(iter(s))) for s in samplers[:3]] == [6, 6, 6]


def test_length_is_the_same_before_and_after_a_change_within_one_round() -> None:
    a, b, _ = make(3, 12, 1)
    loops = [iter(s) for s in (a, b)]
    for _ in range(4):
        for sampler, loop in zip((a, b), loops, strict=True):
            next(loop)
            if sampler is a:
                assert len(a) == 4
    change([a, b])
    assert len(a) == len(b) == 4  # rank b decides what rank a has decided
    next(loops[0])
    assert len(a) == 4 + 2  # the four samples that came back, none having been applied


def test_arguments_are_checked() -> None:
    for arguments in ((-1, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(ConfigError, match="at least"):
            make(1, arguments[0], arguments[1], seed=arguments[2])
    (sampler,) = make(1, 10, 2)
    with pytest.raises(ConfigError, match="at least 0"):
        sampler.set_epoch(-1)
    with pytest.raises(ConfigError, match="10 samples, this dataset has 11"):
        make(1, 11, 2)[0].load_state_dict(sampler.state_dict())
    with pytest.raises(ConfigError, match="not the state"):
        sampler.load_state_dict({"length": 10})
    with pytest.raises(RuntimeError, match="without an issued batch"):
        sampler.take()
    late = sampler.report()
    sampler.set_epoch(2)
    with pytest.raises(ValueError, match="own"):
        sampler.apply_change([late], ["a"], ["a"])
    assert len(ElasticSampler([1, 2, 3], session=FakeSession("a", ("a",)))) == 3


def test_a_loop_that_asks_for_the_end_goes_on_with_what_a_dead_rank_gives_back() -> None:
    samplers = make(2, 8, 2)
    loops = [iter(sampler) for sampler in samplers]
    for loop in loops:
        next(loop)
    assert not any(sampler.at_end for sampler in samplers)
    for sampler, loop in zip(samplers, loops, strict=True):
        sampler.commit()
        next(loop)
    assert all(sampler.at_end for sampler in samplers)
    survivor = samplers[0]
    lost = set(samplers[1].in_flight())
    change([survivor])  # the other one died in the last step
    survivor.commit()
    assert not survivor.at_end
    assert set(next(loops[0])) == lost
    assert survivor.at_end
