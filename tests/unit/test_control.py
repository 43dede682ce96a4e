"""The control socket of a member, without a job around it."""

from __future__ import annotations

import errno
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest

from chaos_mpi.agent import sockets
from chaos_mpi.agent.home import note_down
from chaos_mpi.agent.marks import here
from chaos_mpi.cli.control import LAUNCHER, ask, ask_all, end_ranks, find_job, follow
from chaos_mpi.cli.status import combine, lines
from chaos_mpi.elastic.control import ControlSocket, end_soon, stop_soon
from chaos_mpi.elastic.requests import Answer
from chaos_mpi.elastic.session import Session
from chaos_mpi.elastic.status import MemberStatus
from chaos_mpi.events import EventLog, RecentEvents
from chaos_mpi.membership import Changes


def session(**attributes: Any) -> Session:
    """As much of a session as the socket asks for."""
    return cast("Session", SimpleNamespace(**{"member": "me", "step": 0, "recent": RecentEvents(), **attributes}))


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


def test_more_ask_at_once_than_wait_in_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_BACKLOG", 1)
    listener = sockets.listen(tmp_path / "a.sock")
    connections: list[socket.socket] = []
    with listener:
        connections += [sockets.connect(tmp_path / "a.sock", 5.0) for _ in range(2)]  # one more than it was told to
        with pytest.raises(BlockingIOError):
            sockets.connect(tmp_path / "a.sock", 0.05)
        taking = threading.Thread(target=lambda: connections.append(listener.accept()[0]))
        taking.start()
        connections.append(sockets.connect(tmp_path / "a.sock", 5.0))
        taking.join()
    for connection in connections:
        connection.close()


def test_a_shortage_does_not_end_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control, shortages = ControlSocket(session(), tmp_path / "control-1.sock"), iter([True, True])

    def look(_: MemberStatus) -> None:
        if next(shortages, False):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    try:
        monkeypatch.setattr(MemberStatus, "look", look)
        for _ in range(3):
            with pytest.raises(click.ClickException, match="there is no request 'dance'"):
                list(ask(tmp_path, {"do": "dance"}, limit_s=10))
        assert next(shortages, None) is None
    finally:
        control.close()


@pytest.mark.parametrize("last_words", [b"", b'{"what": "starting", "att'])
def test_a_member_that_ends_in_the_middle_of_an_answer(last_words: bytes, tmp_path: Path) -> None:
    listener = sockets.listen(tmp_path / "control-1.sock")

    def member() -> None:
        connection, _ = listener.accept()
        connection.sendall(b'{"member": "me"}\n' + last_words)
        if not last_words:  # what it has not read makes its end a reset
            connection.recv(1)
        connection.close()

    thread = threading.Thread(target=member)
    with listener:
        thread.start()
        with pytest.raises(click.ClickException, match="the member that was asked has ended"):
            list(ask(tmp_path, {"do": "add", "host": ""}, limit_s=10))
        thread.join()


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


def looked_at(run_dir: Path) -> Session:
    """A session of which everything is known."""
    return session(
        host="h", rank=1, members=("h:1", "me"), epoch=3, phase="compute", samplers=(SimpleNamespace(epoch=4),),
        settings=SimpleNamespace(min_ranks=1, max_ranks=None, run_dir=run_dir), pending_joins=list,
        changes=Changes(deaths=1), agent=None,
    )  # fmt: skip


def test_a_member_says_how_the_job_is(tmp_path: Path) -> None:
    control = ControlSocket(looked_at(tmp_path), tmp_path / "control-1.sock")
    try:
        (answer,) = ask_all(tmp_path, {"do": "status"}, limit_s=10)
    finally:
        control.close()
    assert (answer["member"], answer["rank"], answer["members"], answer["pid"]) == ("me", 1, ["h:1", "me"], os.getpid())
    assert (answer["epoch"], answer["data_epochs"], answer["changes"]["deaths"]) == (3, [4], 1)
    documented = set(re.findall(r"``(\w+)``", MemberStatus.answer.__doc__ or ""))
    assert answer.keys() - {"last"} <= documented
    told = list(lines(combine([answer], None, 0.0)))
    assert told[0] == "step 0, view 3, 2 members"
    assert told[1].split()[2:4] == ["h:1", "silent"]


