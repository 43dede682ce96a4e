"""What jobs that were killed have left is removed, and nothing of those that may live."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos_mpi.agent.marks import here
from chaos_mpi.agent.processes import start_time
from chaos_mpi.cli.control import LAUNCHER, MEMORY_FILE, own_directories, remove_left_over


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "t"
    made.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(made))
    return made


@pytest.fixture
def living() -> Iterator[dict[str, Any]]:
    """What a file says of a process that lives."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield {"pid": process.pid, "started": start_time(process.pid), **here()}
        process.kill()


@pytest.fixture
def gone() -> dict[str, Any]:
    """What a file says of one that has ended."""
    with subprocess.Popen(["sleep", "60"]) as process:
        fields = {"pid": process.pid, "started": start_time(process.pid), **here()}
        process.kill()
    return fields


def job(where: Path, name: str, **files: dict[str, Any]) -> Path:
    """The private directory of a job, with files of these kinds."""
    made = where / name
    made.mkdir(mode=0o700)
    for kind, fields in files.items():
        (made / f"{kind}-{fields['pid']}.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "pid"}))
    return made


def test_a_job_all_of_whose_processes_are_gone_is_removed(temporary: Path, gone: dict[str, Any]) -> None:
    memory = temporary.parent / "chaosrun-memory"
    memory.mkdir()
    left = job(temporary, "chaosrun-a", launcher=gone, member=gone)
    (left / MEMORY_FILE).write_text(str(memory))
    (left / "control-1.sock").touch()
    remove_left_over()
    assert not left.exists() and not memory.exists()


def test_a_number_that_another_process_has_now_is_no_sign_of_life(
    temporary: Path, living: dict[str, Any], gone: dict[str, Any]
) -> None:
    later = {**living, "started": living["started"] - 1}
    left = job(temporary, "chaosrun-a", launcher=later, member=later, supervisor=gone)
    remove_left_over()
    assert not left.exists()


@pytest.mark.parametrize("kind", ["member", "starting", "proxy", "contact", "supervisor", "launcher"])
def test_a_job_of_which_anything_lives_is_kept(
    kind: str, temporary: Path, living: dict[str, Any], gone: dict[str, Any]
) -> None:
    kept = job(temporary, "chaosrun-a", launcher=gone)
    path = kept / f"{kind}-{living['pid']}.json"
    entry = ["edge1", "job", 0, living["pid"], living["started"]]  # as the registry of proxies has it
    path.write_text(json.dumps(entry if kind == "proxy" else living))
    remove_left_over()
    assert kept.exists()
    if kind != "launcher":
        path.write_text("{")
        remove_left_over()
        assert kept.exists(), "of a file that cannot be read the number of the process counts"


def test_a_job_is_found_where_there_was_room_when_it_was_started(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: dict[str, Any]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    jobs = [job(temporary, "chaosrun-b", launcher=gone), job(other, "chaosrun-a", launcher=gone)]
    assert own_directories() == jobs[:1], "the directory for temporary files was chosen"
    monkeypatch.setattr("chaos_mpi.cli.control._PLACES", (str(temporary), str(other), str(tmp_path / "none")))
    assert own_directories() == jobs
    remove_left_over()
    assert own_directories() == []


def test_ranks_that_train_on_without_their_launcher_keep_all_of_the_job(
    temporary: Path, living: dict[str, Any], gone: dict[str, Any]
) -> None:
    launcher = job(temporary, "chaosrun-a", launcher=gone)
    home = job(temporary, "chaosrun-a-host", supervisor=gone, member=living)
    other = job(temporary, "chaosrun-b", launcher=gone)
    remove_left_over()
    assert launcher.exists() and home.exists() and not other.exists()


@pytest.mark.parametrize(
    "why", ["another host", "another of that name", "other numbers", "it does not say", "nothing is there"]
)
def test_what_may_be_of_another_machine_is_kept(why: str, temporary: Path, gone: dict[str, Any]) -> None:
    said = {
        "another host": {**gone, "host": "elsewhere"},
        "another of that name": {**gone, "machine": "0123456789abcdef0123456789abcdef"},
        "other numbers": {**gone, "namespace": 1},
        "it does not say": {"pid": gone["pid"], "started": gone["started"]},
    }
    kept = job(temporary, "chaosrun-a", **({LAUNCHER: said[why]} if why in said else {}))
    remove_left_over()
    assert kept.exists()


def test_a_machine_is_known_by_its_id_if_it_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_mpi.agent.marks.MACHINE_ID", tmp_path / "machine-id")
    assert here()["machine"] == ""
    (tmp_path / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    assert here()["machine"] == "0123456789abcdef0123456789abcdef"


def test_what_is_not_this_users_alone_is_kept(temporary: Path, gone: dict[str, Any]) -> None:
    kept = [job(temporary, f"chaosrun-{name}", launcher=gone) for name in "ab"]
    kept[0].chmod(0o755)
    if os.geteuid() == 0:
        os.chown(kept[1], 65534, 65534)
    else:
        kept.pop()
    elsewhere = job(temporary.parent, "chaosrun-c", launcher=gone)
    (temporary / "chaosrun-c").symlink_to(elsewhere)
    remove_left_over()
    assert all(path.exists() for path in [*kept, elsewhere / f"launcher-{gone['pid']}.json"])
