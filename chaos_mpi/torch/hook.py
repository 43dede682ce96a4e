"""Elastic training with torch's own ``DistributedDataParallel``, by a communication hook.

Two lines after the model is wrapped::

    model = torch.nn.parallel.DistributedDataParallel(model)
    model.register_comm_hook(chaos_mpi.torch.ElasticState(model), chaos_mpi.torch.elastic_hook)

The buckets of one backward pass are one gradient step of the session: it is finished by all members or by none,
averaged over those that contributed, and done again from the kept local gradients when one dies.
"""

# Without the future import of annotations: torch compares those of the hook with its own types.
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from chaos_mpi.errors import ConfigError
from chaos_mpi.torch.buckets import GradientStep, make_buckets
from chaos_mpi.torch.carriers import SessionCarrier
from chaos_mpi.torch.modules import refuse_unfrozen
from chaos_mpi.torch.process_group import ChaosProcessGroup
from chaos_mpi.torch.reducer import Reducer

#: Of DDP, if it was not told.
_DEFAULT_CAP_BYTES = 25 << 20


class ElasticState:
    """What :func:`elastic_hook` needs of one model. Made by every rank, before the first forward pass.

    From then on members may die, leave and join between two steps: at the beginning of each forward pass. Module
    buffers (BatchNorm statistics, for one) are those of rank 0 after every step, and at the end, if DDP was to
    broadcast them.

    Args:
        model: wrapped by torch's DistributedDataParallel on the default group of the backend ``chaos``.

    Raises:
        ConfigError: it is on another group, or its parameters cannot be used; in backward: a parameter that was frozen
            at first has a gradient.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        group = getattr(model, "process_group", None)
        if not isinstance(group, ChaosProcessGroup) or not isinstance(group.carrier, SessionCarrier):
            raise ConfigError(
                "the model is not on the default group of the backend 'chaos': call init_process_group('chaos'), and "
                "wrap the model without process_group"
            )
        self._model, self._group, self._session = model, group, group.carrier.session
        ignored = set(getattr(model, "parameters_to_ignore", ()))
        named = [(name, p) for name, p in model.module.named_parameters() if name not in ignored]
        self._params = [p for _, p in named if p.requires_grad]
        self._frozen = [(name, p) for name, p in named if not p.requires_grad]
        if any(param.device.type != "cpu" for param in self._params):
            raise ConfigError("the backend 'chaos' takes CPU tensors; use chaos_mpi.DistributedDataParallel on a GPU")
        self._index = {id(param): index for index, param in enumerate(self._params)}
        self._buckets = make_buckets(self._params, int(getattr(model, "bucket_bytes_cap", _DEFAULT_CAP_BYTES)))
        self._bucket_of = {index: place for place, bucket in enumerate(self._buckets) for index in bucket.params}
        synced = model.module if model.broadcast_buffers else None
        model.broadcast_buffers = False  # they travel with the gradients
        self._reducer = Reducer(self._session, self._params, self._buckets, synced)
        self._step: GradientStep | None = None
        self._waiting: list[tuple[GradBucket, torch.futures.Future[torch.Tensor]]] = []
        self._in_backward = self._synchronised = False
        model.register_forward_pre_hook(self._before_forward)
        for param in self._params:
            param.register_post_accumulate_grad_hook(self._gradient_is_final)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise ConfigError("the model belongs to this process and its session: copy or save model.module")

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Begin to average a bucket; the last one of a backward pass ends the step."""
        if self._step is None:
            self._step = self._reducer.begin()
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._waiting.append((bucket, future))
        for param in bucket.parameters():
            self._step.ready(self._bucket_of[self._index[id(param)]])
        if bucket.is_last():
            # Nothing is left to overlap with: DDP would wait for the result right after this.
            self._settle()
        return future

    def _before_forward(self, _: torch.nn.Module, __: Any) -> None:
        if not isinstance(self._model.reducer, _UnsharedBuckets):
            self._model.reducer = _UnsharedBuckets(self._model.reducer, self._group)  # type: ignore[assignment]
        if torch.is_grad_enabled():
            if self._model._join_config.enable:
                raise ConfigError(
                    "model.join() is for ranks that run out of data at different times; ranks that are elastic get "
                    "equally many batches from chaos_mpi.ElasticSampler: leave join() out"
                )
            self._reducer.rounds.begin()

    def _gradient_is_final(self, _: torch.Tensor) -> None:
        if not self._in_backward:
            self._in_backward, self._synchronised = True, False
            Variable._execution_engine.queue_callback(self._backward_ends)

    def _settle(self) -> None:
        step, self._step = self._step, None
        waiting, self._waiting = self._waiting, []
        assert step is not None
        self._note_backward()
        self._reducer.settle(step)
        with torch.no_grad():
            for bucket, future in waiting:
                for param, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                    step.write_average(self._index[id(param)], gradient)
                future.set_result(bucket.buffer())
            step.deliver_buffers()
        self._reducer.delivered()

    def _note_backward(self) -> None:
        self._synchronised = True
        self._reducer.rounds.note_backward()

    def _backward_ends(self) -> None:
        self._in_backward = False
        if not self._synchronised:  # within no_sync
            self._note_backward()
        self._reducer.rounds.unmute()
        refuse_unfrozen(self._frozen)


def elastic_hook(state: ElasticState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook for ``DistributedDataParallel.register_comm_hook``. See :class:`ElasticState`.

    Raises:
        ConfigError: the state is none.
    """
    if not isinstance(state, ElasticState):
        raise ConfigError(
            "elastic_hook needs a state: model.register_comm_hook(chaos_mpi.torch.ElasticState(model), "
            "chaos_mpi.torch.elastic_hook)"
        )
    return state.reduce(bucket)


class _UnsharedBuckets:
    """DDP's reducer, which arranges its buckets anew after its first step, without asking rank 0 for theirs.

    What travels between members does not depend on them; and a newcomer's first step is not the others' first one.
    """

    def __init__(self, reducer: Any, group: ChaosProcessGroup) -> None:
        self._reducer, self._group = reducer, group

    def _rebuild_buckets(self) -> Any:
        with self._group.alone():
            return self._reducer._rebuild_buckets()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)
