"""What is said of a start that takes long."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.processes import start_time
from chaos_mpi.cli.starting import PATIENCE_S, StartProgress, names


def note_contact(directory: Path, host: str, rank: int, *, newcomer: bool = False) -> None:
    """As the proxy of a rank does it, which this process plays."""
    contact = Contact(
        f"{host or 'here'}:{rank + 1}", host, ("10.0.0.1",), 1000, "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
    )
    entry = {
        "contact": contact.to_json(), "job": "job", "rank": rank, "pid": os.getpid(),
        "started": start_time(os.getpid()), "first_size": None if newcomer else 3,
    }  # fmt: skip
    (directory / f"contact-{rank}.json").write_text(json.dumps(entry))


def test_the_hosts_that_are_waited_for_are_named_until_there_are_none(tmp_path: Path) -> None:
    said: list[str] = []
    progress = StartProgress(tmp_path, ["edge1", "edge1", "edge2", socket.gethostname()], 0.0, said.append)
    progress.look(PATIENCE_S - 0.1)
    assert said == [], "most jobs start faster"
    note_contact(tmp_path, "edge1", 0)
    note_contact(tmp_path, "localhost", 1)  # as the command line names it
    note_contact(tmp_path, "edge2", 2, newcomer=True)
    for now in (PATIENCE_S, PATIENCE_S + 0.1):
        progress.look(now)
    assert said == ["2 of 4 ranks have started; waiting for edge1, edge2"]
    note_contact(tmp_path, "edge1", 3)
    progress.look(2 * PATIENCE_S)
    assert said[1:] == ["3 of 4 ranks have started; waiting for edge2"]
    note_contact(tmp_path, "edge2", 4)
    for now in range(3, 10):
        progress.look(now * PATIENCE_S)
    assert said[2:] == []


def test_few_of_many_hosts_are_named() -> None:
    assert names(["a", "b"]) == "a, b"
    assert names([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
