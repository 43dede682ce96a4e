"""What ends a session in good order, in a ``finally`` block with an exception under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import chaos_mpi
from chaos_mpi.elastic import current
from chaos_mpi.elastic.ending import EndingSession
from chaos_mpi.elastic.session import Session
from chaos_mpi.errors import NoSessionError
from chaos_mpi.horovod.torch import job as jobs
from chaos_mpi.horovod.torch import process_sets
from chaos_mpi.torch.carriers import SessionCarrier, SubgroupCarrier

UNDER_WAY = [KeyError("a mistake"), SystemExit(0)]


class FakeSession:
    """Counts what all members would have to do together. Of one member, so that it needs no group for messages."""

    size = 1
    let_error_go_on = EndingSession.let_error_go_on

    def __init__(self, *, ends_well: bool = True) -> None:
        self.ends_well = ends_well
        self.made: list[str] = []

    def close(self) -> None:
        self.made.append("close")

    def ready_for_subgroup(self) -> None:
        self.made.append("ready")


class FakeGroup:
    """A group of some members, and its messages."""

    members, world, under_way = ("a",), None, False

    def __init__(self, session: FakeSession) -> None:
        self._session = session

    def free(self) -> None:
        self._session.made.append("free")


class FakeQueue:
    """Calls of Horovod's interface."""

    def __init__(self, session: FakeSession) -> None:
        self._session = session

    def drain(self) -> None:
        self._session.made.append("drain")


def default_group(session: Any) -> Callable[[], None]:
    carrier = SessionCarrier(session, owned=True)
    carrier._group = carrier._messages = FakeGroup(session)  # type: ignore[assignment]
    return carrier.close


def group_of_some(session: Any) -> Callable[[], None]:
    carrier = SubgroupCarrier.__new__(SubgroupCarrier)
    carrier.session = session
    carrier._group = carrier._messages = FakeGroup(session)  # type: ignore[assignment]
    return carrier.close


def in_a_frame(error: BaseException, close: Callable[[], object]) -> None:
    """What a script does that ends by an error."""
    try:
        raise error
    finally:
        close()


@pytest.fixture
def horovod(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Callable[[], None]]:
    """Opens a job of Horovod's interface on a session; what ends it."""

    def opened(session: Any) -> Callable[[], None]:
        job = jobs.Job.__new__(jobs.Job)
        job.session, job.owned, job.state = session, True, None
        job.queue = FakeQueue(session)  # type: ignore[assignment]
        monkeypatch.setattr(process_sets, "end", lambda: None)
        monkeypatch.setattr(jobs, "_job", job)
        monkeypatch.setattr(current, "_current", session)
        return jobs.shutdown

    return opened


@pytest.mark.parametrize("error", UNDER_WAY)
def test_an_error_goes_on_instead_of_the_end_of_torch_s_default_group(error: BaseException) -> None:
    session = FakeSession()
    with pytest.raises(type(error)) as raised:
        in_a_frame(error, default_group(session))
    assert raised.value is error
    assert not session.made
    default_group(session)()
    assert session.made == ["free", "close"]


@pytest.mark.parametrize("error", UNDER_WAY)
def test_an_error_goes_on_instead_of_the_end_of_a_horovod_job(
    error: BaseException, horovod: Callable[[Any], Callable[[], None]]
) -> None:
    session = FakeSession()
    with pytest.raises(type(error)) as raised:
        in_a_frame(error, horovod(session))
    assert raised.value is error
    assert not session.made
    horovod(session)()
    assert session.made == ["drain", "close"]


def test_a_group_of_some_waits_for_nobody_with_an_error_under_way() -> None:
    session = FakeSession()
    try:
        raise KeyError("a mistake")
    except KeyError:
        group_of_some(session)()  # torch goes on with the default group
    assert not session.made
    group_of_some(session)()
    assert session.made == ["ready", "free"]
    left = FakeSession(ends_well=False)
    group_of_some(left)()
    assert not left.made


@pytest.mark.parametrize("close", [Session.close, lambda _: chaos_mpi.finalize()])
@pytest.mark.parametrize("error", UNDER_WAY)
def test_an_error_goes_on_instead_of_the_end_of_the_session(
    close: Callable[[Session], object], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.__new__(Session)
    session._result, session._ended = None, True  # as after a leave, so that nothing more can be done
    monkeypatch.setattr(current, "_current", session)
    with pytest.raises(type(error)) as raised:
        in_a_frame(error, lambda: close(session))
    assert raised.value is error
    with pytest.raises(NoSessionError):
        close(session)
