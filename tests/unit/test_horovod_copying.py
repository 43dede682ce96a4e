"""Copies of a state that is saved again and again: as deep as any, and in the memory of the one before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.horovod.torch.elastic.copying import copied

_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _flat(value: Any) -> Any:
    """What can be compared: tensors as their values and strides."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.stride(), value.tolist())
    if isinstance(value, dict):
        return {key: _flat(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [type(value), *map(_flat, value)]
    return value


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    tensor = torch.randint(0, 100, shape).to(draw(st.sampled_from(_DTYPES)))
    how = draw(st.sampled_from(["whole", "transposed", "a part"]))
    if how == "a part" and tensor.dim():
        return tensor[1:]
    return tensor.t() if how == "transposed" else tensor


def states() -> st.SearchStrategy[Any]:
    leaves = st.one_of(tensors(), st.integers(), st.text(max_size=2), st.none())
    names = st.text("ab", max_size=2)
    return st.recursive(leaves, lambda of: st.one_of(st.lists(of, max_size=4), st.dictionaries(names, of, max_size=4)))


@given(st.lists(states(), min_size=1, max_size=4))
def test_it_is_a_deep_copy_whatever_was_there_before(versions: list[Any]) -> None:
    kept = None
    for state in versions:
        expected = _flat(state)
        kept = copied(state, kept)
        for tensor in _tensors(state):
            tensor.zero_()
        assert _flat(kept) == expected


@given(states(), st.lists(st.integers(0, 50), min_size=2, max_size=2))
def test_tensors_that_are_one_stay_one_and_no_others_become_one(state: Any, which: list[int]) -> None:
    found = list(_tensors(state))
    first = {"state": state, "tied": [found[i % len(found)] for i in which] if found else []}
    kept = copied(first, copied(first, None))
    apart = {"state": copy.deepcopy(state), "tied": [t.clone() for t in first["tied"]]}
    for count, tensor in enumerate(_tensors(apart)):
        tensor.fill_(count % 2)
    expected = _flat(apart)
    kept = copied(apart, kept)
    assert _flat(kept) == expected
    tied = copied(first, kept)["tied"]
    if tied and tied[0].numel() and which[0] % len(found) == which[1] % len(found):
        assert tied[0].data_ptr() == tied[1].data_ptr()


def test_a_part_of_a_tensor_stays_a_part_of_it() -> None:
    whole = torch.zeros(4)
    state = {"whole": whole, "part": whole[:2]}
    kept = copied(state, copied(state, None))
    kept["whole"].fill_(1)
    assert kept["part"].tolist() == [1, 1]


def test_a_copy_that_fails_leaves_the_one_before_as_it_was() -> None:
    class NotToBeCopied:
        def __deepcopy__(self, _: Any) -> Any:
            raise TypeError

    kept = copied({"weight": torch.zeros(2)}, None)
    with pytest.raises(TypeError):
        copied({"weight": torch.ones(2), "other": NotToBeCopied()}, kept)
    assert kept["weight"].tolist() == [0, 0]


def test_it_takes_no_other_memory() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    for part in (model, optimizer):
        kept = copied(part.state_dict(), None)
        before = [tensor.data_ptr() for tensor in _tensors(kept)]
        again = copied(part.state_dict(), kept)
        assert [tensor.data_ptr() for tensor in _tensors(again)] == before
        assert not set(before) & {tensor.data_ptr() for tensor in _tensors(part.state_dict())}
    assert copied(model.state_dict(), None)._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
