"""Lists of hosts, how they are found out, and the policies that turn them into joins and leaves."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.agent.spawning import JOIN_OPTION, VARIABLE
from chaos_mpi.autoscale import Available, Decision, Manual, ScaleInputs, discovery
from chaos_mpi.autoscale.discovery import Discovery, read_hosts, usable_hosts
from chaos_mpi.autoscale.hostlist import parse_hosts, split_usable
from chaos_mpi.autoscale.policy import MAX_FAILED, STARTS_PER_SLOT
from chaos_mpi.autoscale.settling import decide, settle, with_failed
from chaos_mpi.elastic.launching import own_host
from chaos_mpi.errors import ConfigError
from chaos_mpi.membership import Agenda, HostList, HostSlots, Limits, Proposal, View, negotiate
from chaos_mpi.membership.negotiation import MAX_ATTEMPTS

HERE = socket.gethostname()

# -- lists of hosts ----------------------------------------------------------------------------------------


def test_a_list_is_read_in_its_order() -> None:
    text = "# machines\n\nbeta:2\n  alpha : 4  # the large one\n10.0.0.7:0\nfe80::1:3\n"
    assert parse_hosts(text, "hosts") == (("beta", 2), ("alpha", 4), ("10.0.0.7", 0), ("fe80::1", 3))
    assert parse_hosts("", "hosts") == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alpha", "hosts, line 2: 'alpha' is not of the form host:slots"),
        ("alpha slots=4", "is not of the form host:slots"),
        (":4", "is not of the form host:slots"),
        ("two words:4", "is not of the form host:slots"),
        ("alpha:", "hosts, line 2: '' is not a number of slots"),
        ("alpha:-1", "'-1' is not a number of slots"),
        ("alpha:four", "'four' is not a number of slots (in 'alpha:four')"),
        ("alpha:\u00b2", "is not a number of slots"),
        ("beta:1", "hosts, line 2: the host beta is named a second time"),
    ],
)
def test_a_wrong_line_is_named(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hosts(f"beta:1\n{line}\n", "hosts")
    assert words in str(caught.value)


def test_all_names_of_this_machine_are_one_host() -> None:
    entries = parse_hosts("far:4\nlocalhost:2\n127.0.0.1:1\n", "hosts")
    usable, others = split_usable(entries, {"localhost", "127.0.0.1", "me"}, "me")
    assert usable == (("me", 3),)
    assert others == (("far", 4),)
    assert split_usable(others, {"me"}, "me") == ((), others)


def test_which_hosts_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = parse_hosts(f"localhost:1\n127.0.0.1:2\n{HERE}:4\nno-such-machine.example:8\n", "hosts")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert usable_hosts(entries) == ((HostSlots(HERE, 7),), (HostSlots("no-such-machine.example", 8),))
    monkeypatch.setenv(VARIABLE, "[]")
    assert usable_hosts(entries) == (entries, ())


def test_a_name_that_only_the_resolver_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = parse_hosts("me.example.org:3\n", "hosts")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("socket.getfqdn", lambda: "me.example.org")
    discovery._further_names.cache_clear()
    try:
        assert usable_hosts(entries) == ((HostSlots(HERE, 3),), ())
    finally:
        discovery._further_names.cache_clear()


# -- finding out -------------------------------------------------------------------------------------------


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_script_prints_the_list(tmp_path: Path) -> None:
    assert read_hosts(script(tmp_path / "find hosts", "echo alpha:2; echo noise >&2")) == (("alpha", 2),)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo first >&2; echo no such zone >&2; exit 3", "failed with status 3: no such zone"),
        ("exit 4", "failed with status 4"),
        ("kill -KILL $$", "was ended by signal 9"),
        ("echo alpha", "the output of {path}, line 1: 'alpha' is not of the form"),
        ("sleep 1000 & sleep 1000", "{path} did not end within 0.3 s"),
    ],
)
def test_what_is_wrong_with_a_script(body: str, words: str, tmp_path: Path) -> None:
    path = script(tmp_path / "discover", body)
    with pytest.raises(ConfigError) as caught:
        read_hosts(path, limit_s=0.3)
    assert words.format(path=path) in str(caught.value)


def test_a_list_that_is_executable_by_mistake(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost:2\n")
    (tmp_path / "hosts").chmod(0o755)
    with pytest.raises(ConfigError, match=r"status 127.* If it is a list and no program, take away its x permission"):
        read_hosts(tmp_path / "hosts")


def test_a_script_is_not_told_what_is_for_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("ZONE", "north")
    path = script(tmp_path / "discover", "echo $ZONE$OMPI_COMM_WORLD_RANK:2")
    assert read_hosts(path) == (("north", 2),)


def test_a_script_that_leaves_something_running_is_not_waited_for(tmp_path: Path) -> None:
    path = script(tmp_path / "discover", f"echo alpha:2; sleep 1000 & echo $! > {tmp_path}/pid")
    assert read_hosts(path) == (("alpha", 2),)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hosts cannot be read: No such file"):
        read_hosts(tmp_path / "hosts")
    (tmp_path / "hosts").write_bytes(b"\xff\xfe:1\n")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        read_hosts(tmp_path / "hosts")


class Looking:
    """A discovery whose looks are made by the test."""

    def __init__(self, path: Path, host: str = HERE) -> None:
        self.found: list[tuple[HostSlots, ...]] = []
        self.discovery = Discovery(path, 3600.0, self.found.append, lambda: True, host)

    def look(self, times: int = 1) -> list[tuple[HostSlots, ...]]:
        for _ in range(times):
            self.discovery.look()
        return self.found


def test_a_list_is_believed_when_it_is_seen_twice(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("localhost:16\n")
    looking = Looking(path)
    assert looking.look() == []
    assert looking.look() == [((HERE, 16),)]
    path.write_text("localhost:1")  # somebody is writing
    assert len(looking.look()) == 1
    path.write_text("localhost:12\n")
    assert len(looking.look()) == 1
    assert looking.look()[1:] == [((HERE, 12),)]
    looking.discovery.close()
    assert len(looking.look()) == 2


def test_a_machine_that_is_renamed_is_still_the_host_of_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hosts"
    looking = Looking(path)
    for line, slots in (("localhost:2", 2), (f"{HERE}:3", 3), ("laptop-vpn:4", 4)):
        path.write_text(f"{line}\n")
        looking.look()
        monkeypatch.setattr("socket.gethostname", lambda: "laptop-vpn")
        looking.look()
        assert looking.found[-1] == ((HERE, slots),)


def test_a_newcomer_calls_its_machine_as_its_sponsor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "laptop-vpn")
    assert own_host({"PMIX_HOSTNAME": "laptop"}) == "laptop-vpn", "it has no sponsor"
    monkeypatch.setitem(sys._xoptions, JOIN_OPTION, "join-laptop.local:7-1.1@laptop.local:7")
    for known in ("laptop", "laptop.local"):
        assert own_host({"PMIX_HOSTNAME": known}) == "laptop.local"
    assert own_host({"PMIX_HOSTNAME": "other"}) == own_host({"PMIX_HOSTNAME": ""}) == own_host({}) == "laptop-vpn"
    assert own_host({"PMIX_HOSTNAME": "laptop", VARIABLE: "[]"}) == "laptop-vpn"
    assert own_host({"PMIX_HOSTNAME": "laptop", VARIABLE: "[]", "CHAOS_HOST": "edge1"}) == "edge1"


def test_trouble_is_told_once_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "hosts"
    path.write_text("localhost:2\nfar:3\n")
    looking = Looking(path)
    with caplog.at_level(logging.WARNING):
        looking.look(3)
        assert [r.message for r in caplog.records] == [
            "host far is another machine; its 3 slots are only used by jobs that are started with --hosts"
        ]
        caplog.clear()
        path.unlink()
        looking.look(3)
        assert len(caplog.records) == 1
        assert "No such file or directory. The hosts that were known before hold on" in caplog.text
        path.write_text("localhost\n")
        looking.look(2)
        assert len(caplog.records) == 2
        assert "line 1" in caplog.text
        path.write_text("localhost:2\n")
        looking.look(2)
        assert len(caplog.records) == 3
        assert "can be used again" in caplog.text
    assert set(looking.found) == {((HERE, 2),)}


def test_names_are_checked_where_they_are_for_ssh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "hosts"
    path.write_text("edge1:1\nfd00::2:1\n")
    monkeypatch.setenv(VARIABLE, "[]")
    looking = Looking(path)
    assert looking.look(2) == []
    assert f"{path}, line 2: 'fd00::2' is not the name of a host. The hosts that were known" in caplog.text
    path.write_text("edge1:1\n")
    assert looking.look(2) == [(("edge1", 1),)]


def test_only_the_one_whose_turn_it_is_looks(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("localhost:2\n")
    asked, observed, turn = threading.Event(), threading.Event(), threading.Event()

    def is_my_turn() -> bool:
        asked.set()
        return turn.is_set()

    discovery = Discovery(path, 0.001, lambda _: observed.set(), is_my_turn, HERE)
    assert asked.wait(30)
    assert not observed.is_set()
    turn.set()
    assert observed.wait(30)
    discovery.close()


# -- policies ----------------------------------------------------------------------------------------------


def hosts(started: dict[str, int] | None = None, failed: dict[str, int] | None = None, **slots: int) -> HostList:
    entries = tuple(HostSlots(*item) for item in slots.items())
    return HostList(entries, tuple((started or {}).items()), tuple((failed or {}).items()))


def available(
    members: str, listed: HostList, joining: tuple[str, ...] = (), limits: Limits | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    decision = Available().decide(ScaleInputs(tuple(members.split()), joining, listed, limits or Limits()))
    return decision.joins, decision.leaves


def test_free_slots_are_filled_in_the_order_of_the_list() -> None:
    assert available("a:1 b:1", hosts(b=2, a=3)) == (("b", "a", "a"), ())
    assert available("a:1 b:1", hosts(b=2, a=3), limits=Limits(max_ranks=4)) == (("b", "a"), ())
    assert available("a:1 b:1", hosts(b=1, a=1)) == ((), ())


def test_newcomers_on_their_way_take_up_slots() -> None:
    assert available("a:1", hosts(a=3), joining=("a",)) == (("a",), ())
    assert available("a:1", hosts(a=2, b=2), joining=("",)) == (("b", "b"), ())
    assert available("a:1", hosts(a=3), joining=("a",), limits=Limits(max_ranks=2)) == ((), ())


def test_the_highest_ranks_go_and_those_of_vanished_hosts_first() -> None:
    assert available("a:1 a:2 a:3", hosts(a=1)) == ((), ("a:2", "a:3"))
    assert available("b:1 a:1 a:2", hosts(a=1)) == ((), ("b:1", "a:2"))
    assert available("b:1 a:1 a:2", hosts(a=1), limits=Limits(min_ranks=2)) == ((), ("b:1",))
    assert available("a:1 a:2", hosts()) == ((), ("a:2",))
    assert available("a:1 a:2", hosts(a=0), limits=Limits(min_ranks=2)) == ((), ())


def test_a_job_moves_from_one_host_to_another() -> None:
    assert available("a:1 a:2", hosts(b=2), limits=Limits(min_ranks=2)) == (("b", "b"), ())
    assert available("a:1 a:2 b:1 b:2", hosts(b=2), limits=Limits(min_ranks=2)) == ((), ("a:1", "a:2"))


def test_a_host_whose_ranks_die_again_and_again_is_left_alone() -> None:
    listed = hosts({"a": 2 * STARTS_PER_SLOT - 1}, a=2, b=1)
    first = Available().decide(ScaleInputs(("c:1",), (), listed, Limits()))
    assert first.joins == ("a", "b")
    assert first.exhausted == ("a",)
    other = hosts({"a": 2 * STARTS_PER_SLOT}, a=2)
    assert Available().decide(ScaleInputs(("a:1",), (), other, Limits())) == Decision(exhausted=("a",))
    assert Available().decide(ScaleInputs(("a:1", "a:2"), (), other, Limits())) == Decision()


def test_a_host_where_joins_fail_is_left_alone() -> None:
    listed = hosts({}, {"a": MAX_FAILED - 1, "b": MAX_FAILED}, a=2, b=1)
    assert Available().decide(ScaleInputs(("a:1",), (), listed, Limits())) == Decision(("a",), exhausted=("b",))


def test_manual_does_nothing() -> None:
    assert Manual().decide(ScaleInputs(("a:1",), (), hosts(a=9), Limits(max_ranks=9))) == Decision()


HOSTS = "abcd"
host_lists = st.builds(
    HostList,
    st.lists(st.builds(HostSlots, st.sampled_from(HOSTS), st.integers(0, 4)), unique_by=lambda e: e.host).map(tuple),
    st.dictionaries(st.sampled_from(HOSTS), st.integers(1, 30)).map(lambda counts: tuple(sorted(counts.items()))),
    st.dictionaries(st.sampled_from(HOSTS), st.integers(1, 4)).map(lambda counts: tuple(sorted(counts.items()))),
)


@st.composite
def scale_inputs(draw: st.DrawFn) -> ScaleInputs:
    places = draw(st.lists(st.sampled_from(HOSTS), min_size=1, max_size=6))
    members = tuple(f"{host}:{number}" for number, host in enumerate(places))
    joining = tuple(draw(st.lists(st.sampled_from([*HOSTS, ""]), max_size=3)))
    least = draw(st.integers(1, 5))
    most = draw(st.none() | st.integers(least, 8))
    return ScaleInputs(members, joining, draw(host_lists), Limits(least, most))


@settings(max_examples=300, deadline=None)
@given(scale_inputs())
def test_limits_hold(inputs: ScaleInputs) -> None:
    decision = Available().decide(inputs)
    staying = len(inputs.members) - len(decision.leaves)
    assert staying >= min(len(inputs.members), max(1, inputs.limits.min_ranks))
    if inputs.limits.max_ranks is not None and decision.joins:
        assert staying + len(inputs.joining) + len(decision.joins) <= inputs.limits.max_ranks
    assert [m for m in inputs.members if m in decision.leaves] == list(decision.leaves)
    slots = dict(inputs.hosts.entries)
    for host in HOSTS:
        there = sum(m.startswith(f"{host}:") and m not in decision.leaves for m in inputs.members)
        coming = inputs.joining.count(host) + decision.joins.count(host)
        assert not decision.joins.count(host) or there + coming <= slots[host]
        assert not any(m.startswith(f"{host}:") for m in decision.leaves) or there >= slots.get(host, 0)


@settings(max_examples=300, deadline=None)
@given(scale_inputs())
def test_what_is_decided_is_decided_once(inputs: ScaleInputs) -> None:
    decision = Available().decide(inputs)
    carried_out = ScaleInputs(
        tuple(m for m in inputs.members if m not in decision.leaves),
        (*inputs.joining, *decision.joins),
        inputs.hosts.with_started(decision.joins),
        inputs.limits,
    )
    assert not Available().decide(carried_out).changes_something


@settings(max_examples=300, deadline=None)
@given(scale_inputs())
def test_the_negotiation_refuses_nothing_that_is_decided(inputs: ScaleInputs) -> None:
    view = View(0, inputs.members)
    asked = [[Proposal("join", f"{number}", host=host) for number, host in enumerate(inputs.joining)]]
    agenda = negotiate(Agenda(hosts=inputs.hosts), view, asked, Limits()).agenda
    outcome, decision = settle(Available(), agenda, negotiate(agenda, view, [], inputs.limits), view, inputs.limits)
    assert decision == Available().decide(inputs)
    assert not outcome.refused
    assert outcome.leave == decision.leaves
    new = {join.id for join in outcome.agenda.joins} - {join.id for join in agenda.joins}
    assert sorted(join.host for join in outcome.agenda.joins if join.id in new) == sorted(decision.joins)
    assert outcome.agenda.hosts == inputs.hosts.with_started(decision.joins)


# -- among the members -------------------------------------------------------------------------------------


def observed(**slots: int) -> Proposal:
    return Proposal("hosts", "hosts", hosts=tuple(HostSlots(*item) for item in slots.items()))


def test_the_lowest_rank_says_which_hosts_there_are() -> None:
    view = View(0, ("a:1", "b:2"))
    first = negotiate(Agenda(), view, [[], [observed(a=2)]], Limits()).agenda
    assert first.hosts == hosts(a=2)
    second = negotiate(first, view, [[observed(a=3)], [observed(a=2)]], Limits()).agenda
    assert second.hosts == hosts(a=3)
    assert negotiate(second, view, [[], []], Limits()).agenda.hosts == hosts(a=3)


def test_starts_are_counted_until_the_list_changes() -> None:
    view = View(0, ("a:1",))
    agenda = Agenda(hosts=hosts({"a": 4}, {"a": 1}, a=2))
    assert negotiate(agenda, view, [[observed(a=2)]], Limits()).agenda.hosts == agenda.hosts
    assert negotiate(agenda, view, [[observed(a=3)]], Limits()).agenda.hosts == hosts(a=3)


def test_hosts_travel_as_json() -> None:
    agenda = Agenda(settled=frozenset({"x"}), hosts=hosts({"a": 1}, {"b": 2}, a=2, b=0))
    assert Agenda.from_json(json.loads(json.dumps(agenda.to_json()))) == agenda
    proposal = observed(a=2, b=0)
    assert Proposal.from_json(json.loads(json.dumps(proposal.to_json()))) == proposal


def test_joins_that_are_given_up_count_against_their_host() -> None:
    view = View(0, ("a:1",))
    agenda = negotiate(Agenda(hosts=hosts(a=1)), view, [[Proposal("join", "j", host="b")]], Limits()).agenda
    refused = [[Proposal("misfit", "j", attempt=1, reason="too old")]]
    outcome, _ = settle(Available(), agenda, negotiate(agenda, view, refused, Limits()), view, Limits())
    assert outcome.agenda.hosts == hosts({}, {"b": 1}, a=1)
    assert with_failed(outcome.agenda, agenda.joins).hosts == hosts({}, {"b": 2}, a=1)
    anywhere = [replace(join, host="") for join in agenda.joins]
    assert with_failed(outcome.agenda, anywhere) == outcome.agenda
    assert with_failed(Agenda(), agenda.joins) == Agenda()


def test_the_policy_waits_while_the_members_have_other_things_to_do() -> None:
    view = View(0, ("a:1", "a:2"))
    rows = [[observed(a=1), Proposal("join", "j", host="b")]]
    outcome, decision = settle(Available(), Agenda(), negotiate(Agenda(), view, rows, Limits()), view, Limits())
    assert decision == Decision()
    assert [join.id for join in outcome.start] == ["j"]
    assert decide(Available(), outcome.agenda, view, Limits()).leaves == ("a:2",)


def test_the_policy_has_nothing_to_say_when_the_job_stops() -> None:
    view, agenda = View(0, ("a:1",)), Agenda(hosts=hosts(a=2))
    assert decide(Available(), agenda, view, Limits()).joins
    outcome = negotiate(agenda, view, [[Proposal("stop", "stop", "a:1", reason="SIGTERM")]], Limits())
    outcome, decision = settle(Available(), agenda, outcome, view, Limits())
    assert (outcome.stop, outcome.start, decision) == ("SIGTERM", (), Decision())


def test_nothing_is_decided_before_anybody_has_looked() -> None:
    assert decide(Available(), Agenda(), View(0, ("a:1", "b:1")), Limits()) == Decision()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(HOSTS), st.integers(0, 3), max_size=3), min_size=1, max_size=3),
    st.integers(1, 4),
    st.none() | st.integers(4, 6),
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_a_job_comes_to_rest_at_what_is_there(
    lists: list[dict[str, int]], least: int, most: int | None, random: object, failing: float
) -> None:
    """Members that hold replicas of the agenda follow lists that change, while starts fail and members die."""
    limits, numbers = Limits(least, most), itertools.count(1)
    view, agenda, news = View(0, tuple(f"a:{-n}" for n in range(least))), Agenda(), []
    for slots in lists:
        news.append(observed(**slots))
        starts = 0
        for round_ in itertools.count():
            assert round_ < 400, "it does not come to rest"
            if not news and not decide(Available(), agenda, view, limits).changes_something:
                break
            rows = [news if index == 0 else [] for index in range(view.size)]
            outcomes = [
                settle(Available(), a, negotiate(a, view, rows, limits), view, limits)[0]
                for a in (agenda, Agenda.from_json(json.loads(json.dumps(agenda.to_json()))))
            ]
            assert outcomes[0] == outcomes[1]
            outcome, news = outcomes[0], []
            agenda = outcome.agenda
            staying = [m for m in view.members if m not in outcome.leave]
            assert len(staying) >= min(view.size, least)
            for join in outcome.start:
                starts += 1
                fails = random.random() < failing  # type: ignore[attr-defined]
                kind = "failed" if fails else "arrived"
                news.append(Proposal(kind, join.id, f"{join.host}:{next(numbers)}", attempt=join.attempt))
            view = view.next([*staying, *(join.newcomer for join in outcome.admit)])
            assert most is None or view.size <= max(most, least)
        if failing == 1.0:  # those that are on their way when one too many fails are counted, too
            assert starts <= sum(MAX_FAILED - 1 + n for n in slots.values()) * MAX_ATTEMPTS
        if failing == 0.0:
            wanted = max(least, sum(slots.values()) if most is None else min(most, sum(slots.values())))
            assert view.size == wanted
