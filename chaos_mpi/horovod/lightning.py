"""PyTorch Lightning on real Horovod, made elastic; see :class:`ChaosLightningCallback`.

Lightning keeps to one device and knows nothing of the other ranks. It owns the loop, though, so the callback takes care
of what has to be the same at all ranks: that they end each epoch, and the training, after the same step, although an
epoch gets longer or shorter when members change, and that a newcomer counts epochs and steps as the others do.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic.sampler import ElasticSampler
from chaos_mpi.errors import ConfigError
from chaos_mpi.horovod.callback import ChaosCallback, init
from chaos_mpi.torch.loader import DataLoader

try:
    from lightning.fabric.plugins.environments import MPIEnvironment
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        BatchSizeFinder,
        Checkpoint,
        EarlyStopping,
        GradientAccumulationScheduler,
        LearningRateFinder,
    )
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from chaos_mpi.horovod.lightning_loggers import Loggers
except ImportError as error:
    raise ImportError(
        f"ChaosLightningCallback needs PyTorch Lightning ({error}): pip install 'chaos-mpi[lightning]'"
    ) from error

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import SessionResult


class ChaosLightningCallback(Callback):  # type: ignore[misc]
    """Makes a Lightning script for one device an elastic data parallel job on Horovod.

    ::

        chaos = chaos_mpi.horovod.ChaosLightningCallback()
        loader = chaos.loader(dataset, batch_size=32)  # was: DataLoader(dataset, batch_size=32, shuffle=True)
        trainer = Trainer(accelerator="cpu", devices=1, callbacks=[chaos])
        trainer.fit(model, loader)

    To be the first of the callbacks, so that the others see reduced gradients, and to be made before model and trainer.
    ``fit`` ends the session; it can be called once. Every rank validates on all of the validation data. Checkpoints,
    loggers and progress bars are rank 0's. Training ends at all ranks when ``should_stop`` is set at any of them.

    Args:
        options: as for :class:`ChaosCallback`: compression, op, groups, rng, broadcast_buffers and the like.

    Attributes:
        session: the session, for ``record``, ``all_reduce`` and the like.
        chaos: the :class:`ChaosCallback`, from ``on_fit_start`` on.
        result: how the session ended, after ``fit``.

    Raises:
        ConfigError: Horovod cannot be used, or (by ``fit``) something that is not supported is asked for.
    """

    def __init__(self, **options: Any) -> None:
        self.session = init()
        self.chaos: ChaosCallback | None = None
        self.result: SessionResult | None = None
        self._options = options
        self._loader: _TrainLoader | None = None
        self._loggers: Loggers | None = None
        self._bar_is_hidden = False
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        # A Trainer asks MPI how many ranks there are; and one that is made when MPI has ended would end the process.
        MPIEnvironment.detect = staticmethod(lambda: False)
        rank_zero_only.rank = self._rank  # for what a Trainer says when it is made

    def loader(
        self,
        dataset: Any,
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        **kwargs: Any,
    ) -> DataLoader[Any]:
        """The loader of the training data, of which each rank trains on its share; to be made before ``fit``.

        Args:
            dataset: with a length.
            batch_size, shuffle, seed, drop_last: as for :class:`chaos_mpi.ElasticSampler`.
            kwargs: as for torch's ``DataLoader``: num_workers, collate_fn and the like.
        """
        if not isinstance(dataset, Sized):
            raise ConfigError("the dataset has no length, so its samples cannot be shared out (an IterableDataset?)")
        if self._loader is not None:
            raise ConfigError("there is a loader of the training data already, and only one is supported")
        sampler = ElasticSampler(dataset, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self._loader = _TrainLoader(dataset, batch_sampler=sampler, **kwargs)
        return self._loader

    # -- before training -------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported, before anything is done."""
        if stage != "fit":
            return
        if self.chaos is not None:
            raise ConfigError("fit() can be called once in a process: the session has ended with the first one")
        if problem := _unsupported(trainer, pl_module):
            raise ConfigError(f"ChaosLightningCallback does not support {problem}")
        if self._loader is None:
            raise ConfigError("make the loader of the training data with ChaosLightningCallback.loader(), before fit()")
        trainer.strategy.__class__ = _RankedStrategy
        self._loggers = Loggers(trainer, self.session)
        self._loggers.agree()
        self.tell_rank(trainer)
        self._bar_is_hidden = self._rank != 0  # as soon as it is set up, which comes next
        trainer.callbacks = [*trainer.callbacks, _StopTogether(self, trainer)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the others: now model, optimizer, schedulers and sampler exist."""
        if problem := _unsupported_optimizers(trainer):
            raise ConfigError(f"ChaosLightningCallback does not support {problem}")
        schedulers = {str(i): config.scheduler for i, config in enumerate(trainer.lr_scheduler_configs)}
        stoppers = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]
        assert self._loader is not None
        assert self._loggers is not None
        self.chaos = ChaosCallback(
            pl_module,
            trainer.optimizers[0],
            scheduler=schedulers or None,
            sampler=self._loader.sampler_of_rank,
            counters=_Counters(trainer, self._loggers),
            **{f"early_stopping_{i}": stopper for i, stopper in enumerate(stoppers)},
            **self._options,
        )
        # It calls Lightning's closure, which runs backward, before the plain one's step() and not within.
        trainer.strategy.optimizers = [self.chaos.optimizer]
        self.chaos.optimizer._should_synchronize = False  # because it is done after backward
        if self.session.is_newcomer:
            trainer.num_sanity_val_steps = 0  # the others wait
        self.tell_rank(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have Lightning take batches when it trains on them, and not before."""
        if trainer.train_dataloader is not self._loader:
            raise ConfigError("the training data has to come from the loader that ChaosLightningCallback.loader() made")
        assert self._loader is not None
        self._loader.opened = True
        fetcher = trainer.fit_loop._data_fetcher
        fetcher.prefetch_batches = 0
        iter(fetcher)
        # Lightning's own handler would end the training by an error, before this rank could leave.
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the sampler go to this epoch."""
        assert self._loader is not None
        self._loader.sampler_of_rank.set_epoch(trainer.current_epoch)

    # -- the step --------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Members come and go here."""
        if trainer.accumulate_grad_batches != 1:  # any callback may have set it when the epoch began
            raise ConfigError("ChaosLightningCallback does not support accumulate_grad_batches: leave it at 1")
        assert self.chaos is not None
        self.chaos.before_forward()
        self.tell_rank(trainer)
        if self._bar_is_hidden and self._rank == 0:
            self._bar_is_hidden = False
            if (bar := trainer.progress_bar_callback) is not None:
                bar.enable()
                bar.on_train_start(trainer, pl_module)
                bar.on_train_epoch_start(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Notice when backward ends."""
        assert self.chaos is not None
        self.chaos.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reduce the gradients, before anybody looks at them or clips them."""
        self._reduce(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take part also if ``training_step`` returned None, so that nothing was done backward."""
        assert self.chaos is not None
        if not self.chaos.optimizer._synchronized:
            self._reduce(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the loss into the event log."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self.session.record(loss=loss.item())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the session in good order."""
        assert self.chaos is not None
        self.result = self.chaos.close()
        self.tell_rank(trainer)  # who saves the model afterwards
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, _StopTogether)]

    def _reduce(self, trainer: Trainer) -> None:
        assert self.chaos is not None
        assert self._loader is not None
        self.chaos.optimizer.synchronize()
        self.tell_rank(trainer)  # rank 0 may have died in this step, and the last one of an epoch is followed by much
        # All members are after the same step, and whoever says that the epoch is over says so to the sampler: so
        # the samples of one that dies from here on are not added to an epoch that another has left.
        sampler = self._loader.sampler_of_rank
        is_last = sampler.at_end
        if is_last:
            sampler.finish()
        trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = is_last

    @property
    def _rank(self) -> int:
        # A newcomer on its way, which is alone and the first there, is not the one to write anything.
        return self.session.rank if not self.session.awaits_entry else 1

    def tell_rank(self, trainer: Trainer) -> None:
        """Have Lightning know who writes checkpoints and logs."""
        trainer.strategy.global_rank = rank_zero_only.rank = self._rank
        if self._rank == 0 and self._loggers is not None:
            self._loggers.take_over()


class _TrainLoader(DataLoader[Any]):
    """A loader that tells no length, because it changes with the members; empty until training starts.

    Without a length, Lightning asks for a batch as soon as it has the loader, which would count as trained on.
    """

    def __init__(self, dataset: Any, *, batch_sampler: ElasticSampler, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        self.sampler_of_rank = batch_sampler
        self.opened = False

    def __len__(self) -> int:
        raise TypeError("the number of batches changes with the members")

    def __iter__(self) -> Any:
        return super().__iter__() if self.opened else iter(())


class _RankedStrategy(SingleDeviceStrategy):  # type: ignore[misc]
    """One device, and no talk with others by Lightning itself; but only rank 0 writes."""

    @property
    def is_global_zero(self) -> bool:
        return bool(self.global_rank == 0)


class _Counters:
    """Where Lightning's loops are, and what is logged to, as a part of the training state."""

    def __init__(self, trainer: Trainer, loggers: Loggers) -> None:
        self._loop, self._loggers = trainer.fit_loop, loggers

    def state_dict(self) -> dict[str, Any]:
        epochs, inner = self._loop.epoch_progress, self._loop.epoch_loop
        steps = inner.automatic_optimization.optim_progress.optimizer.step
        return {
            "epoch": epochs.current.processed,
            "global_step": steps.total.completed,
            "logged": inner._batches_that_stepped,
            "versions": self._loggers.versions,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epochs, inner = self._loop.epoch_progress, self._loop.epoch_loop
        for progress in (epochs.current, epochs.total):
            progress.ready = progress.started = progress.processed = progress.completed = state["epoch"]
        steps = inner.automatic_optimization.optim_progress.optimizer.step
        steps.total.ready = steps.total.completed = state["global_step"]
        inner._batches_that_stepped = state["logged"]
        self._loggers.load(state.get("versions", []))  # not in a checkpoint of an earlier version


class _StopTogether(Checkpoint):  # type: ignore[misc]
    """Has all ranks stop when any of them wants to, by agreeing just before Lightning looks at that.

    After a step this is no hook: the module's own ``on_train_batch_end`` comes after those of all callbacks. After an
    epoch it is the last hook, because callbacks of this kind are called last, and after the module's.
    """

    def __init__(self, chaos: ChaosLightningCallback, trainer: Trainer) -> None:
        self._chaos, self._trainer = chaos, trainer
        loop = trainer.fit_loop.epoch_loop
        self._end_step = loop.on_advance_end
        loop.on_advance_end = self._step_ends

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._agree()

    def _step_ends(self, *args: Any) -> None:
        self._agree()
        self._end_step(*args)

    def _agree(self) -> None:
        wish = torch.tensor([float(self._trainer.should_stop)], device="cpu")
        self._trainer.should_stop = bool(self._chaos.session.all_reduce(wish, "max").item())
        self._chaos.tell_rank(self._trainer)


def _unsupported(trainer: Trainer, module: LightningModule) -> str:
    """What the trainer is asked for and cannot do here, and what to do; empty if there is nothing."""
    strategy = trainer.strategy
    if type(strategy) not in (SingleDeviceStrategy, _RankedStrategy) or strategy.root_device.type != "cpu":
        name = type(strategy).__name__
        return f"{name} on {strategy.root_device}: use Trainer(accelerator='cpu', devices=1, strategy='auto')"
    if not module.automatic_optimization:
        return "manual optimization: use chaos_mpi.horovod.ChaosCallback in a loop of your own"
    if trainer.ckpt_path is not None:
        return "fit(ckpt_path=...): go on by 'chaosrun --checkpoint-dir DIR --resume'"
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):
        return "GradientAccumulationScheduler: leave it out"
    for callback in trainer.callbacks:  # lightning.pytorch.tuner.Tuner adds them
        if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):
            return f"{type(callback).__name__}, which trains by itself: run it on one machine, without this callback"
    whole = {
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        "limit_train_batches": (trainer.limit_train_batches, 1.0),
        "overfit_batches": (trainer.overfit_batches, 0),
        "reload_dataloaders_every_n_epochs": (trainer.reload_dataloaders_every_n_epochs, 0),
        "val_check_interval": (trainer.val_check_interval, 1.0),
    }
    for name, (value, supported) in whole.items():
        if value != supported or (isinstance(supported, float) and isinstance(value, int)):
            return f"Trainer({name}={value}): leave it out"
    if trainer.check_val_every_n_epoch is None:
        return "Trainer(check_val_every_n_epoch=None): say a number of epochs"
    return ""


def _unsupported_optimizers(trainer: Trainer) -> str:
    """The same for what ``configure_optimizers`` returned."""
    if len(trainer.optimizers) != 1:
        return f"{len(trainer.optimizers)} optimizers: configure_optimizers() has to return one"
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            return "ReduceLROnPlateau, which each rank would steer by its own measurements: use another scheduler"
        if config.interval == "step" and config.frequency != 1:
            return "a scheduler with 'interval': 'step' and a frequency: a newcomer counts the batches it has seen"
    return ""
