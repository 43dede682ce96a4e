"""What is a crash, and what is not."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.agent.crashes import Crash, crash_of, how_it_crashed


@pytest.mark.parametrize(
    ("status", "outcome", "how"),
    [
        (-signal.SIGSEGV, None, "SIGSEGV"),
        (-signal.SIGKILL, None, "SIGKILL"),
        (-signal.SIGKILL, "crashed", "by an error in the script"),
        (1, None, "exit status 1"),
        (-64, None, "SIGRTMAX"),
        (-33, None, "signal 33"),
        (0, None, ""),
    ],
)
def test_how_a_member_crashed(status: int, outcome: str | None, how: str) -> None:
    assert how_it_crashed(status, True, outcome) == how


@given(st.integers(-64, 255), st.sampled_from(["finished", "left", "stopped", "failed", "failed afterwards", "ended"]))
def test_who_has_said_why_it_ends_has_not_crashed(status: int, outcome: str) -> None:
    assert how_it_crashed(status, True, outcome) == ""


@given(st.integers(-64, 255), st.sampled_from([None, "crashed"]))
def test_who_has_not_taken_part_is_not_started_again(status: int, outcome: str | None) -> None:
    assert how_it_crashed(status, False, outcome) == ""


def test_what_agents_say() -> None:
    assert crash_of("a:1", {"crashed": "SIGSEGV", "host": "a"}) == Crash("a:1", "a", "SIGSEGV")
    assert crash_of("a:1", {"crashed": "", "host": "a"}) is None
    assert crash_of("a:1", {}) is None
    with pytest.raises(ValueError, match="a:1 says of its end: 7"):
        crash_of("a:1", {"crashed": 7})
