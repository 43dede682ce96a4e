"""What chaosrun makes of the records that the ranks of a job left."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from chaos_mpi.agent.marks import started
from chaos_mpi.cli.outcome import (
    Record,
    RecordReader,
    Records,
    Verdict,
    describe_status,
    judge,
    lives,
    read_records,
    untold,
)


def records(*outcomes: Record, members: int | None = None, starting: int = 0) -> Records:
    """Records of ranks with these outcomes, among so many members."""
    return Records(
        starting={pid: {} for pid in range(100, 100 + starting)},
        members={pid: {} for pid in range(100, 100 + (len(outcomes) if members is None else members))},
        outcomes=dict(enumerate(outcomes, 100)),
    )


FINISHED = {"outcome": "finished", "message": ""}
CRASHED = {"outcome": "crashed", "message": "ValueError: oh"}
STOPPED = {"outcome": "stopped", "message": "too few ranks; the state is in ckpt"}
FAILED = {"outcome": "failed", "message": "waited in vain"}
CUT_OFF = {"outcome": "cut off", "message": "a is not heard"}
MOVED = {"outcome": "moved", "message": "the job moved to another launcher after step 5"}
LEFT = {"outcome": "left", "message": ""}

CASES: dict[str, tuple[Records, int, Verdict]] = {
    "all finished": (records(FINISHED, FINISHED), 0, Verdict(0)),
    "a rank was killed on the way": (records(FINISHED, FINISHED, members=3), 137, Verdict(0)),
    "a rank left on the way": (records(LEFT, FINISHED), 0, Verdict(0)),
    "one crashed, the rest finished": (
        records(CRASHED, FINISHED, FINISHED), 1,
        Verdict(0, "training finished, but 1 of 3 ranks crashed on the way: ValueError: oh"),
    ),
    "one was started again, and crashed again, as its agent saw": (
        Records(
            {}, {100: {"host": "a"}, 101: {"host": "b"}, 102: {"host": "b", "joined": True}, 103: {"host": "c"}},
            {100: FINISHED, 101: CRASHED}, crashes={101: {"how": "by an error"}, 102: {"how": "SIGSEGV"}},
        ), 137,
        Verdict(0, "training finished, but 2 of 4 ranks (1 of them joined later) crashed on the way: ValueError: oh"),
    ),
    "one crashed and could not say so, one was lost with its host": (
        Records({}, {100: {}, 101: {"host": "b"}, 102: {"host": "c"}}, {100: FINISHED}, {}, {101: {"how": "SIGSEGV"}}),
        137, Verdict(0, "training finished, but 1 of 3 ranks crashed on the way: SIGSEGV, host b"),
    ),
    "the script failed after training": (
        records(FINISHED, {"outcome": "failed afterwards", "message": "it called sys.exit(5)"}), 5,
        Verdict(1, "it called sys.exit(5)"),
    ),
    "a newcomer never came up": (replace(records(FINISHED, FINISHED), ended={9: {"how": "it ended"}}), 1, Verdict(0)),
    "a rank that finished exits with an error": (
        records(FINISHED, FINISHED, LEFT), 5,
        Verdict(1, "training finished, but the script failed after it: a rank exited with 5"),
    ),
    "a status of mpirun's own, in a job that ranks have joined": (
        Records({}, {100: {}, 101: {"joined": True}}, {100: FINISHED, 101: FINISHED}), 1, Verdict(0),
    ),
    "a status that may be that of a rank which died on the way": (records(FINISHED, members=2), 5, Verdict(0)),
    "all crashed": (records(CRASHED, CRASHED), 1, Verdict(1, "training did not finish: ValueError: oh")),
    "one crashed, the rest died": (
        records(CRASHED, members=3), 137, Verdict(1, "training did not finish: ValueError: oh"),
    ),
    "moved": (records(MOVED, MOVED, members=3), 137, Verdict(4, MOVED["message"])),
    "moved outweighs crashed": (records(CRASHED, MOVED), 1, Verdict(4, MOVED["message"])),
    "stopped": (records(STOPPED, STOPPED, members=4), 3, Verdict(3, STOPPED["message"])),
    "stopped, with no word why": (records({"outcome": "stopped"}), 3, Verdict(3, "the job stopped before the end")),
    "stopped outweighs crashed": (records(CRASHED, STOPPED), 3, Verdict(3, STOPPED["message"])),
    "failed": (records(FAILED), 1, Verdict(1, "waited in vain")),
    "failed, with no word why": (records({"outcome": "failed", "message": ""}), 1, Verdict(1, "the job failed")),
    "failed outweighs finished": (records(FINISHED, FAILED), 0, Verdict(1, "waited in vain")),
    "stopped outweighs failed": (records(FAILED, STOPPED), 1, Verdict(3, STOPPED["message"])),
    "connections were lost": (
        Records({}, {100: {}, 101: {}}, {}, lost={101: {"host": "edge2"}, 100: {"host": "edge1"}}), 137,
        Verdict(
            4,
            "the connections with edge1, edge2 were lost, and the ranks there may train on without this launcher: look "
            "there with 'chaosctl status' before you start it anew; 'chaosctl takeover' gives it another launcher",
        ),
    ),
    "a connection was lost, and a rank had crashed before": (
        Records({}, {100: {}, 101: {}}, {}, crashes={100: {"how": "SIGSEGV"}}, lost={101: {"host": "edge2"}}), 137,
        Verdict(
            4,
            "the connections with edge2 were lost, and the ranks there may train on without this launcher: look there "
            "with 'chaosctl status' before you start it anew; 'chaosctl takeover' gives it another launcher",
        ),
    ),
    "connections were lost, and later the ranks crashed": (
        Records({}, {100: {}}, {}, crashes={100: {"how": "SIGSEGV"}}, lost={100: {"host": "edge1"}}), 137,
        Verdict(1, "training did not finish: all 1 ranks died (mpirun ended with status 137)"),
    ),
    "connections were lost, and the rest finished": (
        Records({}, {100: {}, 101: {}}, {100: FINISHED}, lost={101: {"host": "edge2"}}), 137, Verdict(0),
    ),
    "all are cut off": (
        records(CUT_OFF, {"outcome": "cut off", "message": "b"}, CRASHED), 1,
        Verdict(3, "no part of the job has a majority: a is not heard"),
    ),
    "one was cut off, the rest finished": (records(CUT_OFF, FINISHED, FINISHED), 137, Verdict(0)),
    "all were killed": (
        records(members=2), 137,
        Verdict(1, "training did not finish: all 2 ranks died (mpirun ended with status 137)"),
    ),
    "all were killed, and mpirun": (
        records(members=2), -9,
        Verdict(1, "training did not finish: all 2 ranks died (mpirun was killed by SIGKILL)"),
    ),
    "a script without a session": (records(), 0, Verdict(0)),
    "a script without a session that fails": (
        records(), 5, Verdict(5, "the job failed: mpirun ended with status 5, and no rank opened a chaos_mpi session"),
    ),
    "all died while it started": (
        records(starting=2), 0, Verdict(1, "the job failed: no rank had joined the job yet"),
    ),
    "died while it started": (
        records(starting=2), 137,
        Verdict(137, "the job failed: mpirun ended with status 137, and no rank had joined the job yet"),
    ),
    "mpirun was killed while it started": (
        records(starting=2), -15,
        Verdict(143, "the job failed: mpirun was killed by SIGTERM, and no rank had joined the job yet"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_verdict(case: str) -> None:
    found, mpirun_status, verdict = CASES[case]
    assert judge(found, mpirun_status) == verdict


def test_of_a_script_without_a_session_little_is_known() -> None:
    """mpirun returns 0 when ranks may die, whatever becomes of them."""
    verdict = judge(records(), 0, ranks=2)
    assert verdict.status == 0
    assert "no rank opened a chaos_mpi session, so the job was not elastic" in verdict.message
    assert judge(records(), 0, ranks=2, gave_up=True).status == 1
    assert judge(records(FINISHED, FINISHED), 0, ranks=2, gave_up=True).status == 0


def test_the_first_message_that_says_something_counts() -> None:
    assert judge(records({"outcome": "crashed"}, CRASHED), 1).message == "training did not finish: ValueError: oh"


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "ended with status 0"), (3, "ended with status 3"), (-9, "was killed by SIGKILL"),
     (-200, "was killed by signal 200")],
)  # fmt: skip
def test_describe_status(status: int, words: str) -> None:
    assert describe_status(status) == words


def test_records_are_read_by_kind_and_process(tmp_path: Path) -> None:
    for name, record in (
        ("starting-1", {}),
        ("member-2", {"rank": 0}),
        ("outcome-2", FINISHED),
        ("outcome-3", LEFT),
        ("crash-4", {"how": "SIGSEGV"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert read_records(tmp_path) == Records(
        {1: {}}, {2: {"rank": 0}}, {2: FINISHED, 3: LEFT}, {}, {4: {"how": "SIGSEGV"}}
    )


def test_what_is_no_record_is_left_out(tmp_path: Path) -> None:
    for name, text in (
        ("member-1.json", '{"half": '), ("member-2.json", "[1]"), ("member-x.json", "{}"), ("other-3.json", "{}"),
        ("outcome-4.tmp", "{}"), ("member-5.json", b"\xff\xfe"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "member-6.json").mkdir()
    assert read_records(tmp_path) == Records({}, {}, {})
    assert read_records(tmp_path / "missing") == Records({}, {}, {})


def test_a_record_is_read_once_and_again_when_it_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        opened.append(path.name)
        return read_bytes(path)

    def write(name: str, text: str) -> None:
        new = tmp_path / "new"
        new.write_text(text)
        new.replace(tmp_path / f"{name}.json")

    monkeypatch.setattr(Path, "read_bytes", counted)
    reader = RecordReader(tmp_path)
    write("member-1", "{}")
    write("outcome-1", json.dumps({"step": 1}))
    write("crash-2", "[")
    for _ in range(3):
        assert reader.read() == Records({}, {1: {}}, {1: {"step": 1}})
    assert sorted(opened) == ["crash-2.json", "member-1.json", "outcome-1.json"]
    write("outcome-1", json.dumps({"step": 2}))  # as long as before, and within the same tick of the clock, perhaps
    (tmp_path / "crash-2.json").unlink()
    write("crash-3", "{}")
    for _ in range(3):
        assert reader.read() == Records({}, {1: {}}, {1: {"step": 2}}, {}, {3: {}})
    assert sorted(opened[3:]) == ["crash-3.json", "outcome-1.json"]
    (tmp_path / "member-1.json").unlink()
    assert reader.read().members == {}


def test_hosts_that_did_not_hear_of_the_end() -> None:
    hosts = {pid: f"edge{pid}" for pid in range(1, 8)} | {8: "edge7"}
    members = {pid: {} for pid in (1, 2, 3, 4, 6, 7, 8)}  # the fifth was not one yet
    found = Records(
        {}, members, outcomes={1: FINISHED}, crashes={2: {"how": "SIGSEGV"}}, lost={6: {"host": "edge6"}},
        told={3: {"host": "edge3"}, 7: {"host": "edge7"}},
    )  # fmt: skip
    assert untold(found, hosts) == ["edge4", "edge6", "edge7"]
    assert untold(found, {}) == []


def test_a_number_that_means_nothing_here_tells_nothing(tmp_path: Path) -> None:
    pid, this = os.getpid(), started()
    assert lives(pid, this)
    assert not lives(pid, {**this, "started": this["started"] - 1})
    assert lives(pid, {"started": this["started"] - 1, "namespace": this["namespace"] + 1})  # in a container
