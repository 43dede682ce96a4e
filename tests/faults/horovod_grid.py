"""An elastic script with rows and columns of ranks, each a process set; one dies: ``horovod_grid.py JOB.json``."""

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

job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
folder = Path(job["folder"])
faults = FaultPoints(job["faults"], folder)
hvd.init()
session = current_session()
model = torch.nn.Linear(2, 1)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
results: dict[str, Any] = {"sizes": [], "ended": ""}
optimizers: list[Any] = []


def step(optimizer: Any) -> None:
    """One step on a sample of this rank's own."""
    optimizer.zero_grad()
    model(torch.full((1, 2), 1.0 + hvd.rank())).square().mean().backward()
    optimizer.step()


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    """Steps within the rows, whose replicas are made alike along the columns."""
    results["sizes"].append(hvd.size())
    if optimizers:  # of a set that has ended
        try:
            step(optimizers[-1])
        except ValueError as error:
            results["ended"] = str(error)
    whole = hvd.size() == 4
    rows = [hvd.add_process_set(ranks) for ranks in ([[0, 1], [2, 3]] if whole else [[0, 1]])]
    columns = [hvd.add_process_set(ranks) for ranks in ([[0, 2], [1, 3]] if whole else [])]
    row = next((one for one in rows if one.included()), rows[0])
    column = next((one for one in columns if one.included()), hvd.global_process_set)
    optimizers.append(hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), process_set=row))
    while state.step < 6:
        faults.enter(state.step)
        faults.reach("row")
        step(optimizers[-1])
        faults.reach("column")
        for param in model.parameters():
            hvd.allreduce_(param.data, process_set=column)
        state.step += 1
        state.commit()


if __name__ == "__main__":
    train(hvd.elastic.TorchState(model=model, step=0))
    results["parameters"] = [param.tolist() for param in model.parameters()]
    (folder / f"result-{session.member}.json").write_text(json.dumps({"steps": 0, **results}))
