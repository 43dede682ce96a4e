"""How a rank's process ends, and how one ends that it has forked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: What the guard does is written down, by whichever process does it; the last line is the child's status.
SCRIPT = """
import os, sys
from pathlib import Path
from chaos_mpi.elastic.lifecycle import ExitGuard

def note(*what):
    with open("seen", "a") as seen:
        print(*what, file=seen)

guard = ExitGuard(lambda: note("closed"), lambda text: note("crashed", text), lambda: False, Path.cwd())
if sys.argv[1] == "afterwards":
    guard.release_finished(lambda text: note("failed", text))
child = os.fork()
if child == 0:
    {deed}
note("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert guard.is_at_home
"""

DEEDS = {
    "sys.exit(0)": 0,
    "sys.exit(3)": 3,
    "raise ValueError('of the child')": 1,
    "raise __import__('chaos_mpi').MismatchError('of the child')": 1,
    "assert not guard.is_at_home; sys.exit()": 0,
}


@pytest.mark.parametrize("when", ["in training", "afterwards"])
@pytest.mark.parametrize("deed", DEEDS)
def test_a_forked_child_ends_as_it_likes(deed: str, when: str, tmp_path: Path) -> None:
    environment = {**os.environ, "CHAOS_RUN_DIR": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(deed=deed), when],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen == [f"status {DEEDS[deed]}", *(["closed"] if when == "in training" else [])], done.stderr
    assert done.returncode == 0
    assert ("of the child" in done.stderr) == ("raise" in deed)
    assert len(list(tmp_path.glob("leaving-*"))) == 1


def test_what_is_said_goes_out_in_one_piece() -> None:
    """With PYTHONUNBUFFERED, too: else what MPI says of the end comes between a line and the end of it."""
    reader, writer = os.pipe2(os.O_DIRECT)  # a read gets what one write wrote
    said = "from chaos_mpi.elastic.lifecycle import say_once; say_once(None, 'a member is stuck')"
    try:
        subprocess.run(
            [sys.executable, "-c", said], stderr=writer, env={**os.environ, "PYTHONUNBUFFERED": "1"}, timeout=60,
            check=True,
        )  # fmt: skip
        os.close(writer)
        assert os.read(reader, 4096) == b"chaos_mpi: a member is stuck\n"
        assert os.read(reader, 4096) == b""
    finally:
        os.close(reader)
