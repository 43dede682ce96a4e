"""How agents learn of each other through the job's directory, and the settings that they are sent."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.exchange import Exchange, Posted, first_members, posted
from chaos_mpi.agent.guard import Settings
from chaos_mpi.agent.processes import start_time
from chaos_mpi.agent.registry import note_end
from chaos_mpi.errors import ConfigError
from chaos_mpi.monitor.cluster import Timing

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


def contact(member: str) -> Contact:
    return Contact(member, member.partition(":")[0], ("10.0.0.1",), 4000, KEY)


def write(
    directory: Path, member: str, job: str, rank: int, pid: int, started: int, first_size: int | None = None
) -> None:
    """What the proxy with this number would have written."""
    entry = {
        "contact": contact(member).to_json(), "job": job, "rank": rank, "pid": pid, "started": started,
        "first_size": first_size,
    }  # fmt: skip
    (directory / f"contact-{pid}.json").write_text(json.dumps(entry))


class Told:
    """An exchange, and what its agent was told last."""

    def __init__(
        self, directory: Path, job: str | None, first_size: int | None, rank: int = 0, launcher: int | None = None
    ) -> None:
        self.news: list[dict[str, Any]] = []
        self.exchange = Exchange(directory, job, rank, first_size, self.news.append, launcher)

    @property
    def members(self) -> list[str]:
        return [entry["member"] for entry in self.news[-1]["contacts"]]


def test_what_is_posted_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    Told(tmp_path, "job@1", 2, rank=1).exchange.post(contact("a:1"))
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(posted(tmp_path)) == [Posted(contact("a:1"), "job@1", 1, os.getpid(), start_time(os.getpid()), 2)]


def test_the_first_members_are_known_when_all_are_there(tmp_path: Path) -> None:
    told = Told(tmp_path, "job@1", 2)
    told.exchange.post(contact("a:1"))
    told.exchange.look()
    assert told.members == ["a:1"] and told.news[-1]["first"] is None
    told.exchange.look()
    assert len(told.news) == 1, "no news"
    write(
        tmp_path, "b:2", "job@1", 1, pid=2**22 + 1, started=1, first_size=2
    )  # has ended already, and counts all the same
    told.exchange.look()
    assert told.news[-1]["first"] == ["a:1", "b:2"]


def test_the_witness_is_none_of_the_first_members_and_knows_who_they_are(tmp_path: Path) -> None:
    told = Told(tmp_path, None, None)
    told.exchange.post(contact("launcher:5"))
    write(tmp_path, "n:9", "job@2", 0, pid=2**22 + 3, started=1)
    write(tmp_path, "b:2", "job@1", 1, pid=2**22 + 1, started=1, first_size=2)
    told.exchange.look()
    assert sorted(told.members) == ["b:2", "launcher:5"] and told.news[-1]["first"] is None
    write(tmp_path, "a:1", "job@1", 0, pid=2**22 + 2, started=1, first_size=2)
    told.exchange.look()
    assert told.news[-1]["first"] == ["a:1", "b:2"]
    first = Told(tmp_path, "job@1", 2)
    first.exchange.look()
    assert sorted(first.members) == ["a:1", "b:2", "launcher:5"] and first.news[-1]["first"] == ["a:1", "b:2"]


def test_newcomers_that_have_gone_are_of_interest_only_to_who_knew_them(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        write(tmp_path, "n:9", "job@2", 0, process.pid, start_time(process.pid))
        early, late = Told(tmp_path, "job@1", 1), Told(tmp_path, "job@1", 1)
        early.exchange.look()
        assert early.members == ["n:9"]
        process.kill()
    early.exchange.look()
    late.exchange.look()
    assert early.members == ["n:9"]
    assert late.members == []


def test_members_whose_proxies_have_ended_while_mpirun_lives(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        write(tmp_path, "a:1", "job@1", 0, process.pid, start_time(process.pid))
        of = {launcher: Told(tmp_path, "job@1", 1, 1, launcher) for launcher in (os.getppid(), os.getpid(), None)}
        for told in of.values():
            told.exchange.look()
            assert told.news[-1]["disowned"] == []
        process.kill()
    for told in of.values():
        told.exchange.look()
    assert [told.news[-1]["disowned"] for told in of.values()] == [["a:1"], [], []]


def test_a_newcomer_is_told_of_no_first_members(tmp_path: Path) -> None:
    told = Told(tmp_path, "job@2", None)
    told.exchange.post(contact("n:9"))
    told.exchange.look()
    assert told.news == [{"contacts": [contact("n:9").to_json()], "first": None, "ended": {}, "disowned": []}]


def test_the_end_of_the_proxy_of_a_newcomer_is_told_to_all(tmp_path: Path) -> None:
    told = Told(tmp_path, "job@1", 1)
    told.exchange.look()
    (tmp_path / "ended-1.json").write_text("[")  # what cannot be read is passed over
    note_end(tmp_path, "chaos_mpi_join=join-a:1-1.1@a:1", "its process ended (exit status 1)")
    told.exchange.look()
    assert told.news[-1]["ended"] == {"chaos_mpi_join=join-a:1-1.1@a:1": "its process ended (exit status 1)"}
    note_end(tmp_path / "nowhere", "x", "y")  # the job is over


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"contact": {}}', '{"contact": {"member": 3}}'])
def test_what_is_no_contact_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "contact-1.json").write_text(text)
    assert list(posted(tmp_path)) == []


def test_more_first_members_than_the_job_has() -> None:
    entries = [Posted(contact(f"a:{rank}"), "job@1", rank, 1, 1, 3) for rank in range(3)]
    assert first_members(entries, "job@1", 3) == ["a:0", "a:1", "a:2"]
    assert first_members(entries, "job@2", 3) is None
    with pytest.raises(ConfigError, match="begins with 2 ranks"):
        first_members(entries, "job@1", 2)


def test_settings_come_back_as_they_were() -> None:
    settings = Settings(
        "edge1", True, Timing(limit_s=0.25, heal_s=1.0, give_up_s=4.0, even_split="none"), "eth0", False, "w:1"
    )
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(ConfigError, match="limit_s is -1"):
        Settings.from_json({**settings.to_json(), "limit_s": -1})
