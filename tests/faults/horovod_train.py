"""A script as there are many for Horovod, not elastic, with faults: ``horovod_train.py JOB.json``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import quick_start  # noqa: F401
import torch
from fault_points import FaultPoints
from horovod_problem import BATCH_SIZE, CLIP, SAMPLES, build_model, write
from problem import Samples, build_optimizer
from torch import nn

import chaos_mpi
import chaos_mpi.horovod.torch as hvd


def main() -> None:
    """Train as the job file says."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    faults = FaultPoints(job["faults"], folder)
    hvd.init()
    session = chaos_mpi.current_session()
    model = build_model()
    faults.attach(session, model)
    optimizer, scheduler = build_optimizer(model, "sgd")
    passes = job.get("passes", 1)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        backward_passes_per_step=passes,
        op=getattr(hvd, job.get("op", "Average")),
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    if job.get("state"):
        chaos_mpi.TrainingState(model=model, optimizer=optimizer, scheduler=scheduler)
    data = Samples(SAMPLES)
    trace = folder / f"trace-{session.member}.jsonl"
    rates: list[float] = []
    steps = job["steps"] if hvd.rank() else job.get("steps_of_rank_0", job["steps"])
    for step in range(session.step, steps):
        faults.enter(session.step)
        first = (step * hvd.size() + hvd.rank()) * BATCH_SIZE
        indices = [(first + i) % SAMPLES for i in range(BATCH_SIZE)]
        write(trace, {"step": session.step, "epoch": 0, "indices": indices, "ghost": False})
        if job.get("by_size"):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * hvd.size()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        for part in torch.tensor(indices).chunk(passes):
            loss = nn.functional.mse_loss(model(data.inputs[part]), data.targets[part]) / passes
            loss.backward()
        if step % 3 == 1:
            hvd.allreduce(loss.detach(), name="loss")
        time.sleep(job.get("pause_s", 0.0))
        faults.reach("before optimizer")
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with optimizer.skip_synchronize():
            optimizer.step()
        if not job.get("by_size"):
            scheduler.step()
        write(trace, {"done": session.step, "contributors": list(session.last_contributors)})
        if step % 3 == 2:
            hvd.allreduce_async(loss.detach(), name="loss")
        faults.reach("boundary")
    torch.save(model.state_dict(), folder / f"final-{session.member}.pt")
    faults.enter("close")
    faults.reach("close")
    result = {"steps": session.step, "size": hvd.size(), "rates": rates}
    (folder / f"result-{session.member}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
