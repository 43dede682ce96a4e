"""Which pending calls ranks make that are in different ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.horovod.torch.negotiation import JOIN, Asked, Row, decide, remaining

NAMES = "abc"
ZEROS = {"tensors": [["float32", [2]]]}


def row(names: str, *, blocked: bool = False, joined: bool = False, tired: bool = False) -> Row:
    """One rank; a capital letter is the same call with another shape."""
    pending = [Asked(name.lower(), name, ZEROS if name.lower() == "a" else None) for name in names]
    return Row((*pending, *([Asked(JOIN, JOIN)] if joined else [])), blocked, tired)


def told(rows: list[Row]) -> dict[str, str]:
    """What is decided: the refusal of each call, empty if it is made."""
    return {action.name: action.refusal for action in decide(rows)}


def test_what_all_have_is_made_in_the_order_of_the_first_rank() -> None:
    assert list(told([row("cab"), row("bca"), row("ac")])) == ["c", "a"]


def test_nothing_is_decided_while_a_rank_may_still_make_the_call() -> None:
    assert told([row("a", blocked=True), row("b")]) == {}
    assert told([row("a"), row("")]) == {}


def test_ranks_that_wait_for_different_calls_are_told_so() -> None:
    refusals = told([row("a", blocked=True), row("b", blocked=True)])
    assert set(refusals) == {"a", "b"}
    assert "0: a; 1: b" in refusals["a"]


def test_ranks_that_wait_too_long_are_told_so() -> None:
    assert "in time" in told([row("a", tired=True), row("")])["a"]


def test_calls_that_differ_are_refused_with_all_versions() -> None:
    assert "0, 2: a; 1: A" in told([row("a"), row("A"), row("a")])["a"]


def test_ranks_that_have_joined_add_zeros_where_that_means_something() -> None:
    actions = {action.name: action for action in decide([row("ab"), row("", joined=True), row("ab")])}
    assert actions["a"].zeros == ZEROS
    assert not actions["a"].refusal
    assert "rank 1 has joined" in actions["b"].refusal
    assert JOIN not in actions


def test_when_all_have_joined_the_rest_comes_first() -> None:
    actions = decide([row("a", joined=True), row("", joined=True)])
    assert [action.name for action in actions] == ["a", JOIN]


rows = st.lists(
    st.builds(
        lambda names, blocked, joined: row("".join(dict.fromkeys(names)), blocked=blocked, joined=joined),
        st.text(NAMES, max_size=4), st.booleans(), st.booleans(),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@given(rows)
def test_whatever_is_pending(table: list[Row]) -> None:
    actions = decide(table)
    names = [action.name for action in actions]
    assert len(names) == len(set(names))
    for action in actions:
        having = [r for r in table if any(asked.name == action.name for asked in r.pending)]
        assert having or action.name == JOIN
        if not action.refusal:
            lacking = [r for r in table if r not in having]
            assert all(any(asked.name == JOIN for asked in r.pending) for r in lacking)
            assert not lacking or action.zeros is not None
    if all(r.blocked for r in table) and any(r.pending for r in table):
        assert actions, "nobody can do anything, and nothing is decided"
    assert Row.from_json(table[0].to_json()) == table[0]
    assert remaining(table, actions) == any(a.name not in names for r in table for a in r.pending)
