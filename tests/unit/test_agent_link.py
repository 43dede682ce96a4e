"""The link between a rank and its agent: a real socket, the agent's side in an event loop in a thread."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import queue
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from chaos_mpi.agent.crashes import Crash
from chaos_mpi.agent.link import VARIABLE, AgentLink, is_watched
from chaos_mpi.agent.link_server import LinkServer
from chaos_mpi.agent.sockets import connect
from chaos_mpi.elastic.changes import ChangingSession
from chaos_mpi.membership import Changes, View
from chaos_mpi.monitor.hostlinks import LinkStatus, to_json

LIMIT_S = 20.0


class Agent:
    """An agent that has its answers from the test."""

    def __init__(self) -> None:
        self.asked = queue.SimpleQueue[list[str]]()
        self.answers: dict[str, asyncio.Future[str]] = {}
        self._loop, self._closed = asyncio.new_event_loop(), False
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.server = LinkServer(self._answer, may_go_on_with=self._answer)
        asyncio.run_coroutine_threadsafe(self.server.listen(), self._loop).result(LIMIT_S)
        self.do(lambda: self.server.name("me:1"))

    async def _answer(self, members: list[str]) -> str:
        self.asked.put(members)
        self.answers[members[0]] = self._loop.create_future()
        return await self.answers[members[0]]

    def do(self, action: Callable[[], object]) -> None:
        async def run() -> None:
            action()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(LIMIT_S)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.do(self.server.close)
            self._loop.call_soon_threadsafe(self._loop.stop)


class Rank:
    """A rank's end, and what it was told."""

    def __init__(self, agent: Agent) -> None:
        self.severed, self.stopped = queue.SimpleQueue[Collection[str]](), queue.SimpleQueue[str]()
        link = AgentLink.open(agent.server.variables(), self.severed.put, self.stopped.put)
        assert link is not None
        self.link = link

    def ask(self, *members: str, limit_s: float = LIMIT_S) -> queue.SimpleQueue[str]:
        """Ask in a thread; where the answer will be."""
        answer = queue.SimpleQueue[str]()
        threading.Thread(target=lambda: answer.put(self.link.may_go_on_without(members, limit_s)), daemon=True).start()
        return answer


def test_a_view_says_which_links_between_its_hosts_are_not_simply_up() -> None:
    said = [("a", "b", "cut", ""), ("a", "c", "detour", "b"), ("b", "c", "up", ""), ("a", "gone", "cut", "")]
    links = [{"a": a, "b": b, "state": state, "via": via, "no_detour": ""} for a, b, state, via in said]
    committed: list[dict[str, Any]] = []
    session: Any = SimpleNamespace(
        agent=SimpleNamespace(links=links), view=View(0, ("a:1", "b:2")), members=("a:1", "b:2", "c:3"),
        changes=Changes(), emit=lambda event, **fields: committed.append(fields),
        _sequence=MagicMock(), _samplers=MagicMock(), _tell_companions=MagicMock(),
    )  # fmt: skip
    session._follow_change = functools.partial(ChangingSession._follow_change, session)
    ChangingSession.change_view(session, MagicMock(), session.members, [], "join")
    session.agent = None
    ChangingSession.change_view(session, MagicMock(), session.members, [], "join")
    assert [fields["links"] for fields in committed] == [
        [
            {"a": "a", "b": "b", "state": "cut", "via": ""},
            {"a": "a", "b": "c", "state": "detour", "via": "b"},
        ],
        [],
    ]


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.close()


def test_the_end_of_a_newcomer_is_told(agent: Agent) -> None:
    rank, told = Rank(agent), queue.SimpleQueue[tuple[str, str]]()
    rank.link.follow_joins(lambda join, how: told.put((join, how)))
    rank.ask("b:2")
    agent.asked.get(timeout=LIMIT_S)  # so it is connected
    agent.do(lambda: agent.server.join_ended("join-1", "it ended"))
    assert told.get(timeout=LIMIT_S) == ("join-1", "it ended")


