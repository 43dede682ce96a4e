"""The state of an elastic training function: committed, restored, and made alike at all ranks."""

from __future__ import annotations

import copy
import hashlib
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from chaos_mpi.elastic.digest import params_digest
from chaos_mpi.horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from chaos_mpi.horovod.torch.basics import rank
from chaos_mpi.horovod.torch.elastic import membership
from chaos_mpi.horovod.torch.elastic.copying import copied
from chaos_mpi.horovod.torch.elastic.sampler import ElasticSampler, merged
from chaos_mpi.horovod.torch.functions import (
    _without_tensors,
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from chaos_mpi.horovod.torch.job import job


class State(ABC):
    """What training goes on from.

    Args:
        bcast_object, get_rank: accepted for classes that were written for Horovod.
    """

    def __init__(
        self, bcast_object: Callable[..., Any] | None = None, get_rank: Callable[[], int] | None = None
    ) -> None:
        self._bcast_object = bcast_object if bcast_object is not None else broadcast_object
        self._rank = get_rank if get_rank is not None else rank
        self._reset_callbacks: list[Callable[[], None]] = []
        self._told = False

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], None]]) -> None:
        """Call these when the ranks have changed, before the state is synchronized."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """The ranks have changed."""
        self._told = False
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Hosts have changed: all ranks are to be interrupted at their next check."""
        self._told = True

    def commit(self) -> None:
        """Save the state in memory, and :meth:`check_host_updates`.

        Raises:
            HostsUpdatedInterrupt: see :meth:`check_host_updates`.
        """
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """The place for ranks to join and leave; all ranks call it, between two steps.

        Between two backward passes of one step nothing happens: at the next call after the step.

        Raises:
            HostsUpdatedInterrupt: ranks have come, left or died since the training function was entered.
            SystemExit: this rank leaves.
        """
        try:
            membership.check(self._told)
        except HostsUpdatedInterrupt:
            self._told = False
            raise

    @abstractmethod
    def save(self) -> None:
        """Keep what :meth:`restore` goes back to."""

    @abstractmethod
    def restore(self) -> None:
        """Go back to what was saved last."""

    @abstractmethod
    def sync(self) -> None:
        """Make the state alike at all ranks."""

    def reset(self) -> None:  # noqa: B027
        """The ranks have changed, and the state is not synchronized yet."""

    def parts(self) -> tuple[dict[str, torch.nn.Module], dict[str, torch.optim.Optimizer]]:
        """Models and optimizers that a rank gets that joins, by name."""
        return {}, {}

    def attributes(self) -> dict[str, Any]:
        """What else it gets, by name."""
        return {}

    def take_attributes(self, values: dict[str, Any]) -> None:  # noqa: B027
        """Take over what :meth:`attributes` of another rank has given."""


class ObjectState(State):
    """Python objects as attributes, named by keyword.

    Args:
        bcast_object, get_rank: accepted for classes that were written for Horovod.
        kwargs: the attributes. They have to be picklable.
    """

    _saved_state: dict[str, Any]

    def __init__(
        self,
        bcast_object: Callable[..., Any] | None = None,
        get_rank: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(bcast_object, get_rank)
        self._take(kwargs)

    def save(self) -> None:
        self._saved_state = copy.deepcopy({name: getattr(self, name) for name in self._saved_state})

    def restore(self) -> None:
        for name, value in copy.deepcopy(self._saved_state).items():
            setattr(self, name, value)

    def sync(self) -> None:
        if self._saved_state:
            self._take(self._bcast_object({name: getattr(self, name) for name in self._saved_state}))

    def attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._saved_state}

    def take_attributes(self, values: dict[str, Any]) -> None:
        self._take({name: values.get(name, getattr(self, name)) for name in self._saved_state})

    def _take(self, values: dict[str, Any]) -> None:
        """Have these themselves as attributes, which the script may hold as well, and save what they are now."""
        for name, value in values.items():
            setattr(self, name, value)
        self._saved_state = copy.deepcopy(values)


