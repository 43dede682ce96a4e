"""Initial values are given out by a rank that dies meanwhile: ``horovod_root.py JOB.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import quick_start  # noqa: F401
import torch
from fault_points import FaultPoints

import chaos_mpi.horovod.torch as hvd
from chaos_mpi import current_session
from chaos_mpi.horovod.torch import functions

job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
folder = Path(job["folder"])
faults = FaultPoints(job["faults"], folder)
hvd.init()
session = current_session()
broadcast_of = functions.broadcast_of
results: dict[str, Any] = {"errors": [], "sizes": []}


def at_second_tensor(tensor: torch.Tensor, member: str, name: str | None) -> int:
    """A point between two tensors: all have the first one."""
    if name == "optimizer_state.1":
        session._background.settle()
        faults.reach("between tensors")
    return broadcast_of(tensor, member, name)


functions.broadcast_of = at_second_tensor
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
if hvd.rank() == 0:  # it alone has a checkpoint
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def give_out() -> None:
    """As a script does that is not elastic."""
    try:
        hvd.broadcast_optimizer_state(optimizer, 0)
    except hvd.HorovodInternalError as error:
        results["errors"].append(str(error))
        results["state"] = len(optimizer.state)
        faults.reach("error")
        hvd.broadcast_optimizer_state(optimizer, 0)
    hvd.broadcast_parameters(model.state_dict(), 0)


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    """One step, from what all have."""
    results["sizes"].append(hvd.size())
    results["state"] = len(optimizer.state)
    distributed.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    distributed.step()


if job["elastic"]:
    distributed: Any = hvd.DistributedOptimizer(optimizer)
    train(hvd.elastic.TorchState(model=model, optimizer=distributed))
else:
    give_out()
results["sum"] = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
results["parameters"] = [param.tolist() for param in model.parameters()]
results["buffers"] = [entry["momentum_buffer"].tolist() for entry in optimizer.state.values()]
(folder / f"result-{session.member}.json").write_text(json.dumps({"steps": 0, **results}))
