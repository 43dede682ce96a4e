"""The network test bed: what it promises about rates, cuts, names and removal, and MPI jobs over its hosts.

Skipped where a bed cannot be made: without root, or with a kernel that lacks a part.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.testbed import testbed
from launch.testbed.testbed import TestBed, TestBedError, mpirun_options, rank_command

PROGRAM = str(Path(__file__).with_name("mpi_program.py"))
SCRIPT = str(Path(testbed.__file__))
JOB_LIMIT_S = 60

REASON = testbed.why_not()
needs_bed = pytest.mark.skipif(REASON is not None, reason=f"no test bed can be made here: {REASON}")


@pytest.fixture
def bed() -> Iterator[TestBed]:
    with TestBed(3, rate_mbit=None) as made:
        yield made


def run_in(bed: TestBed, host: str, *argv: str) -> str:
    return subprocess.run(
        bed.command(host, argv), check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()


def traces(prefix: str) -> list[str]:
    """All that a bed of that name has left on this machine."""
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    found += subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout.splitlines()
    found += [str(path) for place in (testbed.STATE_DIR, testbed.NETNS_ETC) for path in place.glob("*")]
    return [line for line in found if prefix in line]


def sleeper(bed: TestBed, host: str) -> subprocess.Popen[str]:
    """A process that runs in a host, and ignores what it can ignore."""
    argv = bed.command(host, ["sh", "-c", "trap '' TERM INT HUP; echo up; while :; do sleep 1; done"])
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


# -- without root ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [0, 201, ["a", "a"], ["Big"], ["under_score"], ["switch"], ["-a"]])
def test_bad_hosts_are_refused(hosts: int | list[str]) -> None:
    with pytest.raises(TestBedError):
        TestBed(hosts)


@pytest.mark.parametrize("prefix", ["", "toolong90", "Upper", "0digit", "a-b"])
def test_bad_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(TestBedError, match="no name for a bed"):
        TestBed(2, prefix=prefix)


@pytest.mark.parametrize("rate", [0, -1, 1e9])
def test_bad_rate_is_refused(rate: float) -> None:
    with pytest.raises(TestBedError, match="a rate is"):
        TestBed(2, rate_mbit=rate)


def test_missing_privilege_and_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testbed.os, "geteuid", lambda: 1000)
    with pytest.raises(TestBedError, match="needs root"):
        testbed.check_platform()
    monkeypatch.setattr(testbed.os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(TestBedError, match="apt-get install iproute2"):
        testbed.check_platform()


# -- hosts -------------------------------------------------------------------------------------------------------


@needs_bed
def test_hosts_have_names_and_addresses_and_keep_cwd_and_environment(
    bed: TestBed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_BED_VARIABLE", "a value with 'quotes'")
    here = os.uname().nodename
    assert run_in(bed, "h1", "uname", "-n") == "h1"
    assert os.uname().nodename == here
    assert run_in(bed, "h2", "sh", "-c", "pwd; echo $TEST_BED_VARIABLE") == f"{tmp_path}\na value with 'quotes'"
    assert run_in(bed, "h0", "getent", "hosts", "h2").split() == [bed.address("h2"), "h2"]
    with pytest.raises(TestBedError, match="no host 'h9'"):
        bed.command("h9", ["true"])


@needs_bed
def test_the_launcher_reaches_hosts(bed: TestBed) -> None:
    with subprocess.Popen(
        bed.command("h1", [sys.executable, "-S", str(testbed.TRANSFER), "receive", bed.address("h1"), "0.2"]),
        stdout=subprocess.PIPE,
        text=True,
    ) as receiver:
        assert receiver.stdout is not None
        port = receiver.stdout.readline().strip()
        argv = [sys.executable, "-S", str(testbed.TRANSFER), "send", bed.address("h1"), port]
        subprocess.run(argv, check=True, timeout=20)
        assert int(receiver.stdout.readline().split()[0]) > 0


@needs_bed
def test_two_beds_side_by_side() -> None:
    with TestBed(["a", "b"], rate_mbit=None) as one, TestBed(["a", "b"], rate_mbit=None) as two:
        assert one.subnet != two.subnet
        two.cut("a", "b")
        assert one.measure("a", "b", 0.2) > 0
        with pytest.raises(TestBedError, match="in use"), TestBed(2, prefix=one.prefix):
            pass
        assert one.measure("a", "b", 0.2) > 0


# -- links -------------------------------------------------------------------------------------------------------


@needs_bed
def test_rates(bed: TestBed) -> None:
    bed.set_pair_rate("h0", "h1", 20)
    assert bed.measure("h0", "h1") == pytest.approx(20, rel=0.25)
    assert bed.measure("h1", "h0") == pytest.approx(20, rel=0.25)
    assert bed.measure("h0", "h2", 0.3) > 200
    bed.set_host_rate("h0", 100, down=False)
    assert bed.measure("h0", "h2") == pytest.approx(100, rel=0.25)
    assert bed.measure("h2", "h0", 0.3) > 200
    bed.set_host_rate("h2", 40, up=False)
    assert bed.measure("h0", "h2") == pytest.approx(40, rel=0.25)
    bed.set_pair_rate("h0", "h1", None)
    bed.set_host_rate("h0", None)
    assert bed.measure("h0", "h1", 0.3) > 200


@needs_bed
def test_a_newcomer_pulls_from_two_sources(bed: TestBed) -> None:
    """Uplinks limit each source, the downlink limits their sum and is shared out evenly."""
    bed.set_host_rate("h1", 30, down=False)
    bed.set_host_rate("h2", 90, down=False)
    pairs = [("h1", "h0"), ("h2", "h0")]
    assert bed.measure_together(pairs) == [pytest.approx(30, rel=0.25), pytest.approx(90, rel=0.25)]
    bed.set_host_rate("h0", 40, up=False)
    assert bed.measure_together(pairs) == [pytest.approx(20, rel=0.25), pytest.approx(20, rel=0.25)]


@needs_bed
def test_cut_restore_and_detour(bed: TestBed) -> None:
    bed.set_pair_rate("h0", "h1", 50)
    bed.cut("h0", "h1")
    assert bed.measure("h0", "h1", 0.2) == 0
    assert bed.measure("h1", "h0", 0.2) == 0
    assert bed.measure("h0", "h2", 0.2) > 0
    for host, other in (("h0", "h1"), ("h1", "h0")):
        run_in(bed, host, "ip", "route", "replace", bed.address(other), "via", bed.address("h2"))
    run_in(bed, "h2", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    assert bed.measure("h0", "h1", 0.2) > 100
    for host, other in (("h0", "h1"), ("h1", "h0")):
        run_in(bed, host, "ip", "route", "del", bed.address(other))
    bed.restore("h0", "h1")
    assert bed.measure("h0", "h1") == pytest.approx(50, rel=0.25)


@needs_bed
def test_power_off_kills_everything_and_says_nothing(bed: TestBed) -> None:
    receive = bed.command("h1", [sys.executable, "-c", SILENT_DEATH, bed.address("h1")])
    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        port = receiver.stdout.readline().strip()
        connect = "import socket,sys,time; s=socket.create_connection((sys.argv[1],int(sys.argv[2]))); time.sleep(60)"
        sender = subprocess.Popen(bed.command("h0", [sys.executable, "-c", connect, bed.address("h1"), port]))
        assert receiver.stdout.readline() == "connected\n"
        tough = sleeper(bed, "h0")
        bed.power_off("h0")
        assert bed.pids("h0") == []
        assert sender.wait(5) == tough.wait(5) == -signal.SIGKILL
        assert receiver.stdout.readline() == "silence\n"
    assert bed.measure("h1", "h2", 0.2) > 0
    bed.power_on("h0")
    assert bed.measure("h0", "h1", 0.2) > 0


#: Accepts one connection, and tells whether it ended, or nothing was heard for a second.
SILENT_DEATH = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
print("connected", flush=True)
connection.settimeout(1.5)
try:
    print("ended", connection.recv(1), flush=True)
except TimeoutError:
    print("silence", flush=True)
except OSError as error:
    print("ended", error, flush=True)
"""


