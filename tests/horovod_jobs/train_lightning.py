"""The training script of the fault tests with PyTorch Lightning: ``train_lightning.py JOB.json``.

Its rules and its logs are those of ``train_horovod.py``. With ``until_told`` in its options it ends after the epoch in
which the file ``stop`` appears, of which rank 0 alone knows; with ``rank_0_stops_in``, after the step in which rank 0
alone wants that: in this method of the module, when it is first called. So many of the first ranks as
``csv`` says have a logger that writes a file. With ``bar`` there is a progress bar.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO, Any

import quick_start  # noqa: F401
import torch
from fault_points import FaultPoints
from horovod_points import begin
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from problem import Problem, Samples, build_model, build_optimizer, log_batch, log_done, write_result
from torch import nn

import chaos_mpi.horovod


class Module(LightningModule):
    """The problem's model, which says what it trains on."""

    def __init__(self, problem: Problem, chaos: Any, sampler: Any, faults: FaultPoints, trace: IO[str]) -> None:
        super().__init__()
        self.net = build_model()
        self.problem, self.chaos, self.batches, self.faults, self.trace = problem, chaos, sampler, faults, trace
        self.validated = 0

    def stops_in(self, name: str) -> None:
        """Want to stop in this method, at rank 0."""

        def stop(*_: Any) -> None:
            self.trainer.should_stop |= self.chaos.session.rank == 0

        setattr(self, name, stop)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        indices, inputs, targets = batch
        session = self.chaos.session
        self.faults.enter(session.step)
        assert self.trainer.global_step == session.step, "Lightning counts other steps"
        log_batch(self.trace, session, self.current_epoch, indices, self.batches)
        time.sleep(self.problem.pause_s)
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> Any:
        optimizer, self.scheduler = build_optimizer(self.net, self.problem.optimizer)
        return [optimizer], [{"scheduler": self.scheduler, "interval": "step"}]


class Log(Callback):
    """Notes finished steps, and ends the training with an epoch."""

    def __init__(self, folder: Path, until_told: bool) -> None:
        self._folder, self._until_told = folder, until_told

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, *_: Any) -> None:
        log_done(pl_module.trace, pl_module.chaos.session)
        pl_module.faults.mark(f"done {pl_module.chaos.session.step}")
        pl_module.faults.reach("boundary")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._until_told and pl_module.chaos.session.rank == 0 and (self._folder / "stop").exists():
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        pl_module.faults.enter("close")
        pl_module.faults.reach("close")


def main() -> None:
    """Train as the job file says."""
    job, folder, problem, faults = begin()
    chaos = chaos_mpi.horovod.ChaosLightningCallback()
    session = chaos.session
    loader = chaos.loader(Samples(problem.samples), batch_size=problem.batch_size, seed=5, num_workers=problem.workers)
    with open(folder / f"trace-{session.member}.jsonl", "a", buffering=1) as trace:
        model = Module(problem, chaos, loader.sampler_of_rank, faults, trace)
        faults.attach(session, model.net)
        session.execute = faults._settle(session.execute)  # type: ignore[method-assign]
        options = job["options"]
        if "rank_0_stops_in" in options:
            model.stops_in(options["rank_0_stops_in"])
        logger = CSVLogger(folder, flush_logs_every_n_steps=1) if session.rank < options.get("csv", 0) else False
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=problem.epochs, gradient_clip_val=problem.clip,
            callbacks=[chaos, Log(folder, options.get("until_told", False))], log_every_n_steps=1,
            default_root_dir=folder, logger=logger, enable_progress_bar=options.get("bar", False),
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader, torch.utils.data.DataLoader(Samples(8), batch_size=4))
    trainer.save_checkpoint(folder / "saved.ckpt")
    assert model.validated, "it did not validate at the end of an epoch"
    torch.save(model.net.state_dict(), folder / f"final-{session.member}.pt")
    write_result(folder, session, chaos.result, model.scheduler)


if __name__ == "__main__":
    main()