def test_questions_are_answered_each_with_its_own_answer(agent: Agent) -> None:
    rank = Rank(agent)
    first = rank.ask("b:2", "a:1")
    assert agent.asked.get(timeout=LIMIT_S) == ["a:1", "b:2"]
    second = rank.ask("c:3")
    assert agent.asked.get(timeout=LIMIT_S) == ["c:3"]
    agent.do(lambda: agent.answers["c:3"].set_result("no majority"))
    assert second.get(timeout=LIMIT_S) == "no majority"
    agent.do(lambda: agent.answers["a:1"].set_result(""))
    assert first.get(timeout=LIMIT_S) == ""


def test_a_rank_is_told_its_name(agent: Agent) -> None:
    assert Rank(agent).link.member == "me:1"


def test_the_two_questions(agent: Agent) -> None:
    rank = Rank(agent)
    for ask in (rank.link.may_go_on_without, rank.link.may_go_on_with):
        answer = queue.SimpleQueue[str]()
        threading.Thread(target=lambda a=answer, q=ask: a.put(q(["b:1", "a:1"], LIMIT_S)), daemon=True).start()
        assert agent.asked.get(timeout=LIMIT_S) == ["a:1", "b:1"]
        agent.do(lambda: agent.answers["a:1"].set_result("not yet"))
        assert answer.get(timeout=LIMIT_S) == "not yet"


def test_a_question_that_nobody_answers_has_a_limit(agent: Agent) -> None:
    answer = Rank(agent).link.may_go_on_without(["a:1"], 0.05)
    assert answer == "the agent of this node did not say within 0.05 s whether a:1 are out"


def test_a_crash_elsewhere(agent: Agent) -> None:
    crashes = queue.SimpleQueue[Crash]()
    link = AgentLink.open(agent.server.variables(), print, print)
    assert link is not None
    link.follow_crashes(crashes.put)
    answer = queue.SimpleQueue[str]()
    threading.Thread(target=lambda: answer.put(link.may_go_on_without(["b:2"], LIMIT_S)), daemon=True).start()
    agent.asked.get(timeout=LIMIT_S)  # so it is connected
    agent.do(lambda: agent.server.crashed(Crash("b:2", "edge2", "SIGSEGV")))
    assert crashes.get(timeout=LIMIT_S) == Crash("b:2", "edge2", "SIGSEGV")
    agent.do(lambda: agent.answers["b:2"].set_result(""))
    assert answer.get(timeout=LIMIT_S) == ""


def test_a_directory_of_the_job(tmp_path: Path) -> None:
    async def test() -> None:
        async def never(_: list[str]) -> str:
            raise AssertionError

        server = LinkServer(never, tmp_path)
        await server.listen()
        assert [path.name for path in tmp_path.iterdir()] == [f"agent-{os.getpid()}.sock"]
        server.close()
        assert tmp_path.is_dir()
        assert not list(tmp_path.iterdir())

    asyncio.run(test())


def test_what_is_severed(agent: Agent) -> None:
    ranks = [Rank(agent), Rank(agent)]
    for rank in ranks:  # each is connected once it has got an answer
        answer = rank.ask("x:1")
        agent.asked.get(timeout=LIMIT_S)
        agent.do(lambda: agent.answers["x:1"].set_result(""))
        answer.get(timeout=LIMIT_S)
    agent.do(lambda: agent.server.sever(("10.0.0.1", "fd00::1"), ("a:1",)))
    assert [rank.severed.get(timeout=LIMIT_S) for rank in ranks] == [["10.0.0.1", "fd00::1"]] * 2


def test_after_a_stop_nothing_is_allowed(agent: Agent) -> None:
    rank = Rank(agent)
    waiting = rank.ask("a:1")
    agent.asked.get(timeout=LIMIT_S)
    agent.do(lambda: agent.server.stop("cut off"))
    assert waiting.get(timeout=LIMIT_S) == "cut off"
    assert rank.stopped.get(timeout=LIMIT_S) == "cut off"
    assert rank.link.may_go_on_without(["b:1"], LIMIT_S) == "cut off"
    assert Rank(agent).stopped.get(timeout=LIMIT_S) == "cut off", "also who comes later"