def test_all_members_are_asked_and_none_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "control-0.sock").touch()  # what a member that was killed leaves
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(tmp_path / "control-1.sock"))
        hanging.listen()
        controls = [ControlSocket(looked_at(tmp_path), tmp_path / f"control-{n}.sock") for n in (2, 3)]
        try:
            assert len(ask_all(tmp_path, {"do": "status"}, limit_s=0.5)) == 2
            assert ask_all(tmp_path, {"do": "dance"}, limit_s=0.5) == []
        finally:
            for control in controls:
                control.close()
    assert ask_all(tmp_path / "none", {"do": "status"}, limit_s=0.5) == []


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


def test_the_job_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(click.ClickException, match="no job of yours is running"):
        find_job(None)
    starting, running, memory = (tmp_path / f"chaosrun-{name}" for name in ("starting", "running", "memory"))
    for directory in (starting, running, memory):
        directory.mkdir(mode=0o700)
    note_down(starting, LAUNCHER, {**here(), "program": "python train.py"})
    with pytest.raises(click.ClickException, match=f"the job in {starting} is starting, or about to end, or hangs"):
        find_job(None)
    control = ControlSocket(session(), running / "control-1.sock")
    try:
        with pytest.raises(click.ClickException, match="several jobs are running") as error:
            find_job(None)
        assert f"{starting} (python train.py) (starting, or about to end)" in str(error.value)
        assert str(memory) not in str(error.value)
        assert find_job(running) == running
        with pytest.raises(click.ClickException, match=f"the job in {starting} is starting"):
            find_job(starting)
        (starting / f"{LAUNCHER}-{os.getpid()}.json").unlink()
        assert find_job(None) == running
    finally:
        control.close()


@pytest.mark.parametrize("_", range(20))
def test_who_follows_a_member_hears_of_everything_up_to_its_end(_: int, tmp_path: Path) -> None:
    log = EventLog(None, "me", "h")

    def happens(step: int) -> None:
        log.emit("stalled", rank=0, size=1, epoch=0, step=step, seconds=0.0, cause="join")

    happens(1)
    control = ControlSocket(session(recent=log.recent), tmp_path / "control-1.sock")
    told = follow(tmp_path / "control-1.sock", 10.0)
    assert next(told) is None, "it is there"
    assert (next(told) or {})["step"] == 1
    happens(2)
    assert (next(told) or {})["step"] == 2

    def ends() -> None:
        for step in range(3, 100):
            happens(step)
        control.close()

    ending = threading.Thread(target=ends)
    ending.start()
    assert [event["step"] for event in told if event is not None] == list(range(3, 100))
    ending.join()
    assert list(follow(tmp_path / "control-1.sock", 10.0)) == [], "nobody is there any more"


def test_who_follows_where_nothing_happens_is_looked_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_mpi.elastic.control._FOLLOW_PERIOD_S", 0.05)
    control = ControlSocket(session(), tmp_path / "control-1.sock")
    try:
        told = follow(tmp_path / "control-1.sock", 10.0)
        assert [next(told) for _ in range(5)] == [None] * 5
        (thread,) = control._answered
        cast("Generator[object]", told).close()
        thread.join(10.0)
        assert not thread.is_alive(), "it waits for events that nobody wants"
    finally:
        control.close()


def test_who_follows_and_does_not_read_keeps_no_member_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chaos_mpi.elastic.control._LAST_ANSWERS_S", 0.1)
    log = EventLog(None, "me", "h")
    control = ControlSocket(session(recent=log.recent), tmp_path / "control-1.sock")
    told = follow(tmp_path / "control-1.sock", 10.0)
    log.emit("join_requested", rank=0, size=1, epoch=0, step=0, id="j", host="")
    next(told)
    for step in range(1000):
        log.emit("join_requested", rank=0, size=1, epoch=0, step=step, id="j" * 1000, host="")
    control.close()
    cast("Generator[object]", told).close()


