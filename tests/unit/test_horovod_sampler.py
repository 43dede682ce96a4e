"""The elastic sampler of Horovod's interface, with a session in which members come and go."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.horovod.torch.elastic import sampler as module
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

    def train(self, batch_size: int, steps: int, dies: str = "", at: int = -1) -> None:
        """So many batches; one member dies in one of them, before its gradients are there."""
        parts = {name: list(sampler) for name, sampler in self.samplers.items()}
        for batch in range(steps):
            if batch == at:
                del self.places[dies], self.samplers[dies]
            alive = tuple(self.places)
            for name in alive:
                self.trained.update(parts[name][batch * batch_size : (batch + 1) * batch_size])
            for name, place in self.places.items():
                place.members, place.step, place.last_contributors = alive, place.step + 1, alive
                self._as(name, lambda name=name, batch=batch: self.samplers[name].record_batch(batch, batch_size))

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
    joins=st.booleans(),
)  # fmt: skip
def test_every_sample_is_trained_on_whoever_dies_and_joins(
    samples: int, batch_size: int, before: int, at: int, joins: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        members = Members("abc", samples, patch)
        members.train(batch_size, before + at, dies="b", at=before)
        if "b" in members.places:
            del members.places["b"], members.samplers["b"]
        members.sync("d" if joins else "")
        done = set(members.trained)
        assert all(sampler.processed_indices == done for sampler in members.samplers.values())
        members.train(batch_size, -(-len(next(iter(members.samplers.values()))) // batch_size))
    assert set(members.trained) == set(range(samples))
    assert sum(members.trained.values()) - samples <= 2 * 2  # those that make the parts equal, twice
