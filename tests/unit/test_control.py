"""The control socket of a member, without a job around it."""

from __future__ import annotations

import queue
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest

from chaos_mpi.cli.control import ask, end_ranks, find_job
from chaos_mpi.elastic.control import ControlSocket
from chaos_mpi.elastic.negotiator import Answer
from chaos_mpi.elastic.session import Session


def session(**attributes: Any) -> Session:
    """As much of a session as the socket asks for."""
    return cast("Session", SimpleNamespace(member="me", **attributes))


@pytest.mark.parametrize("length", [1, 200])
def test_a_directory_with_a_long_name_is_no_hindrance(length: int, tmp_path: Path) -> None:
    job = tmp_path / ("d" * length)
    job.mkdir()
    control = ControlSocket(session(), job / "control-1.sock")
    try:
        assert (job / "control-1.sock").stat().st_mode & 0o777 == 0o600
        with pytest.raises(click.ClickException, match="there is no request 'dance'"):
            list(ask(find_job(job), {"do": "dance"}, limit_s=10))
    finally:
        control.close()
    assert not list(job.iterdir())


def test_a_member_that_hangs_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_mpi.cli.control.CONNECT_LIMIT_S", 0.2)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(tmp_path / "control-1.sock"))
        hanging.listen()
        with pytest.raises(click.ClickException, match=r"no member of the job in .* answers"):
            list(ask(tmp_path, {"do": "dance"}, limit_s=10))
        control = ControlSocket(session(), tmp_path / "control-2.sock")
        try:
            with pytest.raises(click.ClickException, match="there is no request 'dance'"):
                list(ask(tmp_path, {"do": "dance"}, limit_s=10))
        finally:
            control.close()


@pytest.mark.parametrize("_", range(20))
def test_a_member_that_leaves_still_says_so(_: int, tmp_path: Path) -> None:
    asked: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    control = ControlSocket(session(request_leave=lambda _, answer: asked.put(answer)), tmp_path / "control-1.sock")

    def leave() -> None:
        asked.get()("left", {"members": ["me"]})
        control.close()

    leaving = threading.Thread(target=leave)
    leaving.start()
    answers = list(ask(tmp_path, {"do": "remove", "member": "me"}, limit_s=10))
    leaving.join()
    assert [answer["what"] for answer in answers] == ["left"]


def test_a_member_is_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_mpi.elastic.control.LEAVE_DEADLINE_S", 1e6)  # this process is not to end at it
    asked: queue.SimpleQueue[object] = queue.SimpleQueue()
    leaving = session(told_to_end=False, request_leave=lambda *request: asked.put(request))
    control = ControlSocket(leaving, tmp_path / "control-1.sock")
    try:
        assert end_ranks(tmp_path)
        assert asked.get(timeout=10)
    finally:
        control.close()


def test_nobody_is_told_to_end_where_nobody_is(tmp_path: Path) -> None:
    (tmp_path / "control-7.sock").touch()  # what a member that was killed leaves
    assert not end_ranks(tmp_path)
