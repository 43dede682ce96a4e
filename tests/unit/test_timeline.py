"""The story of a job, from events."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chaos_mpi.cli.chaosctl import main
from chaos_mpi.cli.timeline import Event, draw, rows, runs


def event(name: str, t: float, step: int = 0, epoch: int = 0, rank: int = 0, size: int = 3, **fields: Any) -> Event:
    """One line of an event log; times count from an arbitrary moment."""
    return {
        "t": 1000.0 + t, "mono": 50.0 + t, "member": f"h:{rank}", "rank": rank, "size": size, "epoch": epoch,
        "step": step, "event": name, **fields,
    }  # fmt: skip


def recovered(t: float, rank: int, total_ms: float, epoch: int = 1) -> Event:
    """A recovery of which each part took a fifth."""
    parts = {f"{part}_ms": total_ms / 5 for part in ("detect", "revoke", "shrink", "exchange", "redo")}
    return event("recovered", t, 5, epoch, rank, 2, total_ms=total_ms, **parts)


def ended(t: float, rank: int, outcome: str = "finished", digest: str = "abc") -> Event:
    """The end of a member."""
    return event("session_ended", t, 9, 1, rank, 2, outcome=outcome, params_digest=digest, message="")


def texts(events: list[Event]) -> list[str]:
    """What the rows say."""
    return [text for _, _, text in rows(events)]


STARTED = [event("session_started", 0.0 + rank / 100, rank=rank, pid=rank, host="h", members=[]) for rank in range(3)]
LOST = [event("view_committed", 2.0, 5, 1, rank, 2, cause="failure", members=[], lost=["h:2"]) for rank in range(2)]


def test_a_death_and_a_good_end() -> None:
    story = rows([*STARTED, *LOST, recovered(2.1, 0, 10), recovered(2.2, 1, 25), ended(4, 0), ended(4.5, 1)])
    assert [(round(t, 6), step, text) for t, step, text in story] == [
        (0.0, 0, "training started with 3 ranks"),
        (2.0, 5, "h:2 died; 2 ranks are left"),
        (2.2, 5, "went on after 25 ms (detect 5, revoke 5, shrink 5, exchange 5, redo 5)"),
        (4.5, 9, "finished; all 2 replicas are bitwise identical (digest abc)"),
    ]


def test_each_view_is_told_once_however_many_members_saw_it() -> None:
    second = [event("view_committed", 3.0, 6, 2, 0, 1, cause="failure", members=[], lost=["h:0", "h:1"])]
    assert texts([*STARTED, *LOST, *second])[1:] == ["h:2 died; 2 ranks are left", "h:0, h:1 died; 1 rank is left"]


def test_a_job_has_not_ended_while_a_rank_of_it_goes_on() -> None:
    started = [event("session_started", 0.0, rank=rank, pid=rank, host="h", members=["h:0", "h:1"]) for rank in (0, 1)]
    crash = ended(2.0, 1, "crashed")
    assert texts([*started, crash])[1:] == []
    assert texts([*started, crash, ended(3.0, 0, "crashed")])[1:] == ["ended: crashed"]
    assert texts([*started, crash, ended(3.0, 0)])[1:] == ["finished; digest abc at the 1 of 2 ranks that this is from"]


def test_rows_are_in_order_of_time() -> None:
    story = rows([ended(9, 0), recovered(2.1, 0, 1), *LOST, *STARTED])
    assert [t for t, _, _ in story] == sorted(t for t, _, _ in story)
    events = [*STARTED, event("step", 1, loss=1.0), *LOST, recovered(2.1, 0, 1), ended(9, 0)]
    assert texts(random.Random(0).sample(events, len(events)))[1:] == texts(events)[1:]


def test_what_becomes_of_links_is_told_once_however_many_members_tell() -> None:
    cut = {"a": "x", "b": "y", "state": "cut", "via": ""}
    round_by = {"a": "x", "b": "y", "state": "detour", "via": "z"}
    news = [event("link_changed", 2 + 0.1 * rank, rank=rank, **cut) for rank in range(2)]  # the far end hears later
    news += [event("link_changed", 3 + 0.1 * rank, rank=rank, **round_by) for rank in range(3)]
    news += [event("link_changed", 4.0, rank=0, **cut), event("link_changed", 5.0, rank=1, **{**cut, "state": "up"})]
    assert texts([*STARTED, *news])[1:] == [
        "link x - y: cut", "link x - y: goes round by z", "link x - y: cut", "link x - y: up",
    ]  # fmt: skip


def test_a_detour_that_cannot_be_had_is_told_once() -> None:
    why = {"a": "x", "b": "y", "reason": "z cannot pass it on"}
    news = [event("detour_failed", 2 + 0.1 * rank, rank=rank, **why) for rank in range(3)]
    assert texts([*STARTED, *news])[1:] == ["link x - y: no detour (z cannot pass it on)"]


def test_what_becomes_of_the_witness_is_told_once() -> None:
    states = ("silent", "up", "silent", "out")
    news = [
        event("witness_changed", 2 + number + 0.1 * rank, rank=rank, witness="w:1", host="w", state=state)
        for number, state in enumerate(states)
        for rank in range(2)
    ]
    assert texts([*STARTED, *news])[1:] == [
        "the witness on w is not reachable", "the witness on w is reachable again",
        "the witness on w is not reachable", "the witness on w is given up, and has no vote any more",
    ]  # fmt: skip


def test_replicas_that_differ_are_named() -> None:
    assert texts([*STARTED, ended(4, 0, digest="abc"), ended(4, 1, digest="xyz")])[-1] == (
        "finished; the 2 replicas DIFFER"
    )


def test_an_end_before_the_end() -> None:
    assert texts([*STARTED, ended(4, 0, "stopped")])[-1] == "ended: stopped"
    assert texts([*STARTED, ended(3, 1, "crashed"), ended(4, 0)])[-1].startswith(
        "finished; digest abc at the 1 of 2 ranks"
    )


def test_a_log_that_breaks_off() -> None:
    assert texts(STARTED) == ["training started with 3 ranks"]
    assert texts([event("step", 1, 1, loss=2.0)]) == []


@pytest.mark.parametrize("cause", ["join", "leave"])
def test_a_change_in_which_nobody_dies_is_no_death(cause: str) -> None:
    changed = event("view_committed", 2.0, 5, 1, 0, 4, cause=cause, members=[], lost=[])
    assert "died" not in texts([*STARTED, changed])[-1]


def test_the_way_of_a_newcomer_is_told_with_the_parts_that_it_had() -> None:
    active = event("join_active", 5.0, 8, 1, 2, 3, total_s=2.0, launch_s=1.2, catch_up_s=0.3, repeated_steps=4)
    assert texts([*STARTED, active])[-1] == (
        f"{active['member']} contributes, 2000 ms after the request (start 1200, catch up 300)"
    )


def test_replicas_that_were_not_compared_are_not_called_identical() -> None:
    story = texts([*STARTED, ended(3, 0, digest=""), ended(4, 1, digest="")])
    assert story[-1] == "finished; the 2 replicas were not compared, as the script has no TrainingState"


def job(began: float, *members: str) -> list[Event]:
    """A job whose last member joins it late."""
    first = [event("session_started", began, members=list(members[:-1])) | {"member": m} for m in members[:-1]]
    newcomer = event("session_started", began + 1, members=[members[-1]]) | {"member": members[-1]}
    joined = [event("view_committed", began + 2, 3, 1, cause="join", members=list(members), lost=[]) | {"member": m}
              for m in members]  # fmt: skip
    steps = [event("step", began + 3, 4, 1, loss=1.0) | {"member": m} for m in members]
    return [*first, newcomer, *joined, *steps]


def test_jobs_in_one_log_are_told_apart() -> None:
    one, two = job(0, "h:1", "h:2", "h:3"), job(100, "h:4", "h:5")
    home = [event("session_started", 101, members=["h:9"]) | {"member": "h:9"}]  # it was to join, and did not
    mixed = [*two, *home, *one]
    random.Random(0).shuffle(mixed)
    found = runs(mixed)
    assert [{e["member"] for e in events} for events in found] == [{"h:1", "h:2", "h:3"}, {"h:4", "h:5"}]
    assert [len(events) for events in found] == [len(one), len(two)]
    assert rows(found[1])[0][0] == 0.0
    assert runs(one) == [sorted(one, key=lambda e: e["t"])]
    assert runs(STARTED) == [STARTED], "nobody has trained yet"


def test_a_resumed_job_is_told_after_the_first(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    events = [*job(0, "h:1", "h:2"), *job(100, "h:3", "h:4")]
    path.write_text("".join(json.dumps(e) + "\n" for e in events))
    told = CliRunner().invoke(main, ["timeline", str(path)]).output.splitlines()
    assert [line[:10] for line in told if line.startswith("job")] == ["job 1 of 2", "job 2 of 2"]
    assert sum("joined" in line for line in told) == 2


@pytest.mark.parametrize("name", ["nothing", ".", "text", "binary", "fields", "times"])
def test_a_log_that_is_none_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "fields").write_text('{"t": 1, "step": 2, "event": "session_started"}\n')
    (tmp_path / "times").write_text('{"t": "noon", "step": 2, "event": "step"}\n')
    (tmp_path / "text").write_text("no events here\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    result = CliRunner().invoke(main, ["timeline", str(tmp_path / name)])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert len(result.output.splitlines()) == 1


def test_a_picture_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = tmp_path / "events.jsonl"
    log.write_text("".join(json.dumps(e) + "\n" for e in STARTED))
    result = CliRunner().invoke(main, ["timeline", str(log), "--plot", str(log / "x.png")])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith("Error: the picture cannot be written")


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steps = [event("step", 0.1 * n, n, int(n > 5), 0, 3 - int(n > 5), loss=1 / n) for n in range(1, 10)]
    for events in ([*STARTED, *steps, *LOST], STARTED):
        path = tmp_path / "new" / f"{len(events)}.png"
        draw(events, path)
        assert path.read_bytes().startswith(b"\x89PNG")
