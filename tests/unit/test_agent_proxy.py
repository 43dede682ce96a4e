"""Proxy and supervisor as processes, with a shell script for a rank and one in the place of ssh, without MPI."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos_mpi.agent import dialling
from chaos_mpi.agent.placement import Placement, parser, placement_of, supervisor_command
from chaos_mpi.agent.processes import is_running, start_time
from chaos_mpi.agent.proxy import Proxy, order
from chaos_mpi.agent.registry import Ends
from chaos_mpi.agent.spawning import JOIN_OPTION
from chaos_mpi.cli.outcome import read_records
from chaos_mpi.errors import ConfigError

ROOT = Path(__file__).parents[2]
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT), "PMIX_NAMESPACE": "job@1", "PMIX_RANK": "0"}
LIMIT_S = 20.0
#: A rank that goes on until a file is there, whatever it is told; says its number first.
PATIENT = """
trap 'touch $1/told' TERM
echo $$ > "$1/pid"
while [ ! -e "$1/stop" ]; do echo tick; sleep 0.05; done
echo done
touch "$1/ended"
"""
#: Starts a proxy as mpirun would, and waits.
LAUNCHER = """
import signal, subprocess, sys
proxy = subprocess.Popen(sys.argv[1:])
print(proxy.pid, flush=True)
signal.pause()
"""


def proxy(*argv: str, options: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-P", "-m", "chaos_mpi.agent.proxy", *options, "--", *argv]


def run(*argv: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = proxy(*argv, options=options)
    return subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def wait_for(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


def written(path: Path) -> str:
    """What is in a file, once there is a whole line in it."""
    wait_for(f"a line in {path}", lambda: path.exists() and path.read_text().endswith("\n"))
    return path.read_text().strip()


@pytest.fixture
def ssh(tmp_path: Path) -> tuple[str, ...]:
    """Options that have the rank started by a script in the place of ssh, with the environment that a login gives."""
    script = tmp_path / "ssh"
    script.write_text(
        '#!/bin/sh\n[ "$1" = refused ] && { echo "Permission denied" >&2; exit 255; }\n'
        f'echo "welcome to $1"\nexec env -i HOME=/ PATH="$PATH" PYTHONPATH={ROOT} sh -c "$2"\n'
    )
    script.chmod(0o755)
    return ("--host", "edge1", "--ssh-command", str(script))


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


class Running:
    """A launcher with a proxy and a patient rank, which all end with the test."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path, options: tuple[str, ...] = ()) -> None:
        self.directory = directory
        command = proxy("sh", "-c", PATIENT, "sh", str(directory), options=("--log-dir", f"{directory}/logs", *options))
        self.launcher = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", LAUNCHER, *command], env=ENVIRON, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self.launcher.kill)
        stack.callback((directory / "stop").touch)
        assert self.launcher.stdout is not None
        self.proxy = int(self.launcher.stdout.readline())
        self.rank = int(written(directory / "pid"))
        self._started = start_time(self.rank)
        self.supervisor = int(Path(f"/proc/{self.rank}/stat").read_text().rpartition(")")[2].split()[1])

    @property
    def rank_lives(self) -> bool:
        return is_running(self.rank, self._started)

    @property
    def log(self) -> str:
        files = list((self.directory / "logs").rglob("rank-0.log"))
        return files[0].read_text() if files else ""


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", -9), ("kill -SEGV $$", -11)]
)
def test_the_proxy_ends_as_the_rank_does(script: str, status: int) -> None:
    assert run("sh", "-c", script).returncode == status


def test_the_death_of_a_rank_shows_while_its_child_holds_the_output_open(tmp_path: Path) -> None:
    child = tmp_path / "child"
    done = run("sh", "-c", f"sleep 600 & echo $! > {child}; echo said >&2; kill -KILL $$")
    os.kill(int(child.read_text()), signal.SIGKILL)  # it was there all the time
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "said\n")


def test_output_passes_through(ssh: tuple[str, ...]) -> None:
    script = "echo to-stderr >&2; seq 100000"
    for options, greeting in (((), ""), (ssh, "welcome to edge1\n")):
        done = run("sh", "-c", script, options=options)
        assert done.stdout.split() == [str(number) for number in range(1, 100001)]
        assert done.stderr == f"{greeting}to-stderr\n"


def test_a_rank_has_a_terminal_where_the_proxy_has_one() -> None:
    """Programs print line by line then."""
    assert run("sh", "-c", "test -t 1").returncode == 1
    ours, theirs = pty.openpty()
    command = proxy("sh", "-c", "test -t 1 && echo yes")
    with subprocess.Popen(command, env=ENVIRON, stdout=theirs) as process:
        assert process.wait(LIMIT_S) == 0
    assert os.read(ours, 100).split() == [b"yes"]
    os.close(ours)
    os.close(theirs)


