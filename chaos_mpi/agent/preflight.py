"""Before a job starts on several hosts: can each be reached, and does it have what is needed?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_mpi.agent import check
from chaos_mpi.agent.ssh import remote_command
from chaos_mpi.errors import ChaosError

#: Longest time for one host.
LIMIT_S = 30.0
#: Hosts that have not answered are spoken of so often, seconds.
PATIENCE_S = 5.0
#: So many hosts are asked at once.
AT_ONCE = 32
#: What a shell ends with when a command is missing or may not be run (POSIX), and ssh when it cannot connect.
_NOT_FOUND, _NOT_EXECUTABLE, _SSH_FAILED = 127, 126, 255


@dataclass(frozen=True)
class Answer:
    """What became of the question to one host.

    Attributes:
        status: exit status of the command; None: it did not end in time, or could not be run.
        output: what it printed.
        error: what it printed on standard error.
    """

    status: int | None
    output: str = ""
    error: str = ""


@dataclass(frozen=True)
class Problem:
    """Something that keeps a host from being used."""

    host: str
    text: str

    def __str__(self) -> str:
        return f"{self.host}: {self.text}"


def ask(
    hosts: Sequence[str],
    python: str,
    ssh: Sequence[str],
    wanted: Sequence[str] = (),
    limit_s: float = LIMIT_S,
    on_wait: Callable[[list[str]], None] | None = None,
) -> dict[str, Answer]:
    """Ask all hosts at once.

    Args:
        hosts: their names for ssh, each once.
        python: the Python to use there.
        ssh: command that runs another one on a host.
        wanted: files and directories that are to exist there; after a ``+``, a directory for new files; after an ``@``,
            a network or interface that is to be there.
        limit_s: time for each host.
        on_wait: is called every few seconds with the hosts that have not answered yet.
    """
    source, asked = Path(check.__file__).read_text(), set[str]()

    def one(host: str) -> Answer:
        asked.add(host)
        return _run(remote_command(ssh, host, [python, "-", *wanted]), source, limit_s)

    with ThreadPoolExecutor(max_workers=min(AT_ONCE, max(1, len(hosts)))) as pool:
        answers = {host: pool.submit(one, host) for host in hosts}
        while left := wait(answers.values(), PATIENCE_S).not_done:
            if on_wait is not None:
                on_wait([host for host, answer in answers.items() if answer in left and host in asked])
        return {host: answer.result() for host, answer in answers.items()}


def ask_here(wanted: Sequence[str] = (), limit_s: float = LIMIT_S) -> Answer:
    """The same for this host, for the others to be compared with."""
    return _run([sys.executable, "-", *wanted], Path(check.__file__).read_text(), limit_s)


def judge(answers: Mapping[str, Answer], here: Answer, python: str, *, here_takes_part: bool = False) -> list[Problem]:
    """What is wrong, host by host; nothing if the job can start. Pure.

    Args:
        answers: of the hosts.
        here: of this host, with which the others are compared.
        python: the Python that was to be used.
        here_takes_part: whether this host is to have what the others are to have.

    Raises:
        ChaosError: this host itself did not answer as it should.
    """
    reference = _report(here)
    if reference is None:
        raise ChaosError(f"this host cannot be checked: {_failure(here, sys.executable)}")
    problems = [Problem("this host", text) for text in _lacking(reference)] if here_takes_part else []
    for host, answer in answers.items():
        report = _report(answer)
        texts = [_failure(answer, python)] if report is None else _differences(report, reference)
        problems += [Problem(host, text) for text in texts]
    return problems


def _run(command: Sequence[str], source: str, limit_s: float) -> Answer:
    try:
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Answer(None, error=f"no answer within {limit_s:g} s")
    except OSError as error:
        return Answer(None, error=f"'{command[0]}' cannot be run: {error.strerror}")
    return Answer(done.returncode, done.stdout, done.stderr)


def _report(answer: Answer) -> dict[str, Any] | None:
    """What the check program printed, if it did."""
    _, mark, rest = answer.output.rpartition(check.MARK)
    if not mark:
        return None
    try:
        report: dict[str, Any] = json.loads(rest.splitlines()[0])
    except (ValueError, IndexError):
        return None
    return report


def _failure(answer: Answer, python: str) -> str:
    """Why a host did not answer, and what to do."""
    said = next((line.strip() for line in reversed(answer.error.splitlines()) if line.strip()), "")
    if answer.status is None:
        return said
    if answer.status == _SSH_FAILED:
        return f"ssh cannot connect: {said or 'it does not say why'}; see whether 'ssh HOST true' works by hand"
    if answer.status in (_NOT_FOUND, _NOT_EXECUTABLE):
        return f"there is no {python} that can be run; name the Python of that host with --remote-python ({said})"
    return f"the check with {python} ended with status {answer.status}: {said or 'it printed nothing'}"


def _differences(report: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """What a host has otherwise than this one, in words."""
    found = []
    if _minor(report["python"]) != _minor(reference["python"]):
        found.append(f"Python is {report['python']}, here it is {reference['python']}: use the same 3.x on all hosts")
    for name, wanted in reference["versions"].items():
        version = report["versions"][name]
        if wanted is None or _public(version) == _public(wanted):
            continue
        install = f"install it there with 'pip install {name}=={_public(wanted)}'"
        if name == "chaos-mpi":
            install = "install the same version there"
        missing = f"{name} is not installed for {report['executable']}"
        found.append(f"{missing if version is None else f'{name} is {version}'}, here it is {wanted}: {install}")
    if report["library_problem"] is not None and report["versions"]["mpi4py"] is not None:
        found.append(f"MPI cannot be loaded: {report['library_problem']}")
    elif report["library"] is not None and report["library"] != reference["library"]:
        found.append(f"the MPI library is {report['library']}, here it is {reference['library']}")
    return found + _lacking(report)


def _lacking(report: Mapping[str, Any]) -> list[str]:
    """What a host does not have of that which is wanted on all, in words."""
    found: list[str] = list(report["network_problems"])
    found += [f"there is no {path}" for path in report["missing"]]
    found += [f"no file can be made in {path}, where output is to go (--log-dir)" for path in report["unwritable"]]
    return found


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _public(version: str | None) -> str | None:
    """A version without its local label: builds for different accelerators fit together."""
    return None if version is None else version.partition("+")[0]
