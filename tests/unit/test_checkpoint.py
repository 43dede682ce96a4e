"""Checkpoints: whole or not at all, verified when read, and never in the way of training."""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chaos_mpi.elastic import checkpoint
from chaos_mpi.elastic.checkpoint import CheckpointWriter, checkpoint_path, latest, load, load_latest, save_now
from chaos_mpi.elastic.digest import params_digest
from chaos_mpi.errors import CheckpointError
from chaos_mpi.replication.tree import Packed, pack, unpack


def small(value: float = 1.0) -> Packed:
    return pack({"w": torch.full((3,), value), "step": 5}, clone=True)


def steps(directory: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(directory)]


def test_round_trip_of_every_kind_of_tensor(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    tree = {
        "tied": [weight, weight], "transposed": weight.T, "slice": weight[1:, :2], "zero": torch.tensor(2.5),
        "empty": torch.empty(0, 3), "none": None, "nan": float("nan"), "name": "ünï\ud800",
        **{str(dtype): torch.ones(5, dtype=torch.uint8).to(dtype) for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.uint16,
            torch.complex64, torch.complex128, torch.float8_e4m3fn)},
        "complex scalar": torch.tensor(1 + 2j),
    }  # fmt: skip
    packed = pack(tree, clone=False)
    path = tmp_path / "new" / "step-000000012.safetensors"
    save_now(path, 12, packed)
    back = load(path)
    assert back.skeleton == packed.skeleton
    assert params_digest(sorted(back.tensors.items())) == params_digest(sorted(packed.tensors.items()))
    assert torch.equal(unpack(back)["transposed"], weight.T)
    assert unpack(back)["tied"][0] is unpack(back)["tied"][1]


def test_a_tree_without_tensors(tmp_path: Path) -> None:
    save_now(tmp_path / "step-000000001.safetensors", 1, pack({"a": 1}, clone=True))
    assert unpack(load(tmp_path / "step-000000001.safetensors")) == {"a": 1}


def test_other_tools_can_read_the_file(tmp_path: Path) -> None:
    save_now(tmp_path / "a", 1, small(7))
    assert load_file(tmp_path / "a")["w"].tolist() == [7, 7, 7]