def test_the_environment_of_a_rank_elsewhere(ssh: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRON, "CHAOS_TOKEN", "it's a 'value'\nof two lines")
    monkeypatch.setitem(ENVIRON, "SECRET", "x")
    monkeypatch.setitem(ENVIRON, "DATA", "/data")
    script = 'echo "$CHAOS_TOKEN|$SECRET|$DATA|$PMIX_RANK|$PWD"; cat /proc/$PPID/cmdline'
    done = run("sh", "-c", script, options=(*ssh, "--export", "DATA", "--wdir", "/tmp"))
    assert done.stdout.startswith("it's a 'value'\nof two lines||/data|0|/tmp\n")
    assert "supervisor" in done.stdout
    assert "two lines" not in done.stdout.partition("supervisor")[0].partition("\n")[2].partition("\n")[2]


@pytest.mark.parametrize(
    ("argv", "options", "message"),
    [
        (("/no/such",), (), "/no/such: No such file"),
        (("true",), ("--wdir", "/no/such"), "there is no directory /no/such; name another with --wdir"),
        (("true",), ("--host=-x",), "not the name of a host"),
        (("true",), ("--host", "a", "--ssh-command", "/no/ssh"), "'/no/ssh' cannot be run"),
        (("true",), ("--hosts", "a,b", "--host", ""), "not allowed with"),
    ],
)
def test_why_a_rank_is_not_started(argv: tuple[str, ...], options: tuple[str, ...], message: str) -> None:
    done = run(*argv, options=options)
    assert done.returncode not in (0, -9)
    assert message in done.stderr


def test_ssh_that_does_not_connect(ssh: tuple[str, ...]) -> None:
    done = run("true", options=("--host", "refused", *ssh[2:]))
    assert done.returncode == 1
    assert "Permission denied\n" in done.stderr
    assert "ended with status 255 before the rank was started" in done.stderr


class Dropping:
    """In the place of ssh, to a host that drops some connections before it lets others in; counts the attempts."""

    def __init__(self, directory: Path, drops: int, words: str = "kex_exchange_identification: read: Connection reset"):
        self._calls, self.script = directory / "calls", directory / "dropping"
        self.script.write_text(
            f'#!/bin/sh\necho >> {self._calls}\n[ "$(wc -l < {self._calls})" -gt {drops} ] || '
            f'{{ echo "{words}" >&2; exit 255; }}\nexec env -i PATH="$PATH" PYTHONPATH={ROOT} sh -c "$2"\n'
        )
        self.script.chmod(0o755)
        self.options = ("--host", "edge1", "--ssh-command", str(self.script))

    @property
    def calls(self) -> int:
        return len(self._calls.read_text().splitlines())


def test_a_host_that_drops_connections_is_tried_again(tmp_path: Path) -> None:
    ssh = Dropping(tmp_path, 2)
    done = run("sh", "-c", "echo up; exit 3", options=ssh.options)
    assert (done.returncode, done.stdout, ssh.calls) == (3, "up\n", 3)
    assert done.stderr.count("kex_exchange_identification") == done.stderr.count("it is tried again") == 2


@pytest.mark.parametrize(("words", "calls"), [("Connection reset by 10.0.0.1 port 22", 4), ("Connection refused", 1)])
def test_a_host_is_not_tried_for_ever(
    words: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dialling, "TRIES", 3)
    monkeypatch.setattr(dialling, "PAUSE_S", (0.01, 0.02))
    monkeypatch.setattr(dialling, "LIMIT_S", 1e6)
    ssh = Dropping(tmp_path, 100, words)
    started = Proxy(Placement("edge1", True, ssh=(str(ssh.script),)), ["true"], ENVIRON)
    assert asyncio.run(started.run()) == 1
    assert "ended with status 255 before the rank was started" in started.failure
    assert ssh.calls == calls == capfd.readouterr().err.count(words)


