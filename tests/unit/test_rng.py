"""Random number generators: captured and restored exactly, as JSON, and only where asked for."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.elastic.rng import capture_rng, of_rank, restore_rng
from chaos_mpi.elastic.state import TrainingState, first_difference
from chaos_mpi.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def _leave_the_generators_alone() -> Any:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


def draws() -> list[float]:
    """Gaussian ones too, of which all three keep some for later."""
    return [
        *torch.rand(3).tolist(), *torch.randn(20).tolist(), np.random.random(), np.random.standard_normal(),
        random.random(), random.gauss(0.0, 1.0),
    ]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_the_stream_goes_on_where_it_was(seed: int, drawn: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    for _ in range(drawn):
        draws()
    state = json.loads(json.dumps(capture_rng()))
    expected = [draws() for _ in range(3)]
    torch.manual_seed(seed + 1)
    np.random.seed(1)
    random.seed(1)
    restore_rng(state)
    assert capture_rng() == state
    assert [draws() for _ in range(3)] == expected


def test_to_capture_draws_nothing() -> None:
    state = capture_rng()
    assert capture_rng() == state


def test_added_ranks_go_on_from_rank_0() -> None:
    states: list[dict[str, Any]] = [{"rank": 0}, {"rank": 1}]
    assert [of_rank(states, rank)["rank"] for rank in range(4)] == [0, 1, 0, 0]


def test_a_state_that_is_none_is_refused() -> None:
    state = capture_rng()
    for part in ("torch", "numpy", "python"):
        for damaged in ({**state, part: None}, {name: value for name, value in state.items() if name != part}):
            with pytest.raises(CheckpointError, match="random number generators cannot be used here"):
                restore_rng(damaged)
    with pytest.raises(CheckpointError):
        restore_rng({**state, "torch": state["torch"][:400]})


def test_another_generator_of_numpy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "get_state", lambda legacy: {"bit_generator": "PCG64"})
    with pytest.raises(ConfigError, match="not with PCG64"):
        capture_rng()


def make(**how: Any) -> TrainingState:
    model = torch.nn.Linear(2, 2)
    return TrainingState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **how)


def test_they_are_no_part_of_what_replicas_have_in_common() -> None:
    torch.manual_seed(1)
    one = make(rng=True)
    torch.manual_seed(1)
    other = make(rng=True)
    torch.rand(1)
    assert one.keeps_rng
    assert not make().keeps_rng
    assert one.digest() == other.digest()
    assert first_difference(one.signature(), other.signature()) is None


def test_all_ranks_ask_for_them_or_none() -> None:
    assert first_difference(make(rng=True).signature(), make().signature()) == "extra rng is here but not there"
