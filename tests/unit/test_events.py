"""The event log: lines that anything can read, and no effect on training whatever the disk does."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chaos_mpi.events import EVENTS, RECENT, EventLog, expand, read_events

WHERE = {"rank": 1, "size": 4, "epoch": 2, "step": 7}


def written(path: Path, **fields: Any) -> dict[str, Any]:
    log = EventLog(str(path), "h:1", "h")
    log.emit("step", **WHERE, **fields)
    assert log.close(5)
    return read_events(path)[-1]


def test_a_line_has_the_fields_of_the_contract(tmp_path: Path) -> None:
    before = time.time()
    event = written(tmp_path / "e.jsonl", loss=0.5)
    assert before <= event.pop("t") <= time.time()
    assert event.pop("mono") <= time.monotonic()
    assert event == {"member": "h:1", **WHERE, "event": "step", "loss": 0.5}
    assert len((tmp_path / "e.jsonl").read_bytes().splitlines()) == 1


def test_time_is_that_of_emit_not_of_writing(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "e"), "h:1", "h")
    times = []
    for _ in range(3):
        log.emit("stalled", **WHERE)
        times.append(time.monotonic())
        time.sleep(0.02)
    log.close(5)
    assert all(event["mono"] <= at for event, at in zip(read_events(tmp_path / "e"), times, strict=True))


def test_what_json_does_not_know_stays_valid_json(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "loss": float("nan"),
        "gain": np.float32("inf"),
        "nested": {"a": [float("-inf"), 1.5]},
        "odd_keys": {(1, 2): None},
        "count": np.int64(3),
        "tensor": torch.tensor([1.0, float("nan")]),
        "file": Path("x"),
        "names": {"b", "a"},
    }
    fields["itself"] = [fields]
    path = tmp_path / "e"
    event = written(path, **fields)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert event["loss"] is None
    assert event["gain"] is None
    assert event["nested"] == {"a": [None, 1.5]}
    assert (event["count"], event["tensor"], event["file"], event["names"]) == (3, [1.0, None], "x", ["a", "b"])


def test_a_list_that_changes_after_emit_is_logged_as_it_was(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "e"), "h:1", "h")
    members = ["a"]
    log.emit("view_committed", **WHERE, members=members)
    members.append("b")
    log.close(5)
    assert read_events(tmp_path / "e")[0]["members"] == ["a"]


def test_path_template(tmp_path: Path) -> None:
    assert expand("/l/%h-%m.jsonl", "node/1:42", "node/1") == "/l/node-1-node-1-42.jsonl"
    template = str(tmp_path / "sub" / "%h" / "%m.jsonl")
    for pid in (1, 2):
        log = EventLog(template, f"h:{pid}", "h")
        log.emit("session_started", **WHERE)
        log.close(5)
    assert sorted(p.name for p in (tmp_path / "sub" / "h").iterdir()) == ["h-1.jsonl", "h-2.jsonl"]
    assert [event["member"] for event in read_events(template)] == ["h:1", "h:2"]


def test_unknown_names_are_programming_errors_even_without_a_log() -> None:
    with pytest.raises(ValueError, match="unknown event 'stpe'"):
        EventLog(None, "h:1", "h").emit("stpe", **WHERE)
    assert "step" in EVENTS


def test_reserved_field_names_are_refused(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "e"), "h:1", "h")
    with pytest.raises(ValueError, match=r"reserved name: \['mono'\]"):
        log.emit("step", **WHERE, mono=1)
    log.close(5)


def test_no_log_costs_nothing() -> None:
    log = EventLog(None, "h:1", "h")
    threads = threading.active_count()
    log.emit("step", **WHERE, loss=object())  # it is not even looked at
    assert threading.active_count() == threads
    assert log.flush(0)
    assert log.close(0)


@pytest.mark.parametrize("template", [None, "e"])
def test_the_last_events_are_remembered_with_or_without_a_log(template: str | None, tmp_path: Path) -> None:
    log = EventLog(tmp_path / template if template else None, "h:1", "h")
    members = ["a"]
    log.emit("view_committed", **WHERE, members=members, weight=np.float32(1.5))
    members.append("b")
    log.emit("step", **WHERE, loss=1.0)
    (event,) = log.recent.events()
    assert (event["event"], event["members"], event["weight"], event["epoch"]) == ("view_committed", ["a"], 1.5, 2)
    for number in range(2 * RECENT):
        log.emit("stalled", **WHERE, seconds=0.5, cause=("join", "failure")[number % 2])
    assert [e["event"] for e in log.recent.events()] == ["stalled"] * RECENT
    assert log.recent.stalled_s == {"join": RECENT / 2, "failure": RECENT / 2}
    log.close(5)


def test_flush_waits_and_close_ends(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "e"), "h:1", "h")
    for _ in range(500):
        log.emit("step", **WHERE)
    assert log.flush(5)
    assert len(read_events(tmp_path / "e")) == 500
    assert log.close(5)
    log.emit("step", **WHERE)
    assert log.close(5)
    assert len(read_events(tmp_path / "e")) == 500


def test_nothing_is_created_without_an_event(tmp_path: Path) -> None:
    EventLog(str(tmp_path / "sub" / "e"), "h:1", "h").close(5)
    assert not (tmp_path / "sub").exists()


def test_a_write_error_is_logged_once_and_never_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    log = EventLog(str(full), "h:1", "h")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            log.emit("step", **WHERE)
            log.flush(5)
    assert log.close(5)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert "is off now" in caplog.text


def test_emit_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it for writing blocks until somebody reads
    log = EventLog(str(fifo), "h:1", "h")
    log.emit("step", **WHERE)  # it would wait until somebody reads, which happens only below
    assert not log.flush(0.05)
    assert not log.close(0.05)
    with fifo.open("rb") as reader:
        assert b'"event":"step"' in reader.read()


def _emit_many(path: str, number: int) -> None:
    log = EventLog(path, f"h:{number}", "h")
    for _ in range(200):
        log.emit("step", **WHERE, filler="x" * 3000)
    log.close(10)


def test_several_processes_share_one_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "e")
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_emit_many, args=(path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(read_events(path)) == 600
    assert not caplog.records


def test_torn_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "e"
    path.write_bytes(b'{"t":2,"event":"step"}\n{"t":1,"event":"step"}\n{"t":3,"ev')
    assert [event["t"] for event in read_events(path)] == [1, 2]
    assert not caplog.records
    path.write_bytes(b'{"t":2,"ev{"t":1,"event":"step"}\n{"t":3}\n')
    assert [event["t"] for event in read_events(path)] == [3]
    assert "line 1" in caplog.text


def test_missing_files(tmp_path: Path) -> None:
    assert read_events(tmp_path / "*.jsonl") == []
    with pytest.raises(FileNotFoundError):
        read_events(tmp_path / "e.jsonl")