def test_a_rank_that_is_told_to_end_is_not_tried_again(tmp_path: Path) -> None:
    ssh = Dropping(tmp_path, 100)
    with subprocess.Popen(
        proxy("true", options=ssh.options), env=ENVIRON, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert any("it is tried again" in line for line in process.stderr)
        process.terminate()
        assert process.wait(LIMIT_S) == 1
    assert ssh.calls <= 3, "the signal may have come when it was just being tried"


def test_a_newcomer_that_cannot_be_started_is_not_waited_for(tmp_path: Path) -> None:
    argv = ("python", "-X", f"{JOIN_OPTION}=join-a:1-1.1@a:1", "train.py")
    done = run(*argv, options=("--host=-x", "--register", str(tmp_path)))
    assert done.returncode == 1
    (how,) = Ends(tmp_path).look().values()
    assert how == "it cannot be started: '-x' is not the name of a host"


def test_a_rank_that_cannot_be_entered_in_the_list_is_not_started(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("touch", str(tmp_path / "up"), options=("--register", str(tmp_path / "file")))
    assert done.returncode == 1
    assert f"is not started: {tmp_path}/file: Not a directory" in done.stderr
    assert not (tmp_path / "up").exists()


def test_signals_are_forwarded(tmp_path: Path) -> None:
    script = f"trap 'echo usr1' USR1; trap 'echo term; exit 7' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    with subprocess.Popen(proxy("sh", "-c", script), env=ENVIRON, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        wait_for("the rank", (tmp_path / "up").exists)
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "usr1\n"
        process.terminate()
        assert process.stdout.readline() == "term\n"
        assert process.wait(LIMIT_S) == 7


@pytest.mark.parametrize("remote", [False, True])
def test_a_rank_outlives_the_launcher(
    tmp_path: Path, ssh: tuple[str, ...], stack: contextlib.ExitStack, remote: bool
) -> None:
    job = Running(stack, tmp_path, ssh if remote else ())
    proxy_started, supervisor_started = start_time(job.proxy), start_time(job.supervisor)
    job.launcher.kill()
    wait_for("the end of the proxy", lambda: not is_running(job.proxy, proxy_started))
    wait_for("output in the file", lambda: job.log.count("tick") > 3)
    assert job.rank_lives
    (tmp_path / "stop").touch()
    wait_for("the end of the rank", (tmp_path / "ended").exists)
    wait_for("the last words", lambda: job.log.endswith("done\n"))
    wait_for("the end of the supervisor", lambda: not is_running(job.supervisor, supervisor_started))


def test_a_rank_ends_with_a_launcher_that_tidied_up(
    tmp_path: Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tmp_path / "session"
    session.mkdir()
    monkeypatch.setitem(ENVIRON, "PMIX_SERVER_TMPDIR", str(session))
    job = Running(stack, tmp_path)
    session.rmdir()
    job.launcher.kill()
    wait_for("the end of the rank", lambda: not job.rank_lives)
    assert not job.log


def test_a_rank_dies_with_its_proxy_when_the_launcher_lives(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    job = Running(stack, tmp_path)
    os.kill(job.proxy, signal.SIGKILL)
    wait_for("the end of the rank", lambda: not job.rank_lives)
    assert not (tmp_path / "ended").exists()


def test_a_rank_that_was_told_to_end_dies_with_its_proxy(
    tmp_path: Path, ssh: tuple[str, ...], stack: contextlib.ExitStack
) -> None:
    """The launcher says SIGTERM, and then SIGKILL."""
    job = Running(stack, tmp_path, ssh)
    os.kill(job.proxy, signal.SIGTERM)
    wait_for("the signal", (tmp_path / "told").exists)
    assert job.rank_lives
    os.kill(job.proxy, signal.SIGKILL)
    wait_for("the end of the rank", lambda: not job.rank_lives)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM])
def test_a_host_that_has_heard_of_the_end_of_a_rank_is_noted(
    number: signal.Signals, tmp_path: Path, ssh: tuple[str, ...], stack: contextlib.ExitStack
) -> None:
    registry = tmp_path / f"chaosrun-{tmp_path.name}"
    registry.mkdir()
    job = Running(stack, tmp_path, (*ssh, "--register", str(registry)))
    assert not read_records(registry).told
    os.kill(job.proxy, number)
    wait_for("the answer", lambda: read_records(registry).told)
    assert read_records(registry).told[job.proxy]["host"] == "edge1"


def test_a_rank_elsewhere_outlives_the_way_to_it(
    tmp_path: Path, ssh: tuple[str, ...], stack: contextlib.ExitStack
) -> None:
    """Its supervisor cannot know what has become of the launcher."""
    job = Running(stack, tmp_path, ssh)
    os.kill(job.proxy, signal.SIGKILL)
    wait_for("output in the file", lambda: job.log.count("tick") > 3)
    assert job.rank_lives


def test_a_rank_dies_with_its_supervisor(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    job = Running(stack, tmp_path)
    started = start_time(job.proxy)
    os.kill(job.supervisor, signal.SIGKILL)
    wait_for("the end of the rank", lambda: not job.rank_lives)
    wait_for("the end of the proxy", lambda: not is_running(job.proxy, started))


def test_placement() -> None:
    def placed(*argv: str, rank: str = "0") -> Placement:
        options: Namespace = parser().parse_args([*argv, "--", "train.py"])
        return placement_of(options, {"PMIX_RANK": rank})

    assert placed().host is None
    assert placed("--host", "a", rank="5").host == "a"
    assert [placed("--hosts", "a,,b", rank=rank).host for rank in "012"] == ["a", None, "b"]
    assert placed("--hosts", ",b", "--remote-python", "/py").python == sys.executable
    assert placed("--host", "b", "--remote-python", "/py").python == "/py"
    with pytest.raises(ConfigError, match="names 2 hosts"):
        placed("--hosts", "a,b", rank="2")


def test_what_is_said_where() -> None:
    environ = {"PMIX_RANK": "0", "SECRET": "x"}
    here, there = (
        order(Placement(None, False), ["a"], environ, False),
        order(Placement("b", True), ["a"], environ, False),
    )
    assert here["environ"] == environ
    assert there["environ"] == {"PMIX_RANK": "0"}
    assert here["launcher"] == [os.getppid(), start_time(os.getppid())]
    assert there["launcher"] is None
    assert supervisor_command(Placement("b", True, "/py", ("rsh", "-x")))[:3] == ["rsh", "-x", "b"]