class TorchState(ObjectState):
    """Models, optimizers, :class:`ElasticSampler` and other attributes, named by keyword.

    Args:
        model, optimizer: more of them by other names.
        kwargs: the attributes. What is none of these kinds has to be picklable.
    """

    #: None yet where a subclass sets attributes before it calls ``super().__init__()``.
    _handlers: Mapping[str, StateHandler] = MappingProxyType({})
    _is_restored = False

    def __init__(
        self, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> None:
        given = {"model": model, "optimizer": optimizer, **kwargs}
        handlers = {name: handler for name, value in given.items() if (handler := _handler_of(value)) is not None}
        self.__dict__["_handlers"] = handlers
        for name, handler in handlers.items():
            object.__setattr__(self, name, handler.value)
        super().__init__(**{name: value for name, value in given.items() if name not in handlers})
        for handler in handlers.values():
            handler.save()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._handlers:
            self._handlers[name].set_value(value)
        super().__setattr__(name, value)

    def save(self) -> None:
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        for handler in self._handlers.values():
            handler.restore()
        super().restore()
        self._is_restored = True

    def sync(self) -> None:
        first = job().members[0]
        for name in sorted(self._handlers):
            self._handlers[name].sync()
        super().sync()
        self._refuse_two_origins(first)
        # Not before all is alike: an error on the way leads back to what belongs together.
        for handler in self._handlers.values():
            handler.save()
        self._is_restored = False

    def _refuse_two_origins(self, first: str) -> None:
        """After an error, ranks may have gone back to different commits: all has to be of one.

        Args:
            first: who was rank 0 when it began.

        Raises:
            HorovodInternalError: another one is now; at every rank.
        """
        told = allgather_object((first, job().session.member, self._is_restored), "elastic origin")
        now = told[0][1]
        if any(restored for _, _, restored in told) and any(origin != now for origin, _, _ in told):
            raise HorovodInternalError("rank 0 died while it gave its state to all: they go back, and begin anew")

    def parts(self) -> tuple[dict[str, torch.nn.Module], dict[str, torch.optim.Optimizer]]:
        values = {name: handler.value for name, handler in self._handlers.items()}
        models = {name: value for name, value in values.items() if isinstance(value, torch.nn.Module)}
        return models, {name: value for name, value in values.items() if isinstance(value, torch.optim.Optimizer)}

    def attributes(self) -> dict[str, Any]:
        others = {
            name: handler.value.state_dict()
            for name, handler in self._handlers.items()
            if isinstance(handler.value, (ElasticSampler, LRScheduler))
        }
        return {**super().attributes(), **others}

    def take_attributes(self, values: dict[str, Any]) -> None:
        for name, handler in self._handlers.items():
            if isinstance(handler.value, (ElasticSampler, LRScheduler)) and name in values:
                handler.value.load_state_dict(values[name])
        super().take_attributes(values)


class StateHandler(ABC):
    """How a value of one kind is kept. Another kind: a class like this, and :func:`set_handler_registry`.

    Attributes:
        value: the value.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._saved: Any = None

    def set_value(self, value: Any) -> None:
        """Another one is to be kept."""
        self.value = value
        self.save()

    def save(self) -> None:
        """Keep what :meth:`restore` goes back to."""
        self._saved = copied(self.value.state_dict(), self._saved)

    def restore(self) -> None:
        """Go back to what was saved last."""
        self.value.load_state_dict(copy.deepcopy(self._saved))

    @abstractmethod
    def sync(self) -> None:
        """Make the value alike at all ranks."""


class ModelStateHandler(StateHandler):
    """A model: parameters and buffers."""

    def sync(self) -> None:
        # Mostly they are alike already, but for the buffers.
        for named in (list(self.value.named_parameters()), list(self.value.named_buffers())):
            if named and _differs(params_digest([(name, tensor.detach()) for name, tensor in named])):
                broadcast_parameters(named, 0)


class OptimizerStateHandler(StateHandler):
    """An optimizer."""

    def sync(self) -> None:
        tensors: list[torch.Tensor] = []
        frame = _without_tensors(self.value.state_dict(), tensors)
        mine = hashlib.blake2b(pickle.dumps(frame)).hexdigest()
        mine += params_digest([(str(i), tensor.detach()) for i, tensor in enumerate(tensors)])
        if _differs(mine):
            broadcast_optimizer_state(self.value, 0)


class SchedulerStateHandler(StateHandler):
    """A scheduler of learning rates."""

    def sync(self) -> None:
        self.value.load_state_dict(broadcast_object(self.value.state_dict(), name="elastic scheduler"))


class SamplerStateHandler(StateHandler):
    """An elastic sampler."""

    _is_restored = False

    def save(self) -> None:
        self._saved = self.value.mark()

    def restore(self) -> None:
        self.value.go_back(self._saved)
        self._is_restored = True

    def sync(self) -> None:
        told = allgather_object((self._is_restored, self.value.state_dict()), "elastic sampler")
        states = [state for _, state in told]
        # After an error ranks may have gone back to different commits, and the model is that of rank 0.
        is_restored = any(restored for restored, _ in told)
        self.value.load_state_dict(states[0] if is_restored else merged(states))
        self._is_restored = False


_registry: list[tuple[type[Any], type[StateHandler]]] = [
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (LRScheduler, SchedulerStateHandler),
    (ElasticSampler, SamplerStateHandler),
]


def get_handler_registry() -> list[tuple[type[Any], type[StateHandler]]]:
    """Which kinds of values have which handlers in a :class:`TorchState`; the first that fits counts."""
    return _registry


def set_handler_registry(registry: Iterable[tuple[type[Any], type[StateHandler]]]) -> None:
    """Have these handlers, in every :class:`TorchState` that is made from now on."""
    global _registry
    _registry = list(registry)


def _handler_of(value: Any) -> StateHandler | None:
    return next((handler(value) for kind, handler in _registry if isinstance(value, kind)), None)


def _differs(mine: str) -> bool:
    """Whether this text is not the same at all ranks."""
    here = job()
    here.queue.drain()
    return len(set(here.session.gather(mine))) > 1
