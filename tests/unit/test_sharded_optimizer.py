"""Who keeps which part of a sharded optimizer's state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.torch.sharded_optimizer import assigned, split


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
