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

import quick_start  # noqa: F401
import torch
from fault_points import FaultPoints
from problem import Problem, Samples, build_model, build_optimizer
from torch import nn

import chaos_mpi

EVALUATED = 50


def main() -> None:
    """Train as the job file says."""
    faulthandler.register(signal.SIGUSR1)
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    folder, problem = Path(job["folder"]), Problem(**job["problem"])
    faults = FaultPoints(job["faults"], folder, may_be_armed=job["may_be_armed"])
    faults.reach("start")
    session = chaos_mpi.init()
    faults.reach("opened")
    module = build_model()
    faults.attach(session, module)
    model = chaos_mpi.DistributedDataParallel(module, bucket_cap_mb=0.001)
    optimizer, scheduler = build_optimizer(model, problem.optimizer)
    data = Samples(problem.samples)
    sampler = chaos_mpi.ElasticSampler(data, batch_size=problem.batch_size, seed=5)
    loader = chaos_mpi.DataLoader(data, batch_sampler=sampler, num_workers=problem.workers)
    state = chaos_mpi.TrainingState(
        model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, epoch=0,
        ballast=torch.zeros(problem.ballast_bytes, dtype=torch.uint8),
    )  # fmt: skip
    with open(folder / f"trace-{session.member}.jsonl", "a", buffering=1) as trace:
        for state.epoch in range(state.epoch, problem.epochs):
            sampler.set_epoch(state.epoch)
            for indices, inputs, targets in loader:
                faults.enter(session.step)
                batch = {
                    "step": session.step, "epoch": state.epoch, "indices": indices.tolist(),
                    "ghost": sampler.ghost_round(),
                }  # fmt: skip
                trace.write(json.dumps(batch) + "\n")
                time.sleep(problem.pause_s)
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(inputs), targets)
                loss.backward()
                faults.reach("before optimizer")
                if problem.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), problem.clip)
                optimizer.step()
                scheduler.step()
                session.record(loss=loss.item())
                done = {"done": session.step, "contributors": list(session.last_contributors)}
                trace.write(json.dumps(done) + "\n")
                faults.mark(f"done {session.step}")
                faults.reach("boundary")

            def count(part: range) -> torch.Tensor:
                faults.reach("evaluate")
                return torch.tensor([float(len(part)), float(sum(part)), float((folder / "stop").exists())])

            *total, stops = session.evaluate(EVALUATED, count).tolist()
            assert total == [EVALUATED, EVALUATED * (EVALUATED - 1) / 2], total
            if stops:
                break
    torch.save(module.state_dict(), folder / f"final-{session.member}.pt")
    faults.enter("close")
    faults.reach("close")
    result = chaos_mpi.finalize()
    summary = {
        "digest": result.params_digest, "identical": result.replicas_identical, "steps": result.steps,
        "size": result.size, "scheduler": scheduler.last_epoch,
    }  # fmt: skip
    (folder / f"result-{session.member}.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
