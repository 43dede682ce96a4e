"""Where the ranks of a job run: from the command line to that of ``mpirun``."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from chaos_mpi.agent.environment import THREADS_BY_HOST, host_variables
from chaos_mpi.agent.placement import is_here, parser, placement_of
from chaos_mpi.agent.spawning import JOIN_OPTION, VARIABLE, join_of, proxy_command, spawn_command, variables
from chaos_mpi.cli.chaosctl import main as chaosctl
from chaos_mpi.cli.chaosrun import main
from chaos_mpi.cli.cluster import Cluster, check_further, cluster_of
from chaos_mpi.cli.outcome import Records
from chaos_mpi.cli.process import MpirunJob, _StartWatch
from chaos_mpi.elastic.changes import ChangingSession
from chaos_mpi.errors import ConfigError, EngineError


def cluster(ranks: int | None = None, hosts: str | None = "a:2,b", hostfile: Path | None = None) -> Cluster | None:
    return cluster_of(ranks, hosts, hostfile, "-p 2222", None, None, None, None, None, None)


def test_ranks_are_placed() -> None:
    found = cluster()
    assert found is not None
    assert found.hosts == ("a", "a", "b")
    assert found.remote == ["a", "b"]
    assert found.ssh[:3] == ("ssh", "-p", "2222")
    fewer = cluster(2)
    assert fewer is not None
    assert fewer.hosts == ("a", "a")


def test_a_host_file(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfa slots=2 # here\r\n\r\nb\r\n")  # as Windows writes text
    found = cluster(hosts=None, hostfile=tmp_path / "hosts")
    assert found is not None
    assert found.hosts == ("a", "a", "b")


@pytest.mark.parametrize(
    ("hosts", "hostfile", "says"),
    [
        ("a", Path("x"), "give one of them"),
        (None, Path("/nowhere"), "/nowhere cannot be read"),
        (None, None, "--ssh-args is for jobs on several hosts"),
        ("a:0", None, "--hosts: 'a:0'"),
    ],
)
def test_what_makes_no_sense_is_refused(hosts: str | None, hostfile: Path | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cluster(None, hosts, hostfile)


def test_another_program_takes_the_place_of_ssh() -> None:
    found = cluster_of(None, "a", None, "--x", "/bin/run_on", None, None, None, None, None)
    assert found is not None
    assert found.ssh == ("/bin/run_on", "--x")


def test_one_machine_needs_no_cluster() -> None:
    assert cluster_of(2, None, None, "", None, None, None, None, None, None) is None


def test_the_command_of_a_rank_is_understood_by_the_proxy(tmp_path: Path) -> None:
    found = cluster_of(None, "a,b", None, "-o 'User x'", None, "/py", None, tmp_path / "logs", 0.7, "none")
    assert found is not None
    command = found.rank_command(tmp_path, ["/here/python", "t.py", "--", "-n", "3"])
    assert command[:4] == [sys.executable, "-P", "-m", "chaos_mpi.agent.proxy"]
    options = parser().parse_args(command[4:])
    placement = placement_of(options, {"PMIX_RANK": "1"})
    assert (placement.host, placement.remote, placement.python, placement.neighbours) == ("b", True, "/py", 1)
    assert placement.ssh[:3] == ("ssh", "-o", "User x")
    assert options.argv == ["/here/python", "t.py", "--", "-n", "3"]
    assert options.register == tmp_path
    assert placement.watch is not None
    assert (placement.watch.timing.limit_s, placement.watch.timing.even_split) == (0.7, "none")
    assert not placement.watch.newcomer
    assert placement.watch.detours
    assert placement.log_directory == str(tmp_path / "logs")


def test_the_directory_for_output_is_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = cluster_of(None, "a,b", None, "", None, None, None, Path("logs"), None, None)
    assert found is not None
    options = parser().parse_args(found.rank_command(tmp_path, ["t.py"])[4:])
    assert placement_of(options, {"PMIX_RANK": "1"}).log_directory == str(tmp_path / "logs")
    assert f"+{tmp_path}/logs" in found._needed


def test_routes_are_left_alone_if_so_ordered(tmp_path: Path) -> None:
    found = cluster_of(None, "a,b", None, "", None, None, None, None, None, None, no_detours=True)
    assert found is not None
    options = parser().parse_args(found.rank_command(tmp_path, ["t.py"])[4:])
    watch = placement_of(options, {"PMIX_RANK": "0"}).watch
    assert watch is not None
    assert not watch.detours


def test_the_launch_host_has_a_witness_where_it_has_no_rank(tmp_path: Path) -> None:
    elsewhere = cluster_of(None, "a,b", None, "", None, None, "10.0.0.0/8", None, 0.7, "none")
    assert elsewhere is not None
    settings = elsewhere.witness_settings()
    options = parser().parse_args(elsewhere.rank_command(tmp_path, ["t.py"], "launcher:7")[4:])
    watch = placement_of(options, {"PMIX_RANK": "0"}).watch
    assert settings is not None
    assert watch is not None
    assert (settings.timing, settings.network, settings.detours) == (watch.timing, watch.network, watch.detours)
    assert watch.witness == "launcher:7"
    here = cluster_of(None, f"a,{socket.gethostname()}", None, "", None, None, None, None, None, None)
    assert here is not None
    assert here.witness_settings() is None


def test_a_rank_has_another_one_started() -> None:
    prefix = proxy_command("/head/python", ["--ssh-command", "ssh -p 1"])
    environ = {**variables(prefix), "CHAOS_HOST": "edge1"}
    there = spawn_command(environ, "edge2", "/work", ["-X", "mark", "t.py"])
    assert there is not None
    assert there[: len(prefix)] == prefix
    options = parser().parse_args(there[4:])
    assert (options.host, options.wdir, options.argv) == ("edge2", "/work", ["/head/python", "-X", "mark", "t.py"])
    assert join_of(options.argv) == ""
    assert (
        join_of(["python", "-X", "dev", "-X", f"{JOIN_OPTION}=join-a:1-1.2@a:1", "t.py"])
        == f"{JOIN_OPTION}=join-a:1-1.2@a:1"
    )
    beside = spawn_command(environ, "", "/work", ["t.py"])
    assert beside is not None
    assert parser().parse_args(beside[4:]).host == "edge1"
    assert spawn_command({}, "edge2", "/work", ["t.py"]) is None


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_spoilt_variable_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=VARIABLE):
        spawn_command({VARIABLE: text}, "", "/", [])


def test_names_of_this_host() -> None:
    assert all(map(is_here, ["localhost", socket.gethostname(), f"me@{socket.gethostname()}"]))
    assert not is_here("edge1")


def test_cores_are_shared_among_neighbours() -> None:
    shared = {"CHAOS_HOST": "a", "OMP_NUM_THREADS": "4", THREADS_BY_HOST: "1"}
    assert host_variables({"host": "a", "neighbours": 2}, {}, 8) == shared
    assert host_variables({"host": None, "neighbours": 9}, {}, 8)["OMP_NUM_THREADS"] == "1"
    assert host_variables({"host": None, "neighbours": 1}, {"OMP_NUM_THREADS": "2"}, 8) == {}


def test_further_hosts_are_checked_as_the_first_were(tmp_path: Path) -> None:
    assert check_further(tmp_path, "anywhere") == []
    found = Cluster(("a",), ("false",), sys.executable)
    found.note(tmp_path)
    (problem,) = check_further(tmp_path, "edge7")
    assert problem.startswith("edge7: the check with ")
    assert check_further(tmp_path, "localhost") == []


def test_a_further_host_with_a_name_that_is_none(tmp_path: Path) -> None:
    Cluster(("a",), ("false",), sys.executable).note(tmp_path)
    (tmp_path / "control-1.sock").touch()  # a job runs
    refused = CliRunner().invoke(chaosctl, ["add", "--job", str(tmp_path), "--host=-x"])
    assert refused.exit_code == 1, refused.output
    assert "'-x' is not the name of a host" in refused.output


@pytest.mark.parametrize("name", ["fd00::2", "-x", "a b", "a;b"])
def test_a_rank_on_a_host_with_a_name_that_is_none_is_refused_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    negotiator = SimpleNamespace(requests=SimpleNamespace(join=lambda host, _: asked.append(host)))
    session: Any = SimpleNamespace(has_state=True, _negotiator=negotiator)
    monkeypatch.setenv(VARIABLE, "[]")
    with pytest.raises(ConfigError, match=f"no rank can join: '{name}' is not the name of a host"):
        ChangingSession.request_join(session, 1, name)
    ChangingSession.request_join(session, 1, "me@edge-1.example")
    ChangingSession.request_join(session)
    monkeypatch.delenv(VARIABLE)
    ChangingSession.request_join(session, 1, name)
    assert asked == ["me@edge-1.example", "", name]


def test_names_in_a_list_of_hosts_are_checked_before_the_job_starts(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost:1\nfd00::2:4\n")
    (tmp_path / "t.py").touch()
    one_machine = ["--hosts-from", str(tmp_path / "hosts"), "--dry-run", str(tmp_path / "t.py")]
    assert CliRunner().invoke(main, one_machine).exit_code == 0
    refused = CliRunner().invoke(main, ["--hosts", "a", *one_machine])
    assert refused.exit_code == 2
    assert f"{tmp_path}/hosts, line 2: 'fd00::2' is not the name of a host" in refused.output


def test_a_line_that_is_too_long_for_the_system(tmp_path: Path) -> None:
    line = [sys.executable, ",".join(["edge1"] * 10**5)]
    with pytest.raises(EngineError, match="cannot be started for 100000 ranks: Argument list too long"):
        MpirunJob(line, {}, tmp_path, ranks=10**5, tagged=False, drop_noise=False)


def test_dry_run_shows_the_proxies(tmp_path: Path) -> None:
    script = tmp_path / "t.py"
    script.touch()
    shown = CliRunner().invoke(main, ["--hosts", "a:2,b", "--dry-run", str(script)])
    assert shown.exit_code == 0
    words = shlex.split(shown.output)
    assert words[words.index("--hosts") + 1] == "a,a,b"
    assert words[words.index("-n") + 1] == "3"
    assert "PMIX_MCA_gds=hash" in words
    assert words[words.index("btl") + 1] == "self,tcp"
    (told,) = [word.partition("=")[2] for word in words if word.startswith("CHAOS_PROXY=")]
    assert json.loads(told)[0] == sys.executable
    assert not [word for word in words if word.startswith("OMP_NUM_THREADS")]


def test_hosts_and_ranks_have_to_fit(tmp_path: Path) -> None:
    script = tmp_path / "t.py"
    script.touch()
    refused = CliRunner().invoke(main, ["--hosts", "a,b", "-n", "3", str(script)])
    assert refused.exit_code == 2
    assert "3 ranks need as many slots" in refused.output


def test_ranks_that_have_started_mpi_see_to_deaths_themselves() -> None:
    with subprocess.Popen(["sleep", "60"]) as launcher:  # has no children: all ranks are gone
        starting = Records(starting={1: {}, 2: {}}, members={}, outcomes={})
        watch = _StartWatch(launcher.pid, 2)
        assert watch.loss(starting, 1.0) is None
        assert "2 of the 2 ranks died before MPI was up" in (watch.loss(starting, 100.0) or "")
        assert watch.loss(replace(starting, connected={1: {}}), 100.0) is None
        launcher.kill()
