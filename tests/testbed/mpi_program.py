"""A rank of the test jobs: ``mpi_program.py SCENARIO [ARGUMENT ...]``; prints one JSON line per finding.

Scenarios: ``hello``; ``rate``: rank 0 sends ten megabytes to each other rank; ``kill``: the last rank kills itself;
``spawn COMMAND ...``: rank 0 spawns COMMAND while the others wait, all merge with it, and it kills itself.
"""

import json
import os
import signal
import socket
import sys
import time

import mpi4py
import numpy as np

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

MEGABYTES = 10
LIMIT_S = 20.0


def say(**found: object) -> None:
    """One JSON line in one write: lines of different ranks must not mix."""
    os.write(1, (json.dumps({"host": socket.gethostname(), **found}) + "\n").encode())


def total(comm: MPI.Intracomm) -> int:
    """Sum of rank + 1 over the communicator."""
    values = np.full(1000, comm.rank + 1.0)
    comm.Allreduce(MPI.IN_PLACE, values)
    return int(values[0])


def outlive(comm: MPI.Intracomm, victim: int) -> None:
    """The victim kills itself; the others wait until they see it, shrink, and add up once more."""
    if comm.rank == victim:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + LIMIT_S
    values = np.ones(1000)  # mpi4py's request does not keep it alive
    request = comm.Iallreduce(MPI.IN_PLACE, values)
    error = None
    while error is None:
        try:
            if request.Test() or time.monotonic() > deadline:
                say(event="not noticed")
                os._exit(5)
        except MPI.Exception as failure:
            error = failure.Get_error_class()
        time.sleep(0.001)
    comm.Revoke()
    survivors = comm.Shrink()
    survivors.Set_errhandler(MPI.ERRORS_RETURN)
    say(event="shrunk", error=error, size=survivors.size, total=total(survivors))
    # Not Finalize: that ends jobs well is tested elsewhere.
    survivors.Barrier()
    time.sleep(0.3)
    os._exit(0)


def rates(comm: MPI.Intracomm) -> None:
    """Rank 0 sends to each other rank in turn, Mbit/s from a barrier of the two to the answer."""
    data, answer = np.zeros(MEGABYTES * 1_000_000, dtype=np.uint8), np.zeros(1)
    for other in range(1, comm.size):
        if comm.rank == 0:
            comm.Send(answer, other)
            comm.Recv(answer, other)
            start = time.monotonic()
            comm.Send(data, other)
            comm.Recv(answer, other)
            say(event="rate", to=other, mbit=8 * MEGABYTES / (time.monotonic() - start))
        elif comm.rank == other:
            comm.Recv(answer, 0)
            comm.Send(answer, 0)
            comm.Recv(data, 0)
            comm.Send(answer, 0)
    comm.Barrier()


def grow(comm: MPI.Intracomm, command: list[str]) -> MPI.Intracomm:
    """Rank 0 spawns one process; the communicator of all and the newcomer."""
    if comm.rank == 0:
        start = time.monotonic()
        between = MPI.COMM_SELF.Spawn(command[0], command[1:], 1)
        say(event="spawned", seconds=time.monotonic() - start)
        between.Set_errhandler(MPI.ERRORS_RETURN)
        bridge = between.Merge(False)
        inter = comm.Create_intercomm(0, bridge, 1, 7)
    else:
        inter = comm.Create_intercomm(0, MPI.Intracomm(MPI.COMM_NULL), 0, 7)
    return inter.Merge(False)


def main() -> None:
    """Run the scenario."""
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    scenario, *arguments = sys.argv[1:]
    parent = MPI.Comm.Get_parent()
    if parent != MPI.COMM_NULL:
        parent.Set_errhandler(MPI.ERRORS_RETURN)
        bridge = parent.Merge(True)
        world = MPI.COMM_SELF.Create_intercomm(0, bridge, 0, 7).Merge(True)
    else:
        world = MPI.COMM_WORLD
        world.Set_errhandler(MPI.ERRORS_RETURN)
        if scenario == "spawn":
            world = grow(world, arguments)
    world.Set_errhandler(MPI.ERRORS_RETURN)
    say(event="sum", rank=world.rank, size=world.size, total=total(world))
    if scenario == "rate":
        rates(world)
    if scenario in {"kill", "spawn", "spawned"}:
        outlive(world, world.size - 1)
    MPI.Finalize()


if __name__ == "__main__":
    main()
