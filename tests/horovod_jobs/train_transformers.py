"""The training script of the fault tests with the Hugging Face Trainer: ``train_transformers.py JOB.json``.

Its rules and its logs are those of ``train_horovod.py``. With ``until_told`` in its options it ends after the epoch in
which the file ``stop`` appears, of which rank 0 alone knows; with ``rank_0_stops_in``, after the step in which rank 0
alone wants that: in this method of a callback, the last of all, when it is first called.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO, Any

import torch
from fault_points import FaultPoints
from horovod_points import begin
from problem import Problem, Samples, build_model, build_optimizer, log_batch, log_done, write_result
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import chaos_mpi.horovod


class Records(Dataset[dict[str, Any]]):
    """Samples as the Trainer wants them."""

    def __init__(self, length: int) -> None:
        self._samples = Samples(length)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, inputs, labels = self._samples[index]
        return {"number": number, "inputs": inputs, "labels": labels}


class Model(nn.Module):
    """The problem's model, which says what it trains on."""

    def __init__(self, problem: Problem, faults: FaultPoints, trace: IO[str]) -> None:
        super().__init__()
        self.net = build_model()
        self._problem, self._faults, self._trace = problem, faults, trace
        self.chaos: Any = None

    def forward(self, number: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            session, sampler = self.chaos.session, self.chaos._sampler
            self._faults.enter(session.step)
            log_batch(self._trace, session, sampler.epoch, number, sampler)
            time.sleep(self._problem.pause_s)
        outputs = self.net(inputs)
        return {"loss": nn.functional.mse_loss(outputs, labels), "logits": outputs}


class Log(TrainerCallback):
    """Notes finished steps, and ends the training with an epoch."""

    def __init__(self, problem: Problem, model: Model, folder: Path, until_told: bool) -> None:
        self._problem, self._model, self._folder, self._until_told = problem, model, folder, until_told
        self.evaluated = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model, chaos = self._model, self._model.chaos
        session, sampler = chaos.session, chaos._sampler
        assert state.global_step == session.step, "the Trainer counts other steps"
        log_done(model._trace, session)
        model._faults.mark(f"done {session.step}")
        model._faults.reach("boundary")
        if sampler.at_end:
            told = session.rank == 0 and (self._folder / "stop").exists()
            control.should_training_stop |= told if self._until_told else sampler.epoch == self._problem.epochs - 1

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._model._faults.enter("close")
        self._model._faults.reach("close")


def stops_in(name: str) -> TrainerCallback:
    """A callback that wants to stop in this method, at rank 0."""
    callback = TrainerCallback()

    def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= chaos_mpi.current_session().rank == 0

    setattr(callback, name, stop)
    return callback


def main() -> None:
    """Train as the job file says."""
    job, folder, problem, faults = begin()
    session = chaos_mpi.horovod.init()
    with open(folder / f"trace-{session.member}.jsonl", "a", buffering=1) as trace:
        model = Model(problem, faults, trace)
        faults.attach(session, model.net)
        session.execute = faults._settle(session.execute)  # type: ignore[method-assign]
        log = Log(problem, model, folder, job["options"].get("until_told", False))
        optimizer, scheduler = build_optimizer(model.net, problem.optimizer)
        arguments = TrainingArguments(
            output_dir=str(folder / "out"), max_steps=1_000_000, seed=5, report_to=[], disable_tqdm=False,
            per_device_train_batch_size=problem.batch_size, dataloader_num_workers=problem.workers,
            dataloader_pin_memory=False, max_grad_norm=problem.clip or 0.0, logging_steps=4,
            eval_strategy="steps", eval_steps=6, save_strategy="steps", save_steps=10, save_total_limit=1,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Records(problem.samples), eval_dataset=Records(8),
            optimizers=(optimizer, scheduler), callbacks=[log],
        )  # fmt: skip
        model.chaos = chaos = chaos_mpi.horovod.ChaosTrainerCallback(trainer)
        stops_late = job["options"].get("rank_0_stops_in")
        if stops_late:
            trainer.add_callback(stops_in(stops_late))
        trainer.train()
        if trainer.is_world_process_zero():
            trainer.save_model(str(folder / "saved"))
    assert stops_late or log.evaluated or session.is_newcomer, "it did not evaluate"
    torch.save(model.net.state_dict(), folder / f"final-{session.member}.pt")
    write_result(folder, session, chaos.result, scheduler)


if __name__ == "__main__":
    main()
