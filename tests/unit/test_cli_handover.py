"""How a launcher has a job handed over, with control sockets of both jobs and nothing behind them."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from chaos_mpi.agent.home import note_down
from chaos_mpi.agent.launcher import LauncherPipe
from chaos_mpi.agent.processes import start_time
from chaos_mpi.cli.handover import HandOver, ready
from chaos_mpi.elastic import kept
from chaos_mpi.elastic.awaited import AwaitedState
from chaos_mpi.elastic.control import ControlSocket
from chaos_mpi.elastic.requests import Answer
from chaos_mpi.elastic.session import Session
from chaos_mpi.errors import CheckpointError, ConfigError
from chaos_mpi.events import RecentEvents
from chaos_mpi.membership import MOVES

Jobs = tuple[Path, Path, list[str]]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """The directories of an old job and of a new one, all of whose ranks wait; and what they are told."""
    told: list[str] = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    for kind in ("starting", "ready"):
        (tmp_path / "new" / f"{kind}-{os.getpid()}.json").write_text("{}")
    rank = cast("Session", SimpleNamespace(member="new", step=0, state_kept=told.append, recent=RecentEvents()))
    control = ControlSocket(rank, tmp_path / "new" / "control-1.sock")
    yield tmp_path / "old", tmp_path / "new", told
    control.close()


def hand_over(jobs: Jobs, what: str = "", **fields: object) -> str:
    """Do so with an old job that answers like this; what the new ranks are told is wrong."""
    old, new, told = jobs

    def request(_: str, answer: Answer) -> None:
        if not what:
            raise ConfigError("there is no state")
        answer(what, dict(fields))

    member = cast("Session", SimpleNamespace(member="old", step=0, request_move=request, recent=RecentEvents()))
    control = ControlSocket(member, old / "control-1.sock")
    try:
        HandOver(old, kept.new_name(), new, ranks=1, limit_s=20).run()
    finally:
        control.close()
    (problem,) = told
    return problem


def test_new_ranks_are_told_that_the_state_is_kept(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert hand_over(jobs, "moved", step=7) == ""
    assert "the job goes on here after step 7" in capsys.readouterr().err


def test_new_ranks_are_told_that_the_job_goes_on_as_it_was(jobs: Jobs) -> None:
    assert hand_over(jobs, "refused", reason="no room") == "the job was not handed over, and goes on as it was: no room"
    jobs[2].clear()
    assert hand_over(jobs).endswith("goes on as it was: there is no state")


def test_new_ranks_look_for_the_state_when_nobody_knows_what_became_of_the_job(
    jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, told = jobs
    HandOver(old, kept.new_name(), new, ranks=1, limit_s=1).run()
    assert told == [""]
    assert "its state is looked for on all hosts" in capsys.readouterr().err


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_job_that_says_nothing_and_does_not_end(
    is_kept: bool, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SHM_DIRECTORY", tmp_path)
    monkeypatch.setattr("chaos_mpi.cli.handover._END_LIMIT_S", 0.1)
    old, new, told = jobs
    name = kept.new_name()
    kept.keep(name if is_kept else kept.new_name(), 1, lambda place: None)
    note_down(old, "member", {})
    HandOver(old, name, new, ranks=1, limit_s=1).run()
    assert "no member of the job" in told[0]
    assert (f"go on by: {kept.VARIABLE}={name} chaosrun" if is_kept else "still runs") in told[0]


def test_a_number_that_another_process_has_now_is_no_new_rank(jobs: Jobs) -> None:
    new = jobs[1]
    assert ready(new, 1)
    with subprocess.Popen(["sleep", "60"]) as other:
        record, began = new / f"starting-{other.pid}.json", start_time(other.pid)
        record.write_text(json.dumps({"started": began}))
        assert not ready(new, 2), "it lives, and does not wait yet"
        record.write_text(json.dumps({"started": began - 1}))
        assert ready(new, 2)
        other.kill()


def test_who_was_slower_than_another_launcher_does_not_say_how_to_go_on(jobs: Jobs) -> None:
    assert hand_over(jobs, "refused", reason=f"{MOVES} already") == f"the job was not handed over: {MOVES} already"


def test_a_rank_waits_until_it_is_told() -> None:
    awaited = AwaitedState()
    telling = threading.Timer(0.05, awaited.tell, ("",))
    telling.start()
    awaited.wait(kept.new_name(), 20)
    telling.join()
    awaited.tell("no room")
    with pytest.raises(CheckpointError, match=r"^no room$"):
        awaited.wait(kept.new_name(), 20)


def test_a_rank_does_not_wait_for_a_launcher_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, name = LauncherPipe(), kept.new_name()
    for variable, value in pipe.variables().items():
        monkeypatch.setenv(variable, value)
    pipe.close()
    try:
        with pytest.raises(CheckpointError, match=f"mpirun is gone .* go on from it with {kept.VARIABLE}={name}"):
            AwaitedState().wait(name, 20)
    finally:
        pipe.passed_on()
    with pytest.raises(CheckpointError, match="was not handed over within 0 s"):
        AwaitedState().wait(name, 0)


def test_how_to_go_on_is_said_when_the_state_is_left(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SHM_DIRECTORY", tmp_path)
    handover = HandOver(jobs[0], name := kept.new_name(), jobs[1], ranks=1, limit_s=1)
    assert handover.left() == ""
    kept.keep(name, 1, lambda place: None)
    assert f"{kept.VARIABLE}={name} chaosrun" in handover.left()
