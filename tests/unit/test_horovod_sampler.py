"""The elastic sampler of Horovod's interface, with a session in which members come and go."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.elastic import sampler as module
from chaos_mpi.horovod.torch.elastic import state
from chaos_mpi.horovod.torch.elastic.sampler import ElasticSampler, merged


@dataclasses.dataclass
class Place:
    """What the sampler asks of the session of one member."""

    member: str
    members: tuple[str, ...]
    step: int = 0
    last_contributors: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def rank(self) -> int:
        return self.members.index(self.member)


@dataclasses.dataclass
class FakeJob:
    """Of one member."""

    session: Place

    @property
    def members(self) -> tuple[str, ...]:
        return self.session.members

    @property
    def rank(self) -> int:
        return self.session.rank


class Members:
    """The samplers of several members, in one process."""

    def __init__(self, names: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.places = {name: Place(name, tuple(names)) for name in names}
        self.samplers = {name: self._as(name, lambda: ElasticSampler(range(samples), seed=3)) for name in names}
        self.trained: Counter[int] = Counter()

    def _as(self, name: str, call):  # type: ignore[no-untyped-def]
        self._monkeypatch.setattr(module, "job", lambda: FakeJob(self.places[name]))
        return call()

    def train(self, batch_size: int, steps: int, dies: str = "", at: int = -1, counted_from: int = 0) -> None:
        """So many batches; one member dies in one of them, before its gradients are there."""
        parts = {name: list(sampler) for name, sampler in self.samplers.items()}
        for batch in range(steps):
            if batch == at:
                del self.places[dies], self.samplers[dies]
            alive = tuple(self.places)
            for name in alive:
                self.trained.update(parts[name][batch * batch_size : (batch + 1) * batch_size])
            size, number = len(parts[alive[0]][batch * batch_size : (batch + 1) * batch_size]), batch + counted_from
            for name, place in self.places.items():
                place.members, place.step, place.last_contributors = alive, place.step + 1, alive
                self._as(name, lambda name=name: self.samplers[name].record_batch(number, size))  # noqa: B023 - now

    def sync(self, newcomer: str = "") -> None:
        """All are told of a change, and go on."""
        if newcomer:
            self.places[newcomer] = Place(newcomer, ())
        state = merged([sampler.state_dict() for sampler in self.samplers.values()])
        for place in self.places.values():
            place.members = tuple(self.places)
        if newcomer:
            samples = len(next(iter(self.samplers.values())).dataset)
            self.samplers[newcomer] = self._as(newcomer, lambda: ElasticSampler(range(samples), seed=3))
        for name, sampler in self.samplers.items():
            self._as(name, lambda sampler=sampler: sampler.load_state_dict(state))


@given(
    samples=st.integers(20, 60), batch_size=st.integers(1, 4), before=st.integers(0, 3), at=st.integers(0, 3),
    joins=st.booleans(), counted_from=st.integers(0, 5),
)  # fmt: skip
def test_every_sample_is_trained_on_whoever_dies_and_joins(
    samples: int, batch_size: int, before: int, at: int, joins: bool, counted_from: int
) -> None:
    """Scripts count their batches from 0, from 1, or from where they went on."""
    with pytest.MonkeyPatch.context() as patch:
        members = Members("abc", samples, patch)
        members.train(batch_size, before + at, dies="b", at=before, counted_from=counted_from)
        if "b" in members.places:
            del members.places["b"], members.samplers["b"]
        members.sync("d" if joins else "")
        done = set(members.trained)
        assert all(sampler.processed_indices == done for sampler in members.samplers.values())
        members.train(batch_size, -(-len(next(iter(members.samplers.values()))) // batch_size))
    assert set(members.trained) == set(range(samples))
    assert sum(members.trained.values()) - samples <= 2 * 2  # those that make the parts equal, twice


def test_the_last_batch_of_an_epoch_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    members = Members("ab", 22, monkeypatch)
    members.train(4, 3)
    assert all(sampler.processed_indices == set(range(22)) for sampler in members.samplers.values())


def test_the_same_samples_again_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    members = Members("ab", 40, monkeypatch)
    for _ in range(2):  # a loop that was left, and begun again
        members.train(2, 3)
    assert all(sampler.processed_indices == set(members.trained) for sampler in members.samplers.values())


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_state_of_horovods_own_sampler(monkeypatch: pytest.MonkeyPatch, shuffle: bool) -> None:
    monkeypatch.setattr(module, "job", lambda: FakeJob(Place("a", ("a",))))
    sampler = ElasticSampler(range(10), shuffle=shuffle, seed=3)
    sampler.set_epoch(2)
    order = list(sampler)
    later = ElasticSampler(range(10), shuffle=shuffle, seed=3)
    later.load_state_dict({"epoch": 2, "processed_num": 4})
    assert list(later) == order[4:]
    assert later.processed_num == 4


def test_after_an_error_in_a_commit_the_samples_are_those_of_the_model_of_rank_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = Members("ab", 40, monkeypatch)
    handlers = {name: state.SamplerStateHandler(sampler) for name, sampler in members.samplers.items()}
    told: list[object] = []
    monkeypatch.setattr(state, "allgather_object", lambda mine, _: told.append(mine) or list(rows or told))

    def sync() -> list[int]:
        """What is done, as all ranks know it."""
        told.clear()
        rows[:] = []
        before = {name: handler.mark() for name, handler in members.samplers.items()}
        flags = {name: handler._is_restored for name, handler in handlers.items()}
        for name, handler in handlers.items():
            members._as(name, handler.sync)
        rows[:] = told
        for name, handler in handlers.items():
            members._as(name, lambda name=name: members.samplers[name].go_back(before[name]))
            handler._is_restored = flags[name]
            members._as(name, handler.sync)
        done = [sorted(sampler.processed_indices) for sampler in members.samplers.values()]
        assert done[0] == done[1]
        return done[0]

    rows: list[object] = []
    members.train(2, 1)
    first = sorted(members.trained)
    for handler in handlers.values():
        handler.save()
    members.train(2, 1)
    handlers["b"].save()  # the error comes to a before it has saved, and to b afterwards
    for name, handler in handlers.items():
        members._as(name, handler.restore)
    assert sync() == first
    # Without an error nobody goes back, and a rank may know of more than the others.
    members._as("b", lambda: members.samplers["b"].record_batch(0, 2))
    more = sorted(members.samplers["b"].processed_indices)
    assert len(more) > len(first)
    assert sync() == more


def test_a_state_is_saved_when_all_of_it_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    before = model.weight.detach().clone()
    here = state.TorchState(model=model, epoch=3)

    def fails(_: object) -> object:
        raise HorovodInternalError("the root has died")

    def of_rank_0() -> None:
        torch.nn.init.zeros_(model.weight)

    monkeypatch.setattr(here, "_bcast_object", fails)
    monkeypatch.setattr(state, "job", lambda: FakeJob(Place("b", ("a", "b"))))
    monkeypatch.setattr(here._handlers["model"], "sync", of_rank_0)
    with pytest.raises(HorovodInternalError):
        here.sync()
    here.restore()
    assert torch.equal(model.weight, before)
    # Rank 0 gives out the model, and dies; the one after it gives out the rest.
    rows = [("a", "b", True), ("a", "c", True)]
    monkeypatch.setattr(here, "_bcast_object", lambda given: given)
    monkeypatch.setattr(state, "allgather_object", lambda _, name: rows)
    with pytest.raises(HorovodInternalError, match="rank 0 died"):
        here.sync()
    here.restore()
    assert torch.equal(model.weight, before)
    rows = [("a", "a", True), ("a", "b", True)]
    here.sync()
    assert torch.equal(model.weight, torch.zeros_like(before))
