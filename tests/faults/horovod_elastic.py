"""A script as there are many for Elastic Horovod, with faults: ``horovod_elastic.py JOB.json``."""

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

import chaos_mpi.horovod.torch as hvd
from chaos_mpi import current_session

job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
folder = Path(job["folder"])
faults = FaultPoints(job["faults"], folder)
hvd.init()
session = current_session()
model = build_model()
faults.attach(session, model)
plain, scheduler = build_optimizer(model, "sgd")
optimizer: Any = plain
if not job.get("makes_optimizer"):
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
data = Samples(SAMPLES)
sampler = hvd.elastic.ElasticSampler(data, seed=5)
loader = torch.utils.data.DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler)
trace = folder / f"trace-{session.member}.jsonl"
entries: list[dict[str, Any]] = []


def train_epoch(state: hvd.elastic.TorchState, pair: hvd.ProcessSet | None) -> None:
    """What is left of one epoch."""
    for batch, (indices, inputs, targets) in enumerate(loader):
        faults.enter(session.step)
        write(trace, {"step": session.step, "epoch": state.epoch, "indices": indices.tolist(), "ghost": False})
        time.sleep(job.get("pause_s", 0.0))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        if batch % 2 == 0:
            hvd.allreduce(loss.detach())  # without a name: calls are counted, and newcomers have made none
        if pair is not None and pair.included():
            assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=pair).item() == 2
        loss.backward()
        faults.reach("before optimizer")
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with optimizer.skip_synchronize():
            optimizer.step()
        scheduler.load_state_dict(state.scheduler)
        scheduler.step()
        state.scheduler = scheduler.state_dict()
        sampler.record_batch(batch, BATCH_SIZE)
        write(trace, {"done": session.step, "contributors": list(session.last_contributors)})
        faults.reach("boundary")
        if batch % job.get("check_every", 1) == 0:
            state.commit()


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    """All epochs."""
    wanted = job.get("process_set") and hvd.size() > 2  # two of two would be all
    pair = hvd.add_process_set([0, 1]) if wanted else None  # anew at each entry
    if job.get("makes_optimizer"):  # anew at each entry, too: newcomers have made no other
        global optimizer
        optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    entries.append({"epoch": state.epoch, "step": session.step, "size": hvd.size(), "seen": state.seen})
    while state.epoch < job["epochs"]:
        train_epoch(state, pair)
        state.epoch += 1
        sampler.set_epoch(state.epoch)
        state.commit()


if __name__ == "__main__":
    state = hvd.elastic.TorchState(
        model=model, optimizer=optimizer, sampler=sampler, epoch=0, scheduler=scheduler.state_dict(), seen={hvd.rank()}
    )
    before_entry: object = None
    if job.get("asks_before_entry"):
        try:
            before_entry = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
        except hvd.HorovodInternalError as error:
            before_entry = str(error)
    resets: list[int] = []
    state.register_reset_callbacks([lambda: resets.append(hvd.size()), lambda: faults.reach("reset")])
    faults.reach("entry")
    train(state)
    torch.save(model.state_dict(), folder / f"final-{session.member}.pt")
    faults.enter("close")
    faults.reach("close")
    result = {"steps": session.step, "size": hvd.size(), "entries": entries, "resets": resets, "epoch": state.epoch}
    result["entries"] = [{**entry, "seen": sorted(entry["seen"])} for entry in entries]
    result["before_entry"] = before_entry
    result["lr"], result["scheduler"] = optimizer.param_groups[0]["lr"], scheduler.last_epoch
    (folder / f"result-{session.member}.json").write_text(json.dumps(result))