def test_a_member_is_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_mpi.elastic.control.LEAVE_DEADLINE_S", 1e6)  # this process is not to end at it
    asked: queue.SimpleQueue[object] = queue.SimpleQueue()
    leaving = session(told_to_end=False, request_stop=asked.put)
    control = ControlSocket(leaving, tmp_path / "control-1.sock")
    try:
        assert end_ranks(tmp_path, "SIGHUP", 10.0)
        assert asked.get(timeout=10) == "SIGHUP"
        assert leaving.told_by == "SIGHUP"
    finally:
        control.close()


def test_members_that_hang_keep_nobody_from_being_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_mpi.elastic.control.LEAVE_DEADLINE_S", 1e6)  # this process is not to end at it
    asked: queue.SimpleQueue[object] = queue.SimpleQueue()
    leaving = session(told_to_end=False, request_stop=asked.put)
    hanging = [sockets.listen(tmp_path / f"control-{number}.sock") for number in range(1, 6)]
    control = ControlSocket(leaving, tmp_path / "control-9.sock")  # comes last
    telling = threading.Thread(target=end_ranks, args=(tmp_path, "SIGTERM", 10.0))
    began = time.monotonic()
    try:
        telling.start()
        assert asked.get(timeout=20)
        assert time.monotonic() - began < 3
        telling.join(20)
        assert time.monotonic() - began < 5, "they were waited for together"
        for listener in hanging:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(100) == b'{"do": "end", "signal": "SIGTERM", "limit_s": 10.0}\n'
    finally:
        control.close()
        for listener in hanging:
            listener.close()


def test_a_script_that_works_on_after_training_ends_as_any_other() -> None:
    script = """if True:
        import os, signal, time
        from types import SimpleNamespace
        from chaos_mpi.elastic.control import leave_on_sigterm
        leave_on_sigterm(SimpleNamespace(member=f"h:{os.getpid()}", host="h", ends_well=False, told_to_end=False))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)
    """
    ended = subprocess.run([sys.executable, "-c", script], timeout=40, check=False)
    assert ended.returncode == -signal.SIGTERM


def test_processes_that_a_rank_forks_end_by_sigterm_as_any_other() -> None:
    """Whoever ends workers that wait for a lock waits for their end: they would not come to run a handler."""
    program = """if True:
        import multiprocessing, os, signal
        from types import SimpleNamespace
        from chaos_mpi.elastic.control import leave_on_sigterm
        leave_on_sigterm(SimpleNamespace(member=f"h:{os.getpid()}", host="h", ends_well=True, told_to_end=False))
        assert callable(signal.getsignal(signal.SIGTERM))
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply(signal.getsignal, (signal.SIGTERM,)) is signal.SIG_DFL
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        for number in range(200):  # ended when they have hardly begun
            process = multiprocessing.get_context("fork").Process(target=signal.pause)
            process.start()
            process.terminate()
            process.join(20)
            assert process.exitcode == -signal.SIGTERM, number
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the script's own is its children's as well
        kept = lambda: os._exit(signal.getsignal(signal.SIGTERM) is signal.default_int_handler)
        process = multiprocessing.get_context("fork").Process(target=kept)
        process.start()
        process.join(20)
        assert process.exitcode == 1
    """
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_whoever_is_given_longer_later_has_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: queue.SimpleQueue[object] = queue.SimpleQueue()
    monkeypatch.setattr("chaos_mpi.elastic.control.LEAVE_DEADLINE_S", 0.5)
    monkeypatch.setattr("chaos_mpi.elastic.control._end_now", ended.put)
    rank: Any = SimpleNamespace(
        told_to_end=False, told_by="", request_leave=lambda *_: None, request_stop=lambda _: None, deadline=None
    )
    end_soon(rank, "SIGTERM")
    stop_soon(rank, "SIGINT", 300.0)
    assert rank.told_by == "SIGTERM"
    with pytest.raises(queue.Empty):
        ended.get(timeout=1.0)
    stop_soon(rank, "SIGINT", 0.1)  # it does not get shorter
    assert rank.deadline.interval == 300.0
    rank.deadline.cancel()


def test_nobody_is_told_to_end_where_nobody_is(tmp_path: Path) -> None:
    (tmp_path / "control-7.sock").touch()  # what a member that was killed leaves
    assert not end_ranks(tmp_path, "SIGHUP", 10.0)