def test_nothing_but_the_checkpoint_is_left_behind(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    save_now(path, 3, small())
    assert os.listdir(tmp_path) == ["step-000000003.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint_path(tmp_path, 3)
    save_now(path, 3, small(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step 3 could not be written to .*: No space left on device"):
        save_now(path, 3, small(2))
    assert os.listdir(tmp_path) == [path.name]
    assert load(path).tensors["w"].tolist() == [1, 1, 1]


def test_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    save_now(checkpoint_path(tmp_path, 1), 1, small())
    assert calls == ["fsync", "replace", "fsync"]


def test_damage_anywhere_is_noticed(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    save_now(path, 1, small())
    whole = path.read_bytes()
    for length in (0, 5, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            load(path)
    unnoticed = []
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            back = load(path)
        except CheckpointError:
            continue
        # Notes that do not touch the content, as the version of the package, may change.
        assert back.skeleton == small().skeleton
        assert torch.equal(back.tensors["w"], small().tensors["w"])
        unnoticed.append(position)
    assert len(unnoticed) < 40


def test_foreign_newer_missing_and_unreadable_files(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(path)
    save_file({"w": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint that chaos_mpi wrote"):
        load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=str(path)):
        load(path)
    path.rmdir()
    save_now(path, 1, small())
    data = path.read_bytes()
    assert data.count(b'"format_version":"2"') == 1
    path.write_bytes(data.replace(b'"format_version":"2"', b'"format_version":"3"'))
    with pytest.raises(CheckpointError, match=r"written by chaos_mpi .* in format 3.*upgrade"):
        load(path)
    save_now(checkpoint_path(tmp_path, 0), 0, small())
    with pytest.raises(CheckpointError, match="upgrade"):  # an older one would silently lose steps
        load_latest(tmp_path)


def test_a_file_of_the_first_format(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    save_now(path, 1, small())
    digest = checkpoint.stored_digest(path).encode()
    first = path.read_bytes().replace(b'"format_version":"2"', b'"format_version":"1"')
    path.write_bytes(first)
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)
    path.write_bytes(first.replace(digest, b"dc9d38680300919e02e5cc5cd0240aef"))  # as it was written then
    assert load(path).tensors["w"].tolist() == [1, 1, 1]


def test_load_latest_passes_over_damage_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    for step in (9, 10, 1_000_000_000):
        save_now(checkpoint_path(tmp_path, step), step, small(step))
    assert steps(tmp_path) == [9, 10, 1_000_000_000]
    newest = latest(tmp_path)
    assert newest == checkpoint_path(tmp_path, 1_000_000_000)
    assert newest is not None
    os.truncate(newest, newest.stat().st_size - 4)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded[0] == 10
    assert loaded[1].tensors["w"].tolist() == [10, 10, 10]
    assert "step-1000000000.safetensors is not a whole checkpoint" in caplog.text
    for path in checkpoint.list_checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no usable checkpoint in"):
        load_latest(tmp_path)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("step-1.safetensors", "model.safetensors", "step-000000001.safetensors.bak", ".step-000000001.h.tmp"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoint.list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="not named like a checkpoint"):
        checkpoint.step_of(tmp_path / "model.safetensors")


def test_the_writer_keeps_the_newest(tmp_path: Path) -> None:
    stale = tmp_path / ".step-000000001.host.77.1.tmp"
    fresh = tmp_path / ".step-000000002.host.78.1.tmp"
    for path in (stale, fresh):
        path.touch()
    os.utime(stale, (0, 0))
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        writer.submit(step, small(step))
        assert writer.flush(5)
    assert writer.close(5)
    assert steps(tmp_path) == [3, 4]
    assert writer.last_error is None
    assert not stale.exists()
    assert fresh.exists()
    with pytest.raises(CheckpointError, match="closed"):
        writer.submit(5, small())


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    for step in (100, 200):
        save_now(checkpoint_path(tmp_path, step), step, small())
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.submit(5, small())
    assert writer.close(5)
    assert 5 in steps(tmp_path)


def test_submit_never_waits_and_the_newest_replaces_a_waiting_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    save = checkpoint.save_now

    def slow(path: Path, step: int, packed: Packed) -> None:
        started.set()
        go_on.wait(30)
        save(path, step, packed)

    monkeypatch.setattr(checkpoint, "save_now", slow)
    writer = CheckpointWriter(tmp_path, keep=9)
    writer.submit(1, small())
    assert started.wait(5)
    for step in (2, 3, 4):
        writer.submit(step, small())  # it would wait for what only the end of this test lets go on
    assert not writer.flush(0.02)
    assert not writer.close(0.02)
    go_on.set()
    assert writer.close(5)  # and what waited is written before the end
    assert steps(tmp_path) == [1, 4]


def test_a_disk_that_fails_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.submit(1, small())
    assert writer.flush(5)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(os, "fsync", full)
        writer.submit(2, small())
        assert writer.flush(5)
        assert len(caplog.records) == 1
        assert "No space left on device; training goes on" in caplog.text
        assert isinstance(writer.last_error, CheckpointError)
        assert steps(tmp_path) == [1]
        patch.setattr(checkpoint, "save_now", lambda *_: 1 / 0)
        writer.submit(3, small())
        assert writer.flush(5)
        assert "division by zero" in str(writer.last_error)
    writer.submit(4, small())
    assert writer.close(5)
    assert writer.last_error is None
    assert steps(tmp_path) == [4]


def test_an_unusable_directory_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file cannot be written to: "):
        CheckpointWriter(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        CheckpointWriter("/proc/no")
    with pytest.raises(CheckpointError, match="keep must be at least 1"):
        CheckpointWriter(tmp_path, keep=0)


def test_too_much_that_is_not_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="keep long lists of numbers as tensors"):
        save_now(tmp_path / "a", 1, pack(list(range(1000)), clone=True))
    assert os.listdir(tmp_path) == []


def test_the_metadata(tmp_path: Path) -> None:
    save_now(tmp_path / "a", 42, small())
    data = (tmp_path / "a").read_bytes()
    metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    assert (metadata["writer"], metadata["step"], metadata["format_version"]) == ("chaos_mpi", "42", "2")
    assert len(metadata["digest"]) == 32
