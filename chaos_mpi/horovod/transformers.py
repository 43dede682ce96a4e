"""The Hugging Face Trainer on real Horovod, made elastic; see :class:`ChaosTrainerCallback`.

The Trainer keeps to one device and knows nothing of the other ranks. What it asks of its environment is changed in
three places: its training data comes from a loader without end, which goes from epoch to epoch by itself, so that all
ranks stop after the same step, ``max_steps``; after each of its training steps the gradients are reduced, before it
clips them; and at the end of each step all agree whether to go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic.sampler import ElasticSampler
from chaos_mpi.errors import ConfigError
from chaos_mpi.horovod.callback import ChaosCallback, init
from chaos_mpi.torch.loader import DataLoader

try:
    import accelerate  # noqa: F401
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ProgressCallback
except ImportError as error:
    raise ImportError(
        f"ChaosTrainerCallback needs transformers and accelerate ({error}): pip install 'chaos-mpi[transformers]'"
    ) from error

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import SessionResult

log = logging.getLogger("chaos_mpi.horovod")


class ChaosTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Makes a script with a Trainer for one device an elastic data parallel job on Horovod.

    ::

        trainer = Trainer(model=model, args=TrainingArguments(..., max_steps=1000), train_dataset=dataset)
        chaos_mpi.horovod.ChaosTrainerCallback(trainer)
        trainer.train()

    It adds itself to the trainer. ``train`` ends the session; it can be called once. ``per_device_train_batch_size``
    is the batch of one rank, with as many ranks as there are at the start. Every rank evaluates on all of the
    evaluation data. Checkpoints, logs and the progress bar are rank 0's. Training ends at all ranks when
    ``should_training_stop`` is set at any of them, in a step or by what follows it: logging, evaluation, saving.

    Args:
        trainer: made, and not used yet.
        options: as for :class:`ChaosCallback`: compression, op, groups, rng, broadcast_buffers and the like.

    Attributes:
        session: the session, for ``record``, ``all_reduce`` and the like.
        chaos: the :class:`ChaosCallback`, from ``on_train_begin`` on.
        result: how the session ended, after ``train``.

    Raises:
        ConfigError: Horovod cannot be used, or something that is not supported is asked for.
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        self.session = init()
        if problem := _unsupported(trainer):
            raise ConfigError(f"ChaosTrainerCallback does not support {problem}")
        self.chaos: ChaosCallback | None = None
        self.result: SessionResult | None = None
        self._trainer, self._options = trainer, options
        self._sampler: ElasticSampler | None = None
        self._nothing_is_left = False
        self._counters = _Counters(trainer)
        self._make_loader, self._train_step = trainer.get_train_dataloader, trainer.training_step
        self._end_step = trainer._maybe_log_save_evaluate
        trainer.get_train_dataloader = self._elastic_loader
        trainer.training_step = self._training_step
        trainer._maybe_log_save_evaluate = self._step_ends
        trainer.add_callback(self)
        self._tell_rank()

    # -- what the trainer calls in place of its own methods ----------------------------------------------

    def _elastic_loader(self) -> _Endless:
        if self._sampler is not None:
            raise ConfigError("train() can be called once in a process: the session ends with the first one")
        made, args = self._make_loader(), self._trainer.args
        if not isinstance(made.dataset, Sized):
            raise ConfigError("the dataset has no length, so its samples cannot be shared out (an IterableDataset?)")
        self._sampler = ElasticSampler(
            made.dataset,
            args.per_device_train_batch_size,
            shuffle=args.train_sampling_strategy == "random",
            seed=args.data_seed if args.data_seed is not None else args.seed,
            drop_last=args.dataloader_drop_last,
        )
        loader: DataLoader[Any] = DataLoader(
            made.dataset,
            batch_sampler=self._sampler,
            collate_fn=made.collate_fn,
            num_workers=made.num_workers,
            pin_memory=made.pin_memory,
            prefetch_factor=made.prefetch_factor,
            persistent_workers=made.persistent_workers,
            worker_init_fn=made.worker_init_fn,
            multiprocessing_context=made.multiprocessing_context,
        )
        return _Endless(loader, self._sampler, lambda: self._nothing_is_left)

    def _training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.chaos is not None
        self.chaos.before_forward()  # members come and go here
        self._tell_rank()
        loss: torch.Tensor = self._train_step(*args, **kwargs)
        self.chaos.reduce()
        self._tell_rank()  # rank 0 may have died in this step, or in what follows it, and the last step has no next one
        self.session.record(loss=loss.item())
        return loss

    def _step_ends(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save; then agree whether to stop, as the last thing before the trainer looks at that.

        Nothing else is late enough: any callback may have set it, here or in ``on_step_end``, and at one rank only,
        for a logged loss is the rank's own.
        """
        self._trainer.control.should_save &= self._trainer.args.process_index == 0
        self._end_step(*args, **kwargs)
        control = self._trainer.control
        wishes = torch.tensor([float(control.should_training_stop), float(control.should_epoch_stop)], device="cpu")
        stop, stop_epoch = self.session.all_reduce(wishes, "max").tolist()
        control.should_training_stop, control.should_epoch_stop = bool(stop), bool(stop_epoch)
        self._tell_rank()

    # -- what it tells ---------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **made: Any
    ) -> None:
        """Join the others: now model, optimizer, scheduler and sampler exist."""
        if state.global_step:
            raise ConfigError(
                "ChaosTrainerCallback does not support resume_from_checkpoint: go on by 'chaosrun --checkpoint-dir DIR "
                "--resume'"
            )
        scheduler, optimizer = made["lr_scheduler"], made["optimizer"]
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError(
                "ChaosTrainerCallback does not support ReduceLROnPlateau, which each rank would steer by its own "
                "measurements: use another scheduler"
            )
        self.chaos = ChaosCallback(
            made["model"],
            getattr(optimizer, "optimizer", optimizer),  # without accelerate's wrapper
            scheduler=scheduler,
            sampler=self._sampler,
            counters=self._counters,
            **self._options,
        )
        self._tell_rank()
        if 0 < state.max_steps <= state.global_step:  # what the script does after the training may be left to do
            log.warning("there is nothing left to train: step %d of %d is finished", state.global_step, state.max_steps)
            control.should_training_stop = self._nothing_is_left = True
        if self.session.is_newcomer:
            args.eval_on_start = False  # the others wait

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say which epoch it is."""
        assert self._sampler is not None
        state.epoch = float(self._sampler.epoch)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the session in good order."""
        assert self.chaos is not None
        self.result = self.chaos.close()
        self._tell_rank()  # who saves the model afterwards

    def _tell_rank(self) -> None:
        """Have the trainer know who writes checkpoints and logs; a newcomer on its way does not."""
        rank = self.session.rank if not self.session.awaits_entry else 1
        trainer = self._trainer
        places, state = trainer.args.distributed_state, trainer.state
        places.process_index = places.local_process_index = rank
        if state.is_world_process_zero != (rank == 0):
            state.is_world_process_zero = state.is_local_process_zero = rank == 0
            for callback in trainer.callback_handler.callbacks:
                if rank == 0 and isinstance(callback, ProgressCallback) and trainer.is_in_train:
                    callback.on_train_begin(trainer.args, state, trainer.control)  # it has no bar yet