# -- removal -----------------------------------------------------------------------------------------------------


@needs_bed
def test_removal_leaves_nothing_also_after_an_error() -> None:
    processes = []
    with pytest.raises(ZeroDivisionError), TestBed(3) as bed:  # noqa: PT012
        bed.cut("h0", "h2")
        processes = [sleeper(bed, host) for host in ("h0", "h1", "h1")]
        assert len(traces(bed.prefix)) > 3
        raise ZeroDivisionError
    assert [process.wait(5) for process in processes] == [-signal.SIGKILL] * 3
    assert traces(bed.prefix) == []
    bed.remove()


@needs_bed
def test_a_failure_while_building_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = TestBed(3)
    with monkeypatch.context() as patch, pytest.raises(TestBedError, match="CONFIG_NET_SCH_HTB"):  # noqa: PT012
        patch.setattr(TestBed, "_downlink", lambda *_: ["qdisc add dev p1 root nosuch"])
        bed.up()
    assert traces(bed.prefix) == []


@needs_bed
def test_command_line_and_stale_beds() -> None:
    def cli(*argv: str, code: int = 0) -> str:
        done = subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == code, done.stderr
        return (done.stdout + done.stderr).strip()

    prefix = cli("up", "x", "y")
    try:
        assert cli("--bed", prefix, "exec", "y", "--", "uname", "-n") == "y"
        cli("--bed", prefix, "rate", "x", "y", "30")
        assert float(cli("--bed", prefix, "measure", "x", "y")) == pytest.approx(30, rel=0.25)
        cli("--bed", prefix, "cut", "x", "y")
        assert {"  x - y: cut", "  x - y: 30"} <= set(cli("list").splitlines())
        cli("--bed", prefix, "restore", "x", "y")
        cli("--bed", prefix, "rate", "--up", "x", "10")
        assert "x: up 10, down unshaped" in cli("list")
        assert "no host 'z'" in cli("--bed", prefix, "cut", "x", "z", code=1)
    finally:
        cli("--bed", prefix, "down")
    assert traces(prefix) == []
    assert "there is no bed named" in cli("--bed", prefix, "down", code=1)

    # A bed whose maker was killed is found and removed by name of that fact.
    make = "import sys; from launch.testbed.testbed import *; b = TestBed(1); b.up(); print(b.prefix)"
    root = str(Path(SCRIPT).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", make], cwd=root, capture_output=True, text=True, timeout=30, check=True
    )
    orphan = done.stdout.strip()
    assert traces(orphan)
    with TestBed(1) as live:
        cli("down", "--stale")
        assert traces(orphan) == []
        assert traces(live.prefix)


