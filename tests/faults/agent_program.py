"""A rank that adds up until it is told to stop: ``agent_program.py DIRECTORY``; mpi4py and numpy only.

Every rank appends JSON lines to ``DIRECTORY/<world rank>.jsonl`` (a spawned one to ``spawned.jsonl``). Files in the
directory are orders: ``stop`` ends all ranks, ``abort`` by an abort of rank 0; ``spawn`` holds a command that rank 0
spawns, and all take in; ``sever`` holds addresses of hosts that are dead.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import mpi4py
import numpy as np

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

from chaos_mpi.agent.launcher import is_lost  # noqa: E402
from chaos_mpi.mpi.sever import sever  # noqa: E402

PERIOD_S = 0.02
LIMIT_S = 60.0
STOP, SPAWN = 1, 2
ABORT_STATUS = 5


class Rank:
    """One rank and the communicator that it is in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        parent = MPI.Comm.Get_parent()
        name = "spawned" if parent != MPI.COMM_NULL else str(MPI.COMM_WORLD.rank)
        self.log = (directory / f"{name}.jsonl").open("a", buffering=1)
        self.sums = 0
        self.severed = False
        if parent != MPI.COMM_NULL:
            parent.Set_errhandler(MPI.ERRORS_RETURN)
            bridge = parent.Merge(True)
            self.comm = MPI.COMM_SELF.Create_intercomm(0, bridge, 0, 7).Merge(True)
        else:
            self.comm = MPI.COMM_WORLD
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)

    def say(self, event: str, **found: object) -> None:
        line = {
            "event": event,
            "t": time.time(),
            "size": self.comm.size,
            "sums": self.sums,
            "launcher_lost": is_lost(),
            **found,
        }
        self.log.write(json.dumps(line) + "\n")

    def add_up(self, values: np.ndarray) -> None:
        request = self.comm.Iallreduce(MPI.IN_PLACE, values, MPI.BOR)
        while not request.Test():
            time.sleep(0.0005)
            self.sever()
            if self.comm.rank == 0 and (self.directory / "abort").exists():
                self.comm.Abort(ABORT_STATUS)
            failed = self.comm.Get_failed()
            if failed.size:
                raise MPI.Exception(MPI.ERR_PROC_FAILED)
        self.sums += 1

    def sever(self) -> None:
        order = self.directory / "sever"
        if not self.severed and order.exists():
            self.severed = True
            self.say("severed", connections=sever(json.loads(order.read_text())))

    def step(self) -> bool:
        """One sum, and what was ordered; whether there is to be another one."""
        asked = 0
        if self.comm.rank == 0:
            asked = STOP * (self.directory / "stop").exists() | SPAWN * (self.directory / "spawn").exists()
        values = np.full(4, asked | (4 << self.comm.rank), dtype=np.int64)
        self.add_up(values)
        assert int(values[0]) >> 2 == (1 << self.comm.size) - 1
        if values[0] & SPAWN:
            self.grow()
        return not values[0] & STOP

    def grow(self) -> None:
        if self.comm.rank == 0:
            command = json.loads((self.directory / "spawn").read_text())
            start = time.monotonic()
            between = MPI.COMM_SELF.Spawn(command[0], command[1:], 1)
            self.say("spawned", seconds=time.monotonic() - start)
            between.Set_errhandler(MPI.ERRORS_RETURN)
            bridge = between.Merge(False)
            (self.directory / "spawn").unlink()
            inter = self.comm.Create_intercomm(0, bridge, 1, 7)
        else:
            inter = self.comm.Create_intercomm(0, MPI.Intracomm(MPI.COMM_NULL), 0, 7)
        self.comm = inter.Merge(False)
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.say("grown")

    def recover(self, error: MPI.Exception) -> None:
        self.say("failure", error=error.Get_error_class())
        self.comm.Revoke()
        self.comm = self.comm.Shrink()
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.say("shrunk")

    def run(self) -> None:
        names = ["PMIX_MCA_gds", "HOME", "SECRET", "CHAOS_TEST", "PMIX_SERVER_URI41", "OMPI_MCA_btl"]
        self.say("up", pid=os.getpid(), host=socket.gethostname(), env={n: os.environ.get(n) for n in names})
        print("rank is up", flush=True)
        deadline = time.monotonic() + LIMIT_S
        more = True
        while more and time.monotonic() < deadline:
            try:
                more = self.step()
            except MPI.Exception as error:
                self.recover(error)
            if self.sums % 10 == 0:
                self.say("sums")
                print(f"{self.sums} sums", flush=True)
            time.sleep(PERIOD_S)
        self.say("end")


if __name__ == "__main__":
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    Rank(Path(sys.argv[1])).run()
    # Not Finalize, which would wait for ranks that are dead.
    os._exit(0)
