"""One rank of a job that ``events.py`` has ranks leave: it trains until it leaves or the driver hangs up.

``chaos`` is an ordinary elastic training script; what happens is read from its event log. ``floor`` is the least that
any program on ULFM must do for the same: once all know who goes, make a communicator without it, and agree that all
have it. There is no training, no sampler, and no care for what happens if a rank dies meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from jobs import Link, join_driver


def train_chaos(link: Link, model: str, device_s: float) -> None:
    """An elastic training loop."""
    import torch
    import torch.nn.functional as F
    from models import WORKLOADS

    import chaos_mpi

    torch.set_num_threads(1)
    workload = WORKLOADS[model]
    session = chaos_mpi.init(timeout_s=60)
    torch.manual_seed(0)
    net = workload.build()
    ddp = chaos_mpi.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(*workload.dataset())
    sampler = chaos_mpi.ElasticSampler(data, batch_size=workload.batch_size, seed=0)
    loader: Any = chaos_mpi.DataLoader(data, batch_sampler=sampler)
    state = chaos_mpi.TrainingState(model=ddp, optimizer=optimizer, sampler=sampler, epoch=0)
    _serve(link, {"rank": session.rank, "pid": os.getpid(), "member": session.member}, session.request_leave)
    for state.epoch in range(10**9):
        sampler.set_epoch(state.epoch)
        for x, y in loader:
            time.sleep(device_s)
            optimizer.zero_grad()
            loss = F.cross_entropy(ddp(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def run_floor(link: Link, device_s: float) -> None:
    """Bare MPI and ULFM; it tells the driver the times of each leave, in seconds of the monotonic clock."""
    import numpy as np
    from mpi4py import MPI

    MPI.Init_thread()  # chaos_mpi's launch settings, once imported, leave this to the program
    comm: Any = MPI.COMM_WORLD
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    me = comm.Get_rank()
    members = list(range(comm.Get_size()))  # by their ranks at the start
    wanted: list[int] = []
    _serve(link, {"rank": me, "pid": os.getpid(), "member": str(me)}, lambda member: wanted.append(int(member)))

    def complete(request: Any) -> None:
        while not request.Test():
            os.sched_yield()

    while True:
        time.sleep(device_s)
        word = np.array([wanted[0] + 1 if wanted else 0], dtype=np.int64)
        arrived = time.monotonic()
        complete(comm.Iallreduce(MPI.IN_PLACE, word, MPI.MAX))
        if not word[0]:
            continue
        known = time.monotonic()
        going = int(word[0]) - 1
        everyone = comm.Get_group()
        smaller = comm.Create(everyone.Excl([members.index(going)]))
        changed = time.monotonic()
        flag = np.array([1], dtype=np.intc)
        complete(comm.Iagree(flag))
        committed = time.monotonic()
        times = {"arrived": arrived, "known": known, "decided": known, "changed": changed, "committed": committed}
        link.send({"size": len(members), **times, "adopted": committed})
        if going == me:
            os._exit(0)
        members.remove(going)
        wanted.clear()
        comm = smaller
        comm.Set_errhandler(MPI.ERRORS_RETURN)


def _serve(link: Link, hello: dict[str, Any], leave: Callable[[str], object]) -> None:
    """Say hello, wait until all ranks are up, and take requests from then on, in a thread."""
    link.send(hello)
    link.receive()

    def listen() -> None:
        while True:
            try:
                request = link.receive()
            except (OSError, EOFError):
                os._exit(0)
            requested = time.monotonic()
            leave(request["leave"])
            link.send({"requested": requested})

    threading.Thread(target=listen, daemon=True).start()


def main() -> None:
    """Train as the driver says."""
    link, spec = join_driver()
    if spec["system"] == "chaos":
        train_chaos(link, spec["model"], spec["device_s"])
    else:
        run_floor(link, spec["device_s"])


if __name__ == "__main__":
    main()
