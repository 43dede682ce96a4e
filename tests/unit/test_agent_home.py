"""The private directory of a job on the host of a rank, and its control socket at the launch host."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from chaos_mpi.agent import sockets
from chaos_mpi.agent.control import ControlConnector, ControlListener
from chaos_mpi.agent.frames import Frame, Kind
from chaos_mpi.agent.home import Home, note_down
from chaos_mpi.agent.marks import started
from chaos_mpi.cli.running import private_directories
from chaos_mpi.errors import EngineError

LIMIT_S = 10.0


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_the_last_one_removes_it() -> None:
    first = Home("chaosrun-x")
    assert first.path.name == f"chaosrun-x-{socket.gethostname()}"
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    (first.path / "supervisor-1.json").touch()
    (first.path / "said.abc").touch()
    first.close(None)
    assert sorted(p.name for p in first.path.iterdir()) == ["said.abc", "supervisor-1.json"]
    second = Home("chaosrun-x")
    (first.path / "supervisor-1.json").unlink()
    second.close(None)
    assert not second.path.exists()


def is_held(directory: Path) -> bool:
    """Whether systemd-tmpfiles would leave it alone."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_what_removes_old_files_is_kept_off_while_a_supervisor_lives() -> None:
    first, second = Home("chaosrun-x"), Home("chaosrun-x")
    (first.path / "supervisor-1.json").touch()  # another one, which keeps the directory
    assert is_held(first.path)
    first.close(None)
    assert is_held(first.path)
    second.close(None)
    assert first.path.exists() and not is_held(first.path)


def test_what_removes_old_files_is_kept_off_while_chaosrun_lives() -> None:
    with private_directories("train.py") as (directory, _):
        assert is_held(directory)
    assert not directory.exists()


def test_a_supervisor_that_was_killed_does_not_keep_it() -> None:
    killed, last = Home("chaosrun-x"), Home("chaosrun-x")
    (mark,) = killed.path.glob("supervisor-*.json")
    with subprocess.Popen(["sleep", "60"]) as process:
        process.kill()
    other = mark.with_name(f"supervisor-{process.pid}.json")
    other.write_text(mark.read_text())
    last.close(None)
    assert not last.path.exists()


def test_records_are_told_once() -> None:
    home, pid = Home("chaosrun-x"), os.getpid()
    assert list(home.new_records(pid)) == []
    note_down(home.path, "outcome", {"outcome": "finished"})
    note_down(home.path, "starting", {"rank": 1})
    (home.path / f"member-{pid}.json").write_text("{")
    began = started()
    told = [("starting", {"rank": 1, **began}), ("outcome", {"outcome": "finished", **began})]
    assert list(home.new_records(pid)) == told
    assert list(home.new_records(pid)) == []
    note_down(home.path, "outcome", {"outcome": "failed afterwards"})
    assert list(home.new_records(pid)) == [("outcome", {"outcome": "failed afterwards", **began})]
    home.close(pid)
    assert not home.path.exists()


@pytest.mark.parametrize("what", ["open to others", "a link", "a file"])
def test_what_is_not_private_is_refused(temporary: Path, what: str) -> None:
    place = temporary / f"chaosrun-x-{socket.gethostname()}"
    if what == "a link":
        place.symlink_to(temporary)
    elif what == "a file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o755)
    with pytest.raises(EngineError, match=str(place)):
        Home("chaosrun-x")


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A member: greets, takes a line, answers with two, hangs up."""
    writer.write(b"hello\n")
    asked = await reader.readline()
    writer.write(asked.upper() + b"x" * 300_000 + b"\n")
    writer.close()


def _joined(near: Path, far: Path) -> tuple[ControlListener, ControlConnector]:
    """The two ends, with nothing but a function call in between."""
    loop = asyncio.get_running_loop()
    ends: list[ControlConnector | ControlListener] = []
    listener = ControlListener(near, lambda frame: loop.call_soon(ends[1].deliver, frame))
    connector = ControlConnector(far, lambda frame: loop.call_soon(ends[0].deliver, frame))
    ends += [listener, connector]
    return listener, connector


def test_conversations_go_through(temporary: Path) -> None:
    async def talk(near: Path, word: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(near))
        assert await reader.readline() == b"hello\n"
        writer.write(word)
        answer = await reader.read()
        writer.close()
        return answer

    async def run() -> None:
        near, far = temporary / "near", temporary / "far"
        server = await asyncio.start_unix_server(_answer, sock=sockets.listen(far))
        listener, connector = _joined(near, far)
        await listener.open()
        assert stat.S_IMODE(near.stat().st_mode) == 0o600
        async with asyncio.timeout(LIMIT_S):
            answers = await asyncio.gather(talk(near, b"one\n"), talk(near, b"two\n"))
        assert [answer[:4] for answer in answers] == [b"ONE\n", b"TWO\n"]
        assert [len(answer) for answer in answers] == [300_005, 300_005]
        await listener.close()
        await connector.close()
        assert not near.exists()
        server.close()

    asyncio.run(run())


def test_a_rank_that_is_not_there(temporary: Path) -> None:
    async def run() -> bytes:
        listener, _ = _joined(temporary / "near", temporary / "nobody")
        await listener.open()
        async with asyncio.timeout(LIMIT_S):
            reader, _ = await asyncio.open_unix_connection(str(temporary / "near"))
            heard = await reader.read()
        await listener.close()
        return heard

    assert asyncio.run(run()) == b""


def test_frames_of_unknown_connections_do_no_harm(temporary: Path) -> None:
    async def run() -> None:
        listener, connector = _joined(temporary / "near", temporary / "far")
        for end in (listener, connector):
            end.deliver(Frame(Kind.CONTROL_DATA, json.dumps({}).encode(), 7))
            end.deliver(Frame(Kind.CONTROL_CLOSE, b"", 7))

    asyncio.run(run())
