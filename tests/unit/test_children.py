"""Which processes end with the rank that has forked them."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

#: The child says that it is there, and answers once; its parent waits to be killed.
SCRIPT = """
import multiprocessing, os, signal, sys, threading
from chaos_mpi.elastic.children import end_workers_with_rank

how, asked, answers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def work():
    os.write(answers, b"1")
    os.read(asked, 1)
    os.write(answers, b"2")

def start(daemon):
    multiprocessing.get_context("fork").Process(target=work, daemon=daemon).start()

def fork(times):
    if os.fork() == 0:
        if times > 1:
            fork(times - 1)
        else:
            work()
        os._exit(0)

end_workers_with_rank()
end_workers_with_rank()
if how == "worker":
    start(True)
elif how == "worker of a thread":
    thread = threading.Thread(target=start, args=(True,))
    thread.start()
    thread.join()
elif how == "process":
    start(False)
elif how == "worker of a process":
    if os.fork() == 0:
        start(True)
        os._exit(0)
else:
    fork(len(how.split(", ")))
os.close(answers)
signal.pause()
"""


@pytest.mark.parametrize(
    "how", ["worker", "worker of a thread", "process", "worker of a process", "fork", "fork, fork"]
)
def test_only_workers_end_with_their_rank(how: str) -> None:
    asked, ask = os.pipe()
    answers, answer = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, how, str(asked), str(answer)], pass_fds=(asked, answer))
    os.close(answer)

    def read() -> bytes:
        assert select.select([answers], [], [], 60.0)[0], "no answer"
        return os.read(answers, 1)

    try:
        assert read() == b"1"
        parent.kill()
        parent.wait()  # what ends with it has got its signal by now
        os.write(ask, b"?")
        # At the end of all who hold it, the pipe ends.
        assert read() == (b"" if how == "worker" else b"2")
    finally:
        parent.kill()
        parent.wait()
        os.close(ask)  # whoever still reads comes to an end
        for descriptor in (asked, answers):
            os.close(descriptor)
