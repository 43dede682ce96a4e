from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.elastic.scaling import POLICIES, lr_factor, member_batches
from chaos_mpi.errors import ConfigError


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_keep_global_batch_shares_the_whole_batch(batch: int, initial: int, n: int) -> None:
    sizes = member_batches("keep_global_batch", batch, initial, n)
    assert len(sizes) == n
    assert min(sizes) >= 1
    assert sum(sizes) == max(n, batch * initial)
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)
    assert lr_factor("keep_global_batch", initial, n) == 1.0


@pytest.mark.parametrize("policy", ["linear", "sqrt", "none"])
def test_other_policies_keep_the_batch_of_a_rank(policy: str) -> None:
    assert member_batches(policy, 32, 4, 3) == (32, 32, 32)


def test_learning_rate_factors() -> None:
    assert lr_factor("linear", 4, 3) == 0.75
    assert lr_factor("sqrt", 4, 9) == math.sqrt(9 / 4)
    assert lr_factor("none", 4, 3) == 1.0
    assert all(lr_factor(policy, 5, 5) == 1.0 for policy in POLICIES)


def test_unknown_policy_names_the_choices() -> None:
    for call in (lambda: member_batches("linaer", 1, 1, 1), lambda: lr_factor("linaer", 1, 1)):
        with pytest.raises(ConfigError, match="keep_global_batch, linear, sqrt, none"):
            call()


@pytest.mark.parametrize("args", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_counts_below_one_are_refused(args: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        member_batches("none", *args)
