"""A rank without MPI that does what its agent says, and writes down what that was.

``watched_program.py DIRECTORY``: one file of JSON lines for each rank. Asks what is in the file ``ask``, once for each
content. Goes on until there is a file ``stop``, or its agent tells it to stop (``stay`` in the file ``stubborn``: then,
too).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from chaos_mpi.agent.link import AgentLink

LIMIT_S = 30.0
directory = Path(sys.argv[1])
lock = threading.Lock()


def write(event: str, value: object) -> None:
    with lock, (directory / f"rank-{os.environ['PMIX_RANK']}.jsonl").open("a") as file:
        file.write(json.dumps({event: value}) + "\n")


def stop(reason: str) -> None:
    write("stopped", reason)
    if not (directory / "stubborn").exists():
        os._exit(3)


link = AgentLink.open(os.environ, lambda addresses: write("severed", list(addresses)), stop)
assert link is not None
write("ready", link.member if not (reason := link.may_go_on_without([], LIMIT_S)) else reason)
asked = ""
while not (directory / "stop").exists():
    question = (directory / "ask").read_text() if (directory / "ask").exists() else ""
    if question.endswith("\n") and question != asked:
        asked = question
        write("answer", link.may_go_on_without(question.split(), LIMIT_S))
    time.sleep(0.02)
