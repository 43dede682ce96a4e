"""The list of a job's proxies, and fencing: the proxies of one host are killed, and no other process."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from chaos_mpi.agent.processes import start_time
from chaos_mpi.agent.registry import Registered, fence, register, registered

ROOT = Path(__file__).parents[2]
PROXY = """
import sys, time
from pathlib import Path
from chaos_mpi.agent.registry import register
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
