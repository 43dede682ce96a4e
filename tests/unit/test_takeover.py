"""What another launcher is told of a job, what it makes of that, and where the state waits meanwhile."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.agent.environment import THREADS_BY_HOST
from chaos_mpi.agent.relaunch import hosts_of, launch_of
from chaos_mpi.agent.spawning import variables
from chaos_mpi.agent.ssh import DEFAULT_SSH, arguments_of, ssh_command
from chaos_mpi.cli.cluster import cluster_of
from chaos_mpi.cli.handover import ready
from chaos_mpi.elastic import kept
from chaos_mpi.elastic.launching import facts
from chaos_mpi.errors import CheckpointError, ConfigError, EngineError
from chaos_mpi.membership import host_of

MEMBERS = ["a:10", "user@b:4", "a:11"]


def told(
    arguments: list[str] | None = None, hosts: str = "a:2,user@b", ssh: str = "-p 22", program: str | None = None,
    network: str | None = "10.0.0.0/8", limit: float | None = 0.7, environ: dict[str, str] | None = None,
) -> dict[str, object]:  # fmt: skip
    """What a member of a job tells that was started with these options."""
    cluster = cluster_of(None, hosts, None, ssh, program, "/py", network, Path("/logs"), limit, "none")
    assert cluster is not None
    found = {**cluster.environment(Path("/tmp/chaosrun-x")), **(environ or {})}
    return {**facts(found, arguments or ["t.py", "-n"], "/here"), "members": MEMBERS, "host": "a", "has_state": True}


def test_a_job_is_started_as_it_was() -> None:
    launch = launch_of(told(environ={"CHAOS_TIMEOUT_S": "9", "CHAOS_HOST": "a", "HOME": "/root"}), "/python")
    assert dict(zip(launch.options[::2], launch.options[1::2], strict=True)) == {
        "--hosts": "a:2,user@b:1", "--ssh-args": "-p 22", "--remote-python": "/py", "--network": "10.0.0.0/8",
        "--log-dir": "/logs", "--heartbeat-limit": "0.7", "--even-split": "none",
    }  # fmt: skip
    assert launch.program == ("t.py", "-n")
    assert launch.settings == {"CHAOS_TIMEOUT_S": "9"}
    assert launch.directory == "/here"


def test_what_is_said_otherwise_is_left_out() -> None:
    launch = launch_of(told(), "/python", ["--ssh-args", "--hostfile"])
    assert not {"--ssh-args", "--hosts", "--hostfile"} & set(launch.options)
    assert "--remote-python" in launch.options


def test_routes_are_left_alone_again() -> None:
    assert "--no-detours" not in launch_of(told(), "/python").options
    careful = told()
    proxy = careful["proxy"]
    assert isinstance(proxy, list)
    proxy.append("--no-detours")
    assert launch_of(careful, "/python").options[-1] == "--no-detours"
    assert "--no-detours" not in launch_of(careful, "/python", ["--no-detours"]).options


def test_another_program_than_ssh_is_used_again() -> None:
    options = launch_of(told(program="/bin/run_on", ssh="--x 'a b'"), "/python").options
    assert options[options.index("--ssh-program") + 1] == "/bin/run_on"
    assert shlex.split(options[options.index("--ssh-args") + 1]) == ["--x", "a b"]


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["t.py", "-m"], ("t.py", "-m")),
        (["-m", "pack.train", "x.py"], ("-m", "pack.train", "x.py")),
        (["-X", "dev", "t.py"], ("/python", "-X", "dev", "t.py")),
        (["train"], ("/python", "train")),
    ],
)
def test_the_program_of_the_ranks(arguments: list[str], program: tuple[str, ...]) -> None:
    assert launch_of(told(arguments), "/python").program == program


def test_the_number_of_threads_goes_along_if_it_was_chosen() -> None:
    assert facts({"OMP_NUM_THREADS": "3"}, [], "/")["settings"] == {"OMP_NUM_THREADS": "3"}
    assert facts({"OMP_NUM_THREADS": "3", THREADS_BY_HOST: "1"}, [], "/")["settings"] == {}


def test_a_job_on_one_machine_cannot_be_taken_over() -> None:
    alone = {**facts({}, ["t.py"], "/"), "members": ["a:1"], "host": "a"}
    with pytest.raises(ConfigError, match="only a job with --hosts can be taken over"):
        launch_of(alone, "/python")


def test_a_job_without_a_state_cannot_be_taken_over() -> None:
    with pytest.raises(ConfigError, match="has not made its TrainingState"):
        launch_of({**told(), "has_state": False}, "/python")


def test_localhost_is_the_machine_that_the_launcher_meant() -> None:
    assert hosts_of(["localhost:1", "b:2"], "localhost") == "localhost:1,b:1"
    with pytest.raises(ConfigError, match="name all hosts with --hosts"):
        hosts_of(["localhost:1", "b:2"], "b")


@given(st.lists(st.text(max_size=8)), st.none() | st.sampled_from(["/bin/run_on", "rsh"]))
def test_options_for_ssh_are_found_again(options: list[str], program: str | None) -> None:
    arguments = shlex.join(options)
    assert arguments_of(ssh_command(arguments, program)) == (arguments, program)


def test_a_command_that_only_looks_like_ours_is_kept_whole() -> None:
    assert arguments_of(["ssh", "-p", "1"]) == ("-p 1", "ssh")
    assert arguments_of(DEFAULT_SSH) == ("", None)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, unique=True))
def test_each_host_has_one_keeper(ids: list[tuple[str, int]]) -> None:
    members = [f"{host}:{pid}" for host, pid in ids]
    found = kept.keepers(members)
    assert Counter(map(host_of, found)) == Counter({host_of(member) for member in members})
    assert set(found) <= set(members)
    assert all(members.index(member) <= min(i for i, m in enumerate(members) if host_of(m) == host_of(member))
               for member in found)  # fmt: skip


# -- where the state waits ---------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the place of shared memory."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(kept, "SHM_DIRECTORY", tmp_path / "memory")
    monkeypatch.setattr(kept.tempfile, "tempdir", str(tmp_path / "files"))
    return tmp_path / "memory"


def write(directory: Path) -> None:
    (directory / "state").write_text("it")


def test_the_state_is_kept_in_memory_and_removed(memory: Path) -> None:
    name = kept.new_name()
    place = kept.keep(name, 10, write)
    assert place == memory / name
    assert place.stat().st_mode & 0o777 == 0o700
    assert kept.found(name) == [place]
    kept.remove(name)
    assert not list(memory.iterdir())


def test_where_memory_is_too_small_the_state_is_in_a_file(
    memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept.psutil, "virtual_memory", _Memory)
    place = kept.keep(kept.new_name(), 10, write)
    assert place.parent == memory.parent / "files"
    assert "0 MiB are free" in caplog.text


class _Memory:
    available = 1000


def test_a_state_for_which_there_is_no_room_is_refused(memory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the state cannot be kept \(.*memory: .*; .*files: .*\)"):
        kept.keep(kept.new_name(), 1 << 60, write)
    assert not list(memory.iterdir())


def test_what_others_can_write_to_is_not_trusted(memory: Path) -> None:
    name = kept.new_name()
    (memory / name).mkdir(mode=0o777)
    (memory / name).chmod(0o777)
    with pytest.raises(EngineError, match="is not this user's alone"):
        kept.found(name)
    assert kept.keep(name, 10, write).parent == memory.parent / "files"


@pytest.mark.parametrize("name", ["", "..", "chaos-state-", "chaos-state-0123456789abcdef/..", "chaos-state-x" * 2])
def test_a_name_is_no_way_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match="not a name under which a state can be kept"):
        kept.places(name)


# -- when the new ranks are up -----------------------------------------------------------------------------


def test_the_ranks_are_up_when_all_that_live_wait(tmp_path: Path) -> None:
    me, parent, gone = os.getpid(), os.getppid(), 2**22 + 1
    assert not ready(tmp_path, 2)
    for kind, pid in (("starting", me), ("starting", parent), ("ready", me)):
        assert not ready(tmp_path, 2)
        (tmp_path / f"{kind}-{pid}.json").write_text("{}")
    assert not ready(tmp_path, 2)
    (tmp_path / f"ready-{parent}.json").write_text("{}")
    assert ready(tmp_path, 2)
    assert not ready(tmp_path, 3)
    (tmp_path / f"starting-{gone}.json").write_text("{}")
    assert ready(tmp_path, 3)


def test_variables_of_a_proxy_are_not_settings() -> None:
    assert facts(variables(["python", "-P", "-m", "proxy"]), [], "/")["settings"] == {}
