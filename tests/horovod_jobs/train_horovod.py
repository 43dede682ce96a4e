"""The training script of the fault tests with Horovod: ``train_horovod.py JOB.json``; logs what ``train.py`` logs.

With ``not_called`` in its options it enters the model by another way than a call, and says itself where a step ends.
"""

from __future__ import annotations

import time

import quick_start  # noqa: F401
import torch
from horovod_points import begin
from problem import build_model, build_optimizer, log_batch, log_done, make_loader, write_result
from torch import nn

import chaos_mpi.horovod


def main() -> None:
    """Train as the job file says."""
    job, folder, problem, faults = begin()
    session = chaos_mpi.horovod.init()
    faults.reach("opened")
    module = build_model()
    faults.attach(session, module)
    session.execute = faults._settle(session.execute)  # type: ignore[method-assign]
    plain, scheduler = build_optimizer(module, problem.optimizer)
    sampler, loader = make_loader(problem)
    is_called = not job["options"].pop("not_called", False)
    forward = module if is_called else module.forward
    callback = chaos_mpi.horovod.ChaosCallback(
        module, plain, scheduler=scheduler, sampler=sampler, epoch=0,
        ballast=torch.zeros(problem.ballast_bytes, dtype=torch.uint8),
        **job["options"],
    )  # fmt: skip
    optimizer, state = callback.optimizer, callback.state
    with open(folder / f"trace-{session.member}.jsonl", "a", buffering=1) as trace:
        for state.epoch in range(state.epoch, problem.epochs):
            sampler.set_epoch(state.epoch)
            for indices, inputs, targets in loader:
                faults.enter(session.step)
                log_batch(trace, session, state.epoch, indices, sampler)
                time.sleep(problem.pause_s)
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(forward(inputs), targets)
                loss.backward()
                if problem.clip is not None:
                    optimizer.synchronize()
                    nn.utils.clip_grad_norm_(module.parameters(), problem.clip)
                    with optimizer.skip_synchronize():
                        optimizer.step()
                else:
                    optimizer.step()
                scheduler.step()
                session.record(loss=loss.item())
                log_done(trace, session)
                faults.mark(f"done {session.step}")
                faults.reach("boundary")
                if not is_called:
                    callback.on_batch_end()
            if session.all_reduce(torch.tensor([float((folder / "stop").exists())])).item():
                break
    torch.save(module.state_dict(), folder / f"final-{session.member}.pt")
    faults.enter("close")
    faults.reach("close")
    result = callback.close()
    write_result(folder, session, result, scheduler)


if __name__ == "__main__":
    main()