class _Endless:
    """Batches of one epoch after the other. Without a length: how long an epoch is changes with the members.

    Args:
        loader, sampler: where they come from.
        is_over: whether there are to be none, at any rank.
    """

    def __init__(self, loader: DataLoader[Any], sampler: ElasticSampler, is_over: Callable[[], bool]) -> None:
        self._loader, self._sampler, self._is_over = loader, sampler, is_over
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator[Any]:
        if self._is_over():
            return
        # Of a job that is resumed, or joined, where an epoch ends, the first pass has nothing left.
        empty = 0
        while empty < 2:
            empty += 1
            for batch in self._loader:
                empty = 0
                yield batch
        raise ConfigError("there is not one batch in the training data")


class _Counters:
    """Where the trainer is, as a part of the training state."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, int]:
        return {"global_step": self._trainer.state.global_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        # What it prints at the end is then of the steps that this rank has made.
        trainer = self._trainer
        trainer.state.global_step = trainer._globalstep_last_logged = trainer._initial_global_step = state[
            "global_step"
        ]


def _unsupported(trainer: Trainer) -> str:
    """What the trainer is asked for and cannot do here, and what to do; empty if there is nothing."""
    args = trainer.args
    if args.world_size != 1:
        return (
            f"a Trainer that has connected {args.world_size} ranks by torch.distributed: leave use_cpu=True out of the "
            "TrainingArguments (and hide GPUs by CUDA_VISIBLE_DEVICES='')"
        )
    if args.device.type != "cpu":
        return f"training on {args.device}: hide it, by CUDA_VISIBLE_DEVICES='' for one"
    if args.max_steps <= 0:
        return (
            "num_train_epochs, because how many steps an epoch has changes with the number of ranks, and schedulers "
            "ask for it at the start: set max_steps"
        )
    left_out = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps != 1,
        "auto_find_batch_size": args.auto_find_batch_size,
        "load_best_model_at_end": args.load_best_model_at_end,
        "fp16": args.fp16,
        "torch_compile": args.torch_compile,
    }
    for name, asked in left_out.items():
        if asked:
            return f"TrainingArguments({name}={getattr(args, name)}): leave it out"
    if args.train_sampling_strategy not in ("random", "sequential"):
        return f"TrainingArguments(train_sampling_strategy='{args.train_sampling_strategy}'): use 'random'"
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        if str(getattr(getattr(args, name), "value", "")) in ("epoch", "best"):
            return f"TrainingArguments({name}='{getattr(args, name).value}'): use 'steps'"
    return ""
