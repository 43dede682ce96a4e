"""A running job as people see it, from what its members answer."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pty
import random
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest
from job_answers import JOIN, MACHINE, MEMBERS, NOW, TRANSFER, answer, event
from rich.console import Console

from chaos_mpi.agent.home import note_down
from chaos_mpi.cli.control import LAUNCHER
from chaos_mpi.cli.joblog import SETTLE_S, Following, as_text, member_id, show, told
from chaos_mpi.cli.status import combine, duration, lines, look, merged, nbytes, rate_text
from chaos_mpi.cli.top import frame, watch
from chaos_mpi.elastic import transfer as records
from chaos_mpi.elastic.transfer import STALE_S, Transfer, transfers

CHANGES = {"recoveries": 1, "deaths": 1, "joins": 2, "leaves": 0}


def combined(*answers: dict[str, Any]) -> dict[str, Any]:
    """The job of these answers, which was started 75 seconds ago."""
    return combine(answers, NOW - 75, NOW)


def rendered(job: dict[str, Any], width: int = 110) -> str:
    """What ``chaosctl top`` shows."""
    console = Console(file=io.StringIO(), width=width, height=60, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(frame(job, "/tmp/chaosrun-x"))
    return capture.get()


def test_what_all_know_is_taken_from_the_furthest_in_whatever_order_they_answer() -> None:
    behind = answer("a:1", step=101)
    ahead = answer("a:2", ("a:2", "b:3"), epoch=1, step=100, changes=CHANGES, max_ranks=4)
    for answers in itertools.permutations([behind, ahead]):
        job = combined(*answers)
        assert (job["epoch"], job["step"], job["members"], job["max_ranks"]) == (1, 100, ["a:2", "b:3"], 4)
        assert job["changes"] == CHANGES
        assert [rank["member"] for rank in job["ranks"]] == ["a:2", "b:3"]


def test_a_link_without_a_detour_says_why() -> None:
    link = {"a": "x", "b": "y", "state": "cut", "via": "", "no_detour": "z cannot pass it on"}
    link |= {"rtt_ms": 0.5, "bytes_per_s": 3e6}
    (said,) = [line.strip() for line in lines(combined(answer("a:1", links=[link]))) if "link" in line]
    assert said == "link x - y: cut, no detour (z cannot pass it on), 0.50 ms, 3.0 MB/s"


def test_the_witness_is_mentioned_while_it_is_not_reachable() -> None:
    def said(*states: str | None) -> list[str]:
        news = [None if state is None else {"witness": "w:1", "host": "w", "state": state} for state in states]
        job = combined(*(answer(member, witness=fields) for member, fields in zip(("a:1", "a:2"), news, strict=True)))
        return [line.strip() for line in lines(job) if "witness" in line]

    assert said(None, None) == said("up", None) == said("up", "up") == said("replaced", "up") == []
    assert said("up", "silent") == said(None, "silent") == ["the witness on w is not reachable"]
    assert said("out", "up") == ["the witness on w is not reachable, and has no vote any more"]


def test_a_member_that_does_not_answer_is_silent() -> None:
    job = combined(answer("a:1"), answer("b:3", phase="revoke"))
    assert [rank["state"] for rank in job["ranks"]] == ["compute", "silent", "revoke"]
    silent = job["ranks"][1]
    assert (silent["host"], silent["pid"], silent["process"]) == ("a", 2, None)
    assert sorted(job["machines"]) == ["a", "b"]
    assert [rank["state"] for rank in combined(answer("a:1"))["ranks"]] == ["compute", "silent", "elsewhere"]


def test_where_the_launcher_is_all_members_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_mpi.cli.status.ask_all", lambda *_: [answer("a:1")])
    states = [[rank["state"] for rank in (look(tmp_path) or {})["ranks"]]]
    note_down(tmp_path, LAUNCHER, {})
    states.append([rank["state"] for rank in (look(tmp_path) or {})["ranks"]])
    assert states == [["compute", "silent", "elsewhere"], ["compute", "silent", "silent"]]


def test_machines_elsewhere_are_known_from_what_the_agents_say() -> None:
    told = {"a": {**MACHINE, "joined_at": NOW - 70}, "b": {**MACHINE, "accelerators": ["X1", "X1", "Y"]}}
    job = combined(answer("a:1", machines=told))
    assert job["machines"]["a"] == {**MACHINE, "joined_at": NOW - 70}, "another rank of it was there before"
    text = [line for line in lines(job) if "load" in line]
    assert text[0].endswith("memory 4.0 GB of 16.0 GB, for 1 min 10 s")
    assert text[1].endswith("memory 4.0 GB of 16.0 GB, 2 x X1, Y, for 10 s")


def test_the_speed_is_the_middle_one_of_those_that_are_known() -> None:
    speeds = [None, 1.0, 10.0, 11.0]
    members = ("a:1", "a:2", "a:3", "a:4")
    answers = [answer(m, members, steps_per_s=s) for m, s in zip(members, speeds, strict=True)]
    assert combined(*answers)["steps_per_s"] == 10.0
    assert combined(answers[0])["steps_per_s"] is None


def test_a_job_in_json_can_be_read_back() -> None:
    job = combined(answer("a:1", joins=[JOIN], transfers=[TRANSFER], events=[event("stalled", "a:1", 1.0, seconds=2)]))
    assert json.loads(json.dumps(job)) == job


def test_the_text_of_a_job() -> None:
    job = combined(answer("a:1", joins=[JOIN], transfers=[TRANSFER]), answer("b:3", phase="all_reduce[sum, float64]"))
    assert list(lines(job)) == [
        "step 100 (10.0 steps/s), view 0, 3 members, running for 1 min 15 s",
        "  rank   0  a:1                       compute           step 100      CPU 99 %     400 MB",
        "  rank   1  a:2                       silent            step -        CPU -             -",
        "  rank   2  b:3                       all_reduce        step 100      CPU 99 %     400 MB",
        "  a: load 1.00 2.00 3.00 on 4 cores, CPU 50 %, memory 4.0 GB of 16.0 GB, for 10 s",
        "  b: load 1.00 2.00 3.00 on 4 cores, CPU 50 %, memory 4.0 GB of 16.0 GB, for 10 s",
        "  on its way: join-a:1-1 (b:9), catching up, started by a:2, attempt 2, asked for 10 s ago",
        "  b:9 fetches the state: 30.0 MB of 120 MB, 4 s left (a:1 12.0 MB/s, a:2 8.0 MB/s)",
    ]


def test_little_is_known_of_a_job_that_has_just_started() -> None:
    job = combine([answer("a:1", ("a:1",), step=0, steps_per_s=None)], None, NOW)
    assert next(lines(job)) == "step 0, view 0, 1 member"
    assert "step 0, view 0, 1 member\n" in rendered(job)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (duration(0.2), "0 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(3600 * 30 + 119), "30 h 01 min"),
        (nbytes(None), "-"),
        (nbytes(999), "999 B"),
        (nbytes(1500), "1.5 kB"),
        (nbytes(250e9), "250 GB"),
        (rate_text(0.25), "4.0 s/step"),
        (rate_text(0.0), "0.0 steps/s"),
        (rate_text(123.45), "123.5 steps/s"),
    ],
)
def test_units(text: str, words: str) -> None:
    assert text == words


# -- top ----------------------------------------------------------------------------------------------


def test_the_picture_of_a_job() -> None:
    events = [event("session_started", "a:1", NOW - 70, 0, pid=1, host="a", members=list(MEMBERS), newcomer=False)]
    job = combined(answer("a:1", joins=[JOIN], transfers=[TRANSFER], events=events), answer("a:2", changes=CHANGES))
    shown = rendered(job)
    assert "step 100 (10.0 steps/s), view 0, 3 members, running for 1 min 15 s" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["0", "a", "1", "99", "%", "400", "MB", "100", "compute"] in rows
    assert ["2", "b", "3", "-", "-", "-", "elsewhere"] in rows
    assert "30.0 MB of 120 MB" in shown
    assert "━" in shown
    assert shown.splitlines()[-1].endswith("training started with 3 ranks")


def test_a_picture_fits_a_narrow_terminal() -> None:
    job = combined(answer("a:1", joins=[JOIN], transfers=[TRANSFER]))
    assert max(map(len, rendered(job, width=50).splitlines())) <= 50


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Console]]:
    """A terminal: the end of who sits at it, and a console on the other end."""
    person, program = pty.openpty()
    with open(program, "r+b", buffering=0) as stream, open(program, "w", closefd=False) as output:
        monkeypatch.setattr("sys.stdin", stream)
        monkeypatch.setattr("chaos_mpi.cli.top.PERIOD_S", 0.01)
        yield person, Console(file=output, force_terminal=True, width=100, height=30)
    os.close(person)


def read_terminal(person: int) -> bytes:
    """What the terminal shows; it has been written already."""
    return os.read(person, 1 << 16)


def test_the_live_picture_ends_with_q(terminal: tuple[int, Console], monkeypatch: pytest.MonkeyPatch) -> None:
    person, console = terminal
    before = termios.tcgetattr(person)

    def look_and_press(_: Path) -> dict[str, Any]:
        os.write(person, b"xq")
        return combined(answer("a:1"))

    monkeypatch.setattr("chaos_mpi.cli.top.look", look_and_press)
    assert watch(Path("/j"), console) == ""
    assert b"step 100" in read_terminal(person)
    assert termios.tcgetattr(person) == before


def test_the_live_picture_ends_with_the_job(terminal: tuple[int, Console], monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([combined(answer("a:1")), None, combined(answer("a:1", step=200)), None, None, None])
    monkeypatch.setattr("chaos_mpi.cli.top.look", lambda _: next(looks))
    assert "the job has ended" in watch(Path("/j"), terminal[1])
    assert b"step 200" in read_terminal(terminal[0])


# -- the log ------------------------------------------------------------------------------------------

STARTED = [
    event("session_started", m, 10.0 + i, 0, members=list(MEMBERS), newcomer=False) for i, m in enumerate(MEMBERS)
]
NEWCOMER = [event("session_started", "b:9", 20.0, 0, members=["b:9"], newcomer=True) | {"size": 1}]
LOST = [
    event("view_committed", m, 30.0 + i, epoch=1, cause="failure", members=["a:1", "a:2"], lost=["b:3"]) | {"size": 2}
    for i, m in enumerate(("a:1", "a:2"))
]
JOINED = [
    event("view_committed", m, 40.0, epoch=2, cause="join", members=["a:1", "a:2", "b:9"], lost=[])
    for m in ("a:1", "a:2", "b:9")
]
ASKED = [
    event("join_requested", "a:1", 21.0, id="join-a:1-1", host=""),
    event("join_spawned", "a:2", 22.0, id="join-a:1-1", host="", attempt=1),
    *(event("join_failed", m, 22.5 + i, id="join-a:1-2", host="b", reason="full") for i, m in enumerate(MEMBERS)),
    *(event("hosts_changed", m, 23.0 + i, hosts={"a": 2, "b": 2}) for i, m in enumerate(MEMBERS)),
    *(event("scaled", m, 24.0 + i, joins=["b"], leaves=[]) for i, m in enumerate(MEMBERS)),
]
ALL = [*STARTED, *NEWCOMER, *ASKED, *LOST, *JOINED]
TOLD = [
    "training started with 3 ranks",
    "one more rank was asked for (join-a:1-1)",
    "a:2 starts a rank (join-a:1-1)",
    "no rank joins on b (join-a:1-2): full",
    "the hosts are now a:2, b:2",
    "the scale policy lets 1 join and 0 leave",
    "b:3 died; 2 ranks are left",
    "b:9 joined; 3 ranks train on",
]


def test_the_log_tells_each_thing_once_whoever_remembers_it() -> None:
    for number in range(5):
        shuffled = random.Random(number).sample(ALL, len(ALL))
        assert [line.text for line in told(shuffled)] == TOLD


def test_what_is_forgotten_is_not_made_up() -> None:
    assert [line.text for line in told([*NEWCOMER, *JOINED])] == ["others joined; 3 ranks train on"]


def test_one_who_follows_is_told_each_thing_once_and_when_all_can_know_it() -> None:
    following, now = Following(), 1000.0

    def feed(events: list[dict[str, Any]], after_s: float, until: float = -math.inf) -> list[str]:
        nonlocal now
        now += after_s
        return [line.text for line in following.feed(events, now, until)]

    assert feed(ALL[:1], 0.0) == []
    assert feed(ALL[1:3], SETTLE_S) == TOLD[:1], "whatever the clocks of the members say"
    assert feed([*STARTED, *NEWCOMER, *ASKED], SETTLE_S) == []
    assert feed(LOST[:1], SETTLE_S / 2) == []
    assert feed(LOST[1:], SETTLE_S / 2) == TOLD[1:6]
    assert feed([], SETTLE_S / 2) == TOLD[6:7]
    assert feed(JOINED, 0.0, until=JOINED[0]["t"] - 1) == []
    assert feed([], 0.0, until=JOINED[0]["t"]) == TOLD[7:], "all have been asked"
    assert feed(ALL, 10.0, until=math.inf) == []


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 3600.0])
def test_a_log_is_followed_whatever_the_clocks_of_the_members_say(
    ahead_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, end, came_to_its_end = tmp_path / "job", threading.Event(), []

    def follow(*_: object) -> Iterator[dict[str, Any] | None]:
        yield from (None, *told_later)
        end.wait(60)
        came_to_its_end.append(True)

    now = time.time() + ahead_s
    told_at_first = [{**e, "t": now - 100.0 + e["t"]} for e in STARTED]
    told_later = [{**e, "t": now + e["t"]} for e in (*LOST, *JOINED)]
    monkeypatch.setattr("chaos_mpi.cli.joblog.look", lambda _: combined(answer("a:1", events=told_at_first)))
    monkeypatch.setattr("chaos_mpi.cli.joblog.follow", follow)
    directory.mkdir()
    (directory / "control-1.sock").touch()
    log = show(directory, None, None, following=True)
    assert [next(log).partition("  step ")[2].split(maxsplit=1)[1] for _ in range(3)] == [TOLD[0], *TOLD[6:8]]
    assert not came_to_its_end
    directory.rename(tmp_path / "gone")
    end.set()
    assert list(log) == ["nothing of the job is left on this machine; it may go on elsewhere"]


def test_events_of_all_members_are_put_in_order_once() -> None:
    answers = [answer("a:1", events=[LOST[0], ASKED[0]]), answer("a:2", events=[LOST[1], ASKED[1]])]
    assert merged([*answers, *answers]) == [ASKED[0], ASKED[1], LOST[0], LOST[1]]


def test_a_member_is_meant_by_its_rank_or_its_id() -> None:
    job = combined(answer("a:1", events=[JOINED[2]]))
    assert member_id(job, "1") == "a:2"
    assert member_id(job, "b:9") == "b:9", "it is no member any more, and has left word"
    for unknown in ("3", "c:1"):
        with pytest.raises(click.ClickException, match=f"there is no member {unknown}"):
            member_id(job, unknown)


def test_a_line_of_the_log_can_be_read() -> None:
    (line,) = told(STARTED)
    assert as_text(line).endswith("  step      0  training started with 3 ranks")


# -- transfers ----------------------------------------------------------------------------------------


def test_transfers_that_are_over_or_stale_are_not_told(tmp_path: Path) -> None:
    for number, at in enumerate((NOW, NOW, NOW - STALE_S - 1)):
        transfer = Transfer(f"a:{number}", 5, 10, {"b:1": 2.0}, 2.5, at)
        note_down(tmp_path, records.TRANSFER, asdict(transfer))  # as a newcomer does
        (tmp_path / f"{records.TRANSFER}-{os.getpid()}.json").rename(tmp_path / f"{records.TRANSFER}-{number}.json")
    (tmp_path / "transfer-7.json").write_text('{"member": "half')
    (found,) = transfers(tmp_path, ["a:1"], NOW)
    assert (found["member"], found["rates_bytes_per_s"], found["left_s"]) == ("a:0", {"b:1": 2.0}, 2.5)
    assert transfers(None, [], NOW) == []
