"""Where the output of a rank goes: pipes of the kernel, and a launcher that takes it, is gone, or does not read."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from chaos_mpi.agent.frames import MAGIC, Decoder, Kind
from chaos_mpi.agent.output import Output, default_log_directory
from chaos_mpi.agent.streams import PipeWriter, pipe_reader

LIMIT_S = 20.0


async def pump(output: Output, data: bytes) -> None:
    """Have all of this pass."""
    ours, theirs = os.pipe()
    reader = await pipe_reader(ours)
    writer = await PipeWriter.open(theirs)
    writer.write(data)
    await asyncio.gather(output.pump(reader, Kind.STDOUT), writer.close(LIMIT_S))


def test_a_launcher_that_reads_gets_all(tmp_path: Path) -> None:
    async def run() -> bytes:
        ours, theirs = os.pipe()
        launcher, reader = await PipeWriter.open(theirs), await pipe_reader(ours)
        output = Output(launcher, tmp_path / "rank.log")
        reading = asyncio.create_task(reader.read())
        await pump(output, b"line\n" * 100_000)
        await launcher.close(LIMIT_S)
        return await reading

    _, frames = Decoder().feed(MAGIC + asyncio.run(asyncio.wait_for(run(), LIMIT_S)))
    assert b"".join(frame.content for frame in frames) == b"line\n" * 100_000
    assert {frame.kind for frame in frames} == {Kind.STDOUT}
    assert not (tmp_path / "rank.log").exists()


def test_a_launcher_that_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    async def run() -> int:
        ours, theirs = os.pipe()
        launcher = await PipeWriter.open(theirs)
        output = Output(launcher, tmp_path / "rank.log", stall_s=0.1)
        await pump(output, b"x" * 1_000_000)
        kept = launcher.kept_bytes
        launcher.abandon()
        os.close(ours)
        output.close()
        return kept

    kept = asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    logged = (tmp_path / "rank.log").stat().st_size
    assert logged >= 1_000_000 - kept - 200_000  # what is neither fits in a pipe and a frame or two
    assert kept > 0


def test_without_a_launcher_output_goes_to_the_file(tmp_path: Path) -> None:
    async def run() -> None:
        ours, theirs = os.pipe()
        launcher = await PipeWriter.open(theirs)
        output = Output(launcher, tmp_path / "job" / "rank.log")
        output.lost = True
        await pump(output, b"first\n")
        await pump(output, b"second\n")
        output.close()
        launcher.abandon()
        os.close(ours)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    log = tmp_path / "job" / "rank.log"
    assert log.read_bytes() == b"first\nsecond\n"
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700


def test_the_file_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_mpi.agent.output.LOG_BYTES", 10_000)
    said = b"".join(b"%9d\n" % number for number in range(10_000))

    async def run() -> None:
        ours, theirs = os.pipe()
        launcher = await PipeWriter.open(theirs)
        output = Output(launcher, tmp_path / "rank.log")
        output.lost = True
        for begin in range(0, len(said), 4000):
            await pump(output, said[begin : begin + 4000])
        output._file.close(LIMIT_S)
        launcher.abandon()
        os.close(ours)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    before, last = (tmp_path / "rank.log.1").read_bytes(), (tmp_path / "rank.log").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank.log", "rank.log.1"]
    assert said.endswith(before + last) and 10_000 < len(before + last) <= 20_000


def test_a_file_that_cannot_be_written_does_not_stop_the_rank(tmp_path: Path) -> None:
    async def run() -> None:
        ours, theirs = os.pipe()
        launcher = await PipeWriter.open(theirs)
        os.close(ours)
        output = Output(launcher, tmp_path / "file" / "rank.log")
        output.lost = True
        await pump(output, b"lost\n" * 100_000)
        launcher.abandon()

    (tmp_path / "file").touch()
    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_where_logs_are() -> None:
    assert default_log_directory({"XDG_STATE_HOME": "/state"}) == Path("/state/chaos_mpi/logs")
    home = Path.home() / ".local/state/chaos_mpi/logs"
    assert default_log_directory({}) == default_log_directory({"XDG_STATE_HOME": "relative"}) == home
