"""The scale-out delay as it is reported: the clocks of the hosts may differ."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from chaos_mpi.elastic import newcomer
from chaos_mpi.elastic.admission import invite
from chaos_mpi.elastic.arrival import Arrival
from chaos_mpi.elastic.changes import ChangingSession
from chaos_mpi.elastic.negotiator import Negotiator
from chaos_mpi.membership import Join, Limits


class Clocks:
    """Those of the host that a test is on; all go on at the same rate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.ahead_s = 1000.0, 0.0
        monkeypatch.setattr(time, "time", lambda: 1.8e9 + self.now + self.ahead_s)
        monkeypatch.setattr(time, "monotonic", lambda: self.now + 7.0 * self.ahead_s)


class PutError(Exception):
    """A member has put its word before the others; goes no further."""


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def negotiator(name: str) -> tuple[Negotiator, Any]:
    """One of two members, ``a:1`` and ``b:2``, with its session."""
    session = MagicMock(member=name, rank=1, settings=SimpleNamespace(policy_name="manual"))
    session.sampler_reports.return_value = []
    made = Negotiator(session, Limits())
    made.due = True
    return made, session


def word_of(origin: Negotiator, session: Any) -> Any:
    """What a member puts before the others."""

    def put(word: Any) -> None:
        raise PutError(json.dumps(word))

    session.gather_with_contributors = put
    with pytest.raises(PutError) as caught:
        origin.settle()
    return json.loads(str(caught.value))


def test_the_sponsor_counts_from_the_request_whatever_clocks_say(clocks: Clocks) -> None:
    clocks.ahead_s = 3600.0
    origin, session = negotiator("a:1")
    id_ = origin.requests.join()
    clocks.now += 2.0  # a long step
    word = word_of(origin, session)
    clocks.ahead_s = -60.0  # on the other host
    sponsor, session = negotiator("b:2")
    session.gather_with_contributors = lambda mine: ([word, mine], ("a:1", "b:2"))
    sponsor._sponsor = MagicMock()  # type: ignore[method-assign]
    sponsor.settle()
    (join,) = sponsor.agenda.joins
    assert join.id == id_
    clocks.now += 5.0
    bridge, timing = MagicMock(), {"launch_s": 3.0, "waited_s": 1.5}
    invite(bridge, [], timing, sponsor._waited_s(join, timing))
    assert bridge.send.call_args.args[0]["admit"]["waited_s"] == pytest.approx(7.0)


def test_a_sponsor_that_came_later_knows_of_its_own_attempt(clocks: Clocks) -> None:
    late, _ = negotiator("b:2")
    assert late._waited_s(Join("join-a:1-1", "", 0, "b:2"), {"launch_s": 3.0, "waited_s": 1.5}) == 4.5


def test_the_newcomer_adds_its_own_time(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks.ahead_s = -600.0
    called = {"admit": {"waited_s": 7.0, "timing": {"launch_s": 3.0}, "later": []}}
    for name, value in (("_register", Arrival("join-a:1-1")), ("_await_call", called), ("_take_state", None)):
        monkeypatch.setattr(newcomer, name, MagicMock(return_value=value))
    monkeypatch.setattr(newcomer.growth, "enter", MagicMock())
    session, emitted = MagicMock(), dict[str, Any]()
    arrival = newcomer.enter_job(session, MagicMock(), MagicMock())
    clocks.now += 2.0
    into: Any = SimpleNamespace(_arrival=arrival, emit=lambda event, **fields: emitted.update(fields))
    ChangingSession._report_arrival(into, MagicMock(contributes=True))
    assert (emitted["total_s"], emitted["launch_s"], emitted["first_step_s"]) == (9.0, 3.0, 2.0)
