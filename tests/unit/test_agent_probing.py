"""Probes of idle links between two agents, over a network that takes its time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from chaos_mpi.agent import probing
from chaos_mpi.agent.probing import PROBE, Probing
from chaos_mpi.monitor.topology import ProbePlan

SPEAKERS = {"a": "a:1", "b": "b:2", "c": "c:3"}


class Links:
    """What one agent knows."""

    def __init__(self) -> None:
        self.speakers: dict[str, str] = dict(SPEAKERS)
        self.learnt_s: dict[str, float] = {}
        self.known: dict[str, float] = {}

    def bytes_per_s(self, host: str) -> float | None:
        return self.known.get(host)

    def rtt_s(self, host: str) -> float | None:
        return 0.001

    def sent(self, bytes_per_s: Mapping[str, float]) -> None:
        self.known |= bytes_per_s


class Agents:
    """Two agents, a and b, with a link of so many bytes per second; c answers nothing."""

    def __init__(self, bytes_per_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.bytes_per_s, self.sent_bytes = 0.0, bytes_per_s, 0
        self.links = Links()
        monkeypatch.setattr(probing, "boot_clock_s", lambda: self.now_s)
        self.a = Probing("a:1", self.end("a:1"), self.links)
        self.b = Probing("b:2", self.end("b:2"), Links())

    def end(self, member: str) -> Any:
        agents = self

        class Network:
            def send(self, to: str, message: dict[str, Any]) -> bool:
                agents.carry(member, to, message)
                return True

        return Network()

    def carry(self, sender: str, to: str, message: dict[str, Any]) -> None:
        nbytes = len(message.get("filling", ""))
        self.sent_bytes += nbytes
        self.now_s += 0.0005 + nbytes / self.bytes_per_s
        if to in ("a:1", "b:2"):
            (self.a if to == "a:1" else self.b).receive(sender, message)

    def pass_time(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 1.0
            self.a.look(self.now_s)


def test_a_link_that_has_recovered_is_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = Agents(2e7, monkeypatch)
    agents.links.known = {"b": 1e5}
    agents.pass_time(ProbePlan().every_s * 5)
    assert agents.links.known["b"] > 1e6
    assert agents.sent_bytes <= 2 * 6 * ProbePlan().most_bytes


def test_a_slow_link_that_was_never_used_is_known_after_some_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = Agents(1e5, monkeypatch)
    agents.pass_time(ProbePlan().every_s * 1.5)
    assert "b" not in agents.links.known
    agents.pass_time(ProbePlan().every_s * 6)
    assert agents.links.known == {"b": pytest.approx(1e5, rel=0.1)}


def test_only_idle_links_are_probed_and_only_by_who_speaks_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = Agents(1e7, monkeypatch)
    for _ in range(20):
        agents.links.learnt_s = {"b": agents.now_s, "c": agents.now_s}
        agents.pass_time(ProbePlan().every_s / 2)
    assert agents.sent_bytes == 0
    agents.links.learnt_s.clear()
    agents.links.speakers["a"] = "a:0"
    agents.pass_time(ProbePlan().every_s * 3)
    assert agents.sent_bytes == 0


def test_answers_to_nothing_are_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = Agents(1e7, monkeypatch)
    agents.a.receive("b:2", {"kind": probing.PROBED, "number": 17})
    assert agents.links.known == {}
    with pytest.raises(ValueError, match="no number"):
        agents.b.receive("a:1", {"kind": PROBE, "number": "x"})
