"""Adaptive sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.horovod.torch.adasum import adasum
from chaos_mpi.horovod.torch.elastic.sampler import merged


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_orthogonal_ones_are_added_and_equal_ones_averaged(size: int) -> None:
    rows = list(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(adasum(rows), torch.ones(size, dtype=torch.float64))
    same = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert torch.allclose(adasum([same] * size), same)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_it_is_scaled_with_its_parts(values: list[list[float]]) -> None:
    tensors = [torch.tensor(v, dtype=torch.float64) for v in values]
    assert torch.allclose(adasum([4 * t for t in tensors]), 4 * adasum(tensors), rtol=1e-9, atol=1e-9)
    assert torch.isfinite(adasum(tensors)).all()


def test_samplers_of_all_ranks_are_merged_in_the_latest_epoch() -> None:
    states = [
        {"epoch": 1, "processed_indices": [1, 2]},
        {"epoch": 0, "processed_indices": [7]},
        {"epoch": 1, "processed_indices": [2, 5]},
    ]
    assert merged(states) == {"epoch": 1, "processed_indices": [1, 2, 5], "processed_num": 3}