def test_an_agent_that_is_gone(agent: Agent) -> None:
    rank = Rank(agent)
    waiting = rank.ask("a:1")
    agent.asked.get(timeout=LIMIT_S)
    path = agent.server.path
    agent.close()
    assert waiting.get(timeout=LIMIT_S) == "the agent of this node is gone"
    assert rank.link.may_go_on_without(["a:1"], LIMIT_S) == "the agent of this node is gone"
    assert rank.stopped.empty()
    assert not path.parent.exists()
    with pytest.raises(FileNotFoundError):
        AgentLink.open({VARIABLE: str(path)}, print, print)


def test_only_the_owner_can_connect(agent: Agent) -> None:
    path = agent.server.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_rank_that_talks_nonsense_is_disconnected_and_others_are_not(agent: Agent) -> None:
    rank = Rank(agent)
    for nonsense in (b"hello\n", b"{}\n", b"[]\n", b"\xff" * 100 + b"\n", b'{"may_go_on_without": 7, "id": 1}\n'):
        with connect(agent.server.path, LIMIT_S) as stranger:
            assert stranger.recv(100) == b'{"member": "me:1"}\n'
            stranger.sendall(nonsense)
            assert stranger.recv(100) == b""
    answer = rank.ask("a:1")
    assert agent.asked.get(timeout=LIMIT_S) == ["a:1"]
    agent.do(lambda: agent.answers["a:1"].set_result(""))
    assert answer.get(timeout=LIMIT_S) == ""


def test_a_rank_that_does_not_read_is_disconnected(agent: Agent) -> None:
    with connect(agent.server.path, LIMIT_S) as deaf:
        deaf.sendall(json.dumps({"may_go_on_without": ["a:1"], "id": 1}).encode() + b"\n")
        agent.asked.get(timeout=LIMIT_S)
        for _ in range(40):
            agent.do(lambda: agent.server.sever(["10.0.0.1"] * 5000, ["a:1"]))
        with pytest.raises((ConnectionError, EOFError)):  # noqa: PT012
            while deaf.recv(1 << 20):
                pass
            raise EOFError


def test_without_an_agent() -> None:
    assert AgentLink.open({}, print, print) is None
    assert not is_watched({})


def test_a_path_longer_than_the_kernel_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    agent = Agent()
    rank = Rank(agent)
    agent.do(lambda: agent.server.stop("over"))
    assert rank.stopped.get(timeout=LIMIT_S) == "over"
    agent.close()


def test_the_rank_needs_neither_torch_nor_mpi_for_it() -> None:
    code = (
        "import sys, chaos_mpi.agent.link; print([name for name in ('torch', 'mpi4py', 'zmq') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stdout == "[]\n"


def test_news_of_links_is_told_also_when_it_came_early(agent: Agent) -> None:
    first, second = LinkStatus(("a", "b"), "cut"), LinkStatus(("b", "c"), "cut")
    agent.do(lambda: agent.server.tell_links([first, second]))
    rank = Rank(agent)
    news = queue.SimpleQueue[list[dict[str, str]]]()
    while len(rank.link.links) < 2:
        time.sleep(0.01)
    rank.link.follow_links(news.put)
    assert news.get(timeout=LIMIT_S) == to_json([first, second])
    healed = LinkStatus(("a", "b"), "detour", "c")
    agent.do(lambda: agent.server.tell_links([healed]))
    assert news.get(timeout=LIMIT_S) == [{"a": "a", "b": "b", "state": "detour", "via": "c", "no_detour": ""}]
    assert rank.link.links == to_json([healed, second])
    late = Rank(agent)
    while len(late.link.links) < 2:
        time.sleep(0.01)
    assert late.link.links == rank.link.links


def test_news_of_the_witness_is_told_also_when_it_came_early(agent: Agent) -> None:
    gone, back = ({"witness": "w:1", "host": "w", "state": state} for state in ("silent", "up"))
    agent.do(lambda: agent.server.tell_witness(gone))
    rank = Rank(agent)
    while rank.link.witness is None:
        time.sleep(0.01)
    news = queue.SimpleQueue[dict[str, str]]()
    rank.link.follow_witness(news.put)
    assert news.get(timeout=LIMIT_S) == gone
    agent.do(lambda: agent.server.tell_witness(back))
    assert news.get(timeout=LIMIT_S) == back
    assert rank.link.witness == back
