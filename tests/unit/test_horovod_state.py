"""The elastic state of Horovod's interface, and names that scripts for Horovod use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import chaos_mpi.horovod.torch as hvd
from chaos_mpi.errors import CheckpointError, ConfigError
from chaos_mpi.horovod import callback
from chaos_mpi.horovod.common.exceptions import HorovodVersionMismatchError
from chaos_mpi.horovod.torch import mpi_ops
from chaos_mpi.horovod.torch.elastic import membership
from chaos_mpi.horovod.torch.elastic import state as module


@pytest.mark.parametrize("kind", [hvd.elastic.TorchState, hvd.elastic.ObjectState])
def test_an_attribute_is_the_object_that_was_given(kind: Any) -> None:
    history: list[int] = [1]
    state = kind(history=history)
    assert state.history is history
    history.append(2)
    state.save()
    history.append(3)
    state.restore()
    assert state.history == [1, 2]
    state.history.append(4)
    state.restore()
    assert state.history == [1, 2], "what was saved has changed"


def test_rank_0_keeps_its_objects_when_they_are_handed_out() -> None:
    history = [1]
    state = hvd.elastic.ObjectState(bcast_object=lambda given: given, history=history)
    state.sync()
    assert state.history is history
    history.append(2)
    state.restore()
    assert state.history == [1]


def test_others_get_those_of_rank_0() -> None:
    state = hvd.elastic.ObjectState(bcast_object=lambda _: {"history": [7]}, history=[1])
    state.sync()
    state.history.append(8)
    state.restore()
    assert state.history == [7]


def test_a_newcomer_takes_attributes_over() -> None:
    state = hvd.elastic.ObjectState(history=[1], epoch=0)
    state.take_attributes({"history": [2, 3], "unknown": 1})
    assert (state.history, state.epoch) == ([2, 3], 0)
    state.epoch = 5
    state.restore()
    assert (state.history, state.epoch) == ([2, 3], 0)


def test_a_class_that_sets_attributes_first() -> None:
    class Own(hvd.elastic.TorchState):
        def __init__(self, model: torch.nn.Module) -> None:
            self.best = 0.5
            self.model = model
            super().__init__(model=model, epoch=3)

    model = torch.nn.Linear(1, 1)
    state = Own(model)
    assert (state.best, state.epoch) == (0.5, 3)
    assert state.model is model
    assert set(state.parts()[0]) == {"model"}


def test_a_scheduler_is_kept_and_given_to_newcomers() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    state = hvd.elastic.TorchState(optimizer=optimizer, scheduler=scheduler)
    assert state.scheduler is scheduler
    optimizer.step()
    scheduler.step()
    given = membership._Attributes(state).state_dict()
    state.restore()
    assert scheduler.last_epoch == 0
    membership._Attributes(state).load_state_dict(given)
    assert scheduler.last_epoch == 1


def test_an_attribute_that_cannot_be_given_to_newcomers_is_named() -> None:
    state = hvd.elastic.TorchState(lock=None, epoch=0)
    state.lock = threading.Lock()
    with pytest.raises(CheckpointError, match="an attribute 'lock' that a rank which joins could not be given"):
        membership._Attributes(state).state_dict()


class Counter:
    """Of a kind that has no handler."""

    def __init__(self) -> None:
        self.count = 0


class CounterHandler(module.StateHandler):
    """As a script may have it for Horovod."""

    saved = 0

    def save(self) -> None:
        self.saved = self.value.count

    def restore(self) -> None:
        self.value.count = self.saved

    def sync(self) -> None:
        self.value.count += 100


@pytest.fixture
def registry() -> Iterator[None]:
    """With a handler for counters."""
    before = module.get_handler_registry()
    module.set_handler_registry([*before, (Counter, CounterHandler)])
    yield
    module.set_handler_registry(before)


def test_a_handler_of_the_script(registry: None) -> None:
    counter = Counter()
    state: Any = hvd.elastic.TorchState(counter=counter, epoch=0)
    counter.count = 4
    state.restore()
    assert counter.count == 0
    state.counter = other = Counter()
    other.count = 2
    state.save()
    other.count = 3
    state.restore()
    assert (other.count, counter.count) == (2, 0)


def test_names_of_horovod() -> None:
    assert mpi_ops.handle_average_backwards_compatibility(None, None) == hvd.Average
    assert mpi_ops.handle_average_backwards_compatibility(None, False) == hvd.Sum
    error = HorovodVersionMismatchError("torch", "2", "1")
    assert isinstance(error, ImportError)
    assert (error.name, error.version, error.installed_version) == ("torch", "2", "1")
    with pytest.raises(AttributeError, match="has no 'nothing_like_it': it has what the README names"):
        hvd.nothing_like_it  # noqa: B018
    assert not hasattr(hvd, "nothing_like_it")


def test_a_loop_that_calls_the_hooks_of_keras() -> None:
    met: list[bool] = []
    here: Any = callback.ChaosCallback.__new__(callback.ChaosCallback)
    here.session = SimpleNamespace(meet=lambda talk: met.append(talk), samplers=[])
    here.state = SimpleNamespace(epoch=0)
    here.on_train_begin()
    here.on_epoch_begin(2, logs={})
    here.on_batch_begin(0, logs={})
    here.on_train_batch_begin(0, logs={})
    assert met == []
    here.on_train_batch_end(0, logs={})
    assert met == [False]
    here.on_epoch_end(2, logs={})
    assert here.state.epoch == 2


def test_a_model_on_a_gpu_is_refused_by_the_callback() -> None:
    weight = SimpleNamespace(device=torch.device("cuda:0"), is_meta=False, requires_grad=True)
    model: Any = SimpleNamespace(named_parameters=lambda: [("weight", weight)], named_buffers=list, named_modules=list)
    optimizer: Any = SimpleNamespace(param_groups=[{"params": [weight]}])
    with pytest.raises(ConfigError, match="'weight' is on cuda:0, and ChaosCallback takes models on the CPU"):
        callback._refuse_unusable(model, optimizer)
