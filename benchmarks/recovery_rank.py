"""One rank of a job that ``recovery.py`` kills ranks of: it trains until it is killed or the driver hangs up.

``chaos`` is an ordinary elastic training script. ``floor`` is the least that any program on ULFM must do
after a failure: revoke, shrink, and the allreduce again. It does not ask who finished what, so its replicas
may drift apart; it is there to be compared with only.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

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
    _ready(link, session.rank)
    for state.epoch in range(10**9):
        sampler.set_epoch(state.epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def train_floor(link: Link, workload: Workload) -> None:
    """The same model with bare MPI and ULFM; it tells the driver the times of each recovery."""
    from mpi4py import MPI

    MPI.Init_thread()  # chaos_mpi's launch settings, once imported, leave this to the program
    comm: Any = MPI.COMM_WORLD
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    torch.manual_seed(0)
    net = workload.build()
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=0.01)
    flat = torch.zeros(sum(p.numel() for p in params))
    message = [MPI.buffer.fromaddress(flat.data_ptr(), flat.nbytes), MPI.FLOAT]
    parts = torch.split(flat, [p.numel() for p in params])
    views = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
    inputs, targets = workload.dataset()
    order = torch.Generator().manual_seed(comm.Get_rank())
    rank = comm.Get_rank()

    def reduce() -> None:
        torch._foreach_copy_(views, gradients)
        request = comm.Iallreduce(MPI.IN_PLACE, message, MPI.SUM)
        while not request.Test():
            os.sched_yield()

    _ready(link, rank)
    while True:
        chosen = torch.randint(len(inputs), (workload.batch_size,), generator=order)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(inputs[chosen]), targets[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in params if p.grad is not None]
        times = {"entered": time.monotonic()}
        while True:
            try:
                reduce()
                break
            except MPI.Exception:
                times.setdefault("detected", time.monotonic())
                comm.Revoke()
                times["revoked"] = time.monotonic()
                comm = comm.Shrink()
                comm.Set_errhandler(MPI.ERRORS_RETURN)
                times["shrunk"] = time.monotonic()
        times["finished"] = time.monotonic()
        if "detected" in times:
            link.send({"size": comm.Get_size(), **times})
        flat.div_(comm.Get_size())
        for param, view in zip(params, views, strict=True):
            param.grad = view
        optimizer.step()


def _ready(link: Link, rank: int) -> None:
    link.send({"rank": rank, "pid": os.getpid()})
    link.receive()  # all ranks are up: go
    threading.Thread(target=_end_with_driver, args=(link,), daemon=True).start()


def _end_with_driver(link: Link) -> None:
    try:
        link.receive()
    except (OSError, EOFError):
        os._exit(0)


def main() -> None:
    """Train as the driver says."""
    link, spec = join_driver()
    torch.set_num_threads(1)
    {"chaos": train_chaos, "floor": train_floor}[spec["system"]](link, WORKLOADS[spec["model"]])


if __name__ == "__main__":
    main()
