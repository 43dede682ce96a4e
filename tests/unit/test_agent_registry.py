"""The list of a job's proxies, and fencing: the proxies of one host are killed, and no other process."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chaos_mpi.agent.processes import start_time
from chaos_mpi.agent.registry import Ends, Registered, end, fence, register, registered, wait_for_end
from chaos_mpi.errors import EngineError

ROOT = Path(__file__).parents[2]
PROXY = """
import sys, time
from pathlib import Path
from chaos_mpi.agent.registry import end, register, wait_for_end
register(Path(sys.argv[1]), sys.argv[2], "job@1", int(sys.argv[3]))
print("up", flush=True)
time.sleep(60)
"""


def proxy(directory: Path, host: str, rank: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROXY, str(directory), host, str(rank)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_only_the_proxies_of_the_host_are_killed(tmp_path: Path) -> None:
    with proxy(tmp_path, "a", 0) as one, proxy(tmp_path, "b", 1) as two, proxy(tmp_path, "b", 2) as three:
        found = {entry.pid: entry for entry in registered(tmp_path)}
        assert set(found) == {one.pid, two.pid, three.pid}
        assert found[two.pid] == Registered("b", "job@1", 1, two.pid, start_time(two.pid))
        assert fence(tmp_path, "b") == 2
        assert two.wait(10) == three.wait(10) == -signal.SIGKILL
        assert [entry.pid for entry in registered(tmp_path)] == [one.pid]
        assert fence(tmp_path, "b") == 0
        one.kill()


def test_a_process_that_has_got_the_number_of_a_proxy_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        entry = Registered("a", "job@1", 0, other.pid, start_time(other.pid) - 1)
        (tmp_path / f"proxy-{other.pid}.json").write_text(json.dumps(entry))
        (tmp_path / "proxy-1.json").write_text("{")
        assert fence(tmp_path, "a") == 0
        assert other.poll() is None
        other.kill()


def test_a_job_that_keeps_no_list(tmp_path: Path) -> None:
    register(tmp_path / "nowhere", "a", "job@1", 0)
    assert list(registered(tmp_path / "nowhere")) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_proxy_that_cannot_be_entered_says_so(tmp_path: Path) -> None:
    (tmp_path / f"proxy-{os.getpid()}.json.new").mkdir()  # nothing can be written there
    with pytest.raises(EngineError, match=f"is not started: {tmp_path}: Is a directory"):
        register(tmp_path, "a", "job@1", 0)
    assert list(registered(tmp_path)) == []


def test_proxies_are_waited_for(tmp_path: Path) -> None:
    assert wait_for_end(tmp_path, 10) == []
    with proxy(tmp_path, "a", 0) as process:
        (left,) = wait_for_end(tmp_path, 0.05)
        assert left.pid == process.pid
        threading.Timer(0.1, process.kill).start()
        assert wait_for_end(tmp_path, 10) == []


def test_proxies_that_heed_no_signal_are_killed(tmp_path: Path) -> None:
    with proxy(tmp_path, "a", 0) as process:
        end(tmp_path, signal.SIGCONT, 0.1)
        assert process.wait(10) == -signal.SIGKILL


def test_the_end_of_a_join_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        opened.append(path.name)
        return read_bytes(path)

    def write(pid: int, text: str, written_s: int) -> None:
        path = tmp_path / f"ended-{pid}.json"
        path.write_text(text)
        os.utime(path, (written_s, written_s))

    monkeypatch.setattr(Path, "read_bytes", counted)
    ends = Ends(tmp_path)
    write(1, '{"join": "a", "how": "it ended"}', 1)
    write(2, "[", 1)
    for _ in range(3):
        assert ends.look() == {"a": "it ended"}
    assert opened == ["ended-1.json", "ended-2.json"]
    write(1, '{"join": "b", "how": "it ended"}', 2)  # the number has come again
    for _ in range(3):
        assert ends.look() == {"a": "it ended", "b": "it ended"}
    assert opened[2:] == ["ended-1.json"]