# -- MPI ---------------------------------------------------------------------------------------------------------


def mpi_job(bed: TestBed, *scenario: str) -> tuple[int, list[dict[str, object]]]:
    """Exit status of four ranks in the first four hosts, and what they said.

    mpirun is started again, as chaosrun does, if it could not even start itself; that happens now and then.
    """
    for _ in range(2):
        status, found, err = _mpi_job(bed, *scenario)
        if found or "listener thread failed to start" not in err:
            break
    assert found, err
    return status, found


def _mpi_job(bed: TestBed, *scenario: str) -> tuple[int, list[dict[str, object]], str]:
    options = mpirun_options(bed)
    mpirun = str(Path(sys.executable).with_name("mpirun"))
    command = [mpirun, "--with-ft", "ulfm", "-n", "4", *options.arguments]
    command += rank_command(bed, [sys.executable, PROGRAM, *scenario])
    process = subprocess.Popen(
        command, env=os.environ | options.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=JOB_LIMIT_S)
    finally:
        process.terminate()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return process.returncode, found, err


def chosen(found: list[dict[str, object]], event: str, key: str) -> list[object]:
    return [line[key] for line in found if line["event"] == event]


@pytest.fixture(scope="module")
def mpi_bed() -> Iterator[TestBed]:
    with TestBed(5, rate_mbit=None) as made:
        yield made


@needs_bed
def test_mpi_ranks_in_hosts_with_shaped_rates(mpi_bed: TestBed) -> None:
    mpi_bed.set_pair_rate("h0", "h1", 100)
    mpi_bed.set_pair_rate("h0", "h2", 400)
    status, found = mpi_job(mpi_bed, "rate")
    assert status == 0
    assert sorted(chosen(found, "sum", "host")) == ["h0", "h1", "h2", "h3"]
    assert chosen(found, "sum", "total") == [10] * 4
    slow, fast, free = chosen(found, "rate", "mbit")
    # Fewer are no fault of the bed: the processors may be busy.
    assert slow == pytest.approx(100, rel=0.25)
    assert 1.5 * slow < fast < 1.25 * 400
    assert free > 1.5 * slow


@needs_bed
def test_mpi_a_killed_rank_is_noticed(mpi_bed: TestBed) -> None:
    _, found = mpi_job(mpi_bed, "kill")
    assert sorted(chosen(found, "shrunk", "host")) == ["h0", "h1", "h2"]
    assert chosen(found, "shrunk", "total") == [6] * 3


@needs_bed
def test_mpi_a_rank_spawned_into_another_host_joins_and_its_death_is_noticed(mpi_bed: TestBed) -> None:
    spawned = rank_command(mpi_bed, [sys.executable, PROGRAM, "spawned"], host="h4")
    _, found = mpi_job(mpi_bed, "spawn", *spawned)
    assert sorted(chosen(found, "sum", "host")) == ["h0", "h1", "h2", "h3", "h4"]
    assert chosen(found, "sum", "total") == [15] * 5
    assert sorted(chosen(found, "shrunk", "host")) == ["h0", "h1", "h2", "h3"]
    assert chosen(found, "shrunk", "total") == [10] * 4
