"""One rank of a job that ``events.py`` lets ranks leave: it trains until it leaves or the driver hangs up.

``chaos`` is an ordinary elastic training script. ``floor`` is the least that a leave takes in MPI: a flag that is
summed in each step says who goes, the communicator is split, and all agree that it is.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jobs import Link, join_driver
from models import WORKLOADS, Workload


def train_chaos(link: Link, workload: Workload) -> None:
    """An elastic training loop; what happens is read from its event log."""
    import chaos_mpi

    session = chaos_mpi.init(timeout_s=60)
    torch.manual_seed(0)
    net = workload.build()
    model = chaos_mpi.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    inputs, targets = workload.dataset()
    data = torch.utils.data.TensorDataset(inputs, targets)
    sampler = chaos_mpi.ElasticSampler(data, batch_size=workload.batch_size, seed=0)
    loader: Any = chaos_mpi.DataLoader(data, batch_sampler=sampler)
    state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, sampler=sampler, epoch=0)
    link.send({"rank": session.rank, "pid": os.getpid()})
    threading.Thread(target=_obey, args=(link, session.request_leave), daemon=True).start()
    for state.epoch in range(10**9):
        sampler.set_epoch(state.epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def train_floor(link: Link, workload: Workload) -> None:
    """A loop that computes as much, and parts with ranks as fast as MPI can; it tells the driver how long that took."""
    from mpi4py import MPI

    MPI.Init_thread()  # chaos_mpi's launch settings, once imported, leave this to the program
    comm: Any = MPI.COMM_WORLD
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    torch.manual_seed(0)
    net = workload.build()
    inputs, targets = workload.dataset()
    wants = threading.Event()
    link.send({"rank": comm.Get_rank(), "pid": os.getpid()})
    threading.Thread(target=_obey, args=(link, wants.set), daemon=True).start()
    while True:
        net.zero_grad()
        F.cross_entropy(net(inputs[: workload.batch_size]), targets[: workload.batch_size]).backward()  # type: ignore[no-untyped-call]
        leaving = np.zeros(comm.Get_size(), dtype=np.int8)
        leaving[comm.Get_rank()] = wants.is_set()
        _wait(comm.Iallreduce(MPI.IN_PLACE, leaving, MPI.SUM))
        if not leaving.any():
            continue
        known = time.monotonic()
        goes = bool(leaving[comm.Get_rank()])
        smaller = comm.Split(MPI.UNDEFINED if goes else 0, comm.Get_rank())
        flag = np.ones(1, dtype=np.intc)
        _wait(comm.Iagree(flag))
        link.send({"known": known, "committed": time.monotonic()})
        if goes:
            os._exit(0)
        comm = smaller
        comm.Set_errhandler(MPI.ERRORS_RETURN)


def _wait(request: Any) -> None:
    while not request.Test():
        os.sched_yield()


def _obey(link: Link, leave: Any) -> None:
    """Leave when the driver says so, and end when it is gone."""
    try:
        while link.receive()["do"] == "leave":
            leave()
    except (OSError, EOFError):
        os._exit(0)


def main() -> None:
    """Train as the driver says."""
    link, spec = join_driver()
    torch.set_num_threads(1)
    {"chaos": train_chaos, "floor": train_floor}[spec["system"]](link, WORKLOADS[spec["model"]])


if __name__ == "__main__":
    main()
