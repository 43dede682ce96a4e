"""The training script of the fault tests: ``train.py JOB.json``.

Before it trains on a batch it logs the batch's samples, after each step whose gradients the step contains; both flushed
at once, so that also a killed process leaves its log. At the end it saves the parameters it has. The end is after the
last epoch, or after the one in which the file ``stop`` appears in the job's folder. SIGUSR1 makes it print its stacks.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hostlike
import quick_start  # noqa: F401
import torch
from fault_points import FaultPoints
from problem import Problem, build_model, build_optimizer, log_batch, log_done, make_loader, write_result
from torch import nn

import chaos_mpi
import chaos_mpi.torch

EVALUATED = 50


def wrap(module: nn.Module, problem: Problem) -> nn.Module:
    """The module in our DistributedDataParallel, or in torch's with the communication hook."""
    if problem.wrapper == "chaos":
        devices = None if problem.device == "cpu" else [torch.device(problem.device, 0)]
        return chaos_mpi.DistributedDataParallel(module, bucket_cap_mb=0.001, device_ids=devices)
    torch.distributed.init_process_group("chaos")
    model = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=0.001)
    model.register_comm_hook(chaos_mpi.torch.ElasticState(model), chaos_mpi.torch.elastic_hook)
    return model


def main() -> None:
    """Train as the job file says."""
    faulthandler.register(signal.SIGUSR1)
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    folder, problem = Path(job["folder"]), Problem(**job["problem"])
    faults = FaultPoints(job["faults"], folder, may_be_armed=job["may_be_armed"])
    faults.reach("start")
    session = chaos_mpi.init()
    faults.reach("opened")
    if problem.device == hostlike.NAME:
        hostlike.register()
    module = build_model().to(problem.device)
    faults.attach(session, module)
    model = wrap(module, problem)
    optimizer, scheduler = build_optimizer(model, problem.optimizer)
    sampler, loader = make_loader(problem)
    state = chaos_mpi.TrainingState(
        model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, epoch=0,
        ballast=torch.zeros(problem.ballast_bytes, dtype=torch.uint8),
    )  # fmt: skip
    with open(folder / f"trace-{session.member}.jsonl", "a", buffering=1) as trace:
        for state.epoch in range(state.epoch, problem.epochs):
            sampler.set_epoch(state.epoch)
            for indices, inputs, targets in loader:
                faults.enter(session.step)
                log_batch(trace, session, state.epoch, indices, sampler)
                time.sleep(problem.pause_s)
                optimizer.zero_grad()
                loss = (model(inputs) - targets.to(problem.device)).square().mean()
                loss.backward()
                faults.reach("before optimizer")
                if problem.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), problem.clip)
                optimizer.step()
                scheduler.step()
                session.record(loss=loss.item())
                log_done(trace, session)
                faults.mark(f"done {session.step}")
                faults.reach("boundary")

            def count(part: range) -> torch.Tensor:
                faults.reach("evaluate")
                return torch.tensor([float(len(part)), float(sum(part)), float((folder / "stop").exists())])

            *total, stops = session.evaluate(EVALUATED, count).tolist()
            assert total == [EVALUATED, EVALUATED * (EVALUATED - 1) / 2], total
            if stops:
                break
    torch.save(
        {name: value.cpu() for name, value in module.state_dict().items()}, folder / f"final-{session.member}.pt"
    )
    faults.enter("close")
    faults.reach("close")
    result = chaos_mpi.finalize()
    write_result(folder, session, result, scheduler)


if __name__ == "__main__":
    main()
