"""Giving modules and optimizers a saved state: compared first, and then taken over bit for bit."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch

from chaos_mpi.elastic.signature import dtype_text
from chaos_mpi.errors import CheckpointError

_MISFIT = "the state to restore does not fit:"


def check_names(prefix: str, wanted: Iterable[str], state: Any) -> None:
    """Compare the names of entries.

    Raises:
        CheckpointError: one is missing or unexpected; it is named with ``prefix`` before it.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{_MISFIT} {prefix.rstrip('.') or 'it'} is a {type(state).__name__}, not a dict")
    names = dict.fromkeys(wanted)
    for name in names:
        if name not in state:
            raise CheckpointError(f"{_MISFIT} it lacks {prefix}{name}")
    for name in state:
        if name not in names:
            raise CheckpointError(f"{_MISFIT} it has {prefix}{name}, which is not here")


def check_module(name: str, module: torch.nn.Module, state: Any) -> None:
    """Compare a state with the module that is to take it.

    Raises:
        CheckpointError: names the first entry that is missing, unexpected, or of another shape or dtype.
    """
    live = module.state_dict()
    check_names(f"{name}.", live, state)
    for key, tensor in live.items():
        if isinstance(tensor, torch.Tensor):
            _check_tensor(f"{name}.{key}", tensor, state[key])


def check_optimizer(name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Compare a state with the optimizer that is to take it, which may not have begun to keep one.

    Raises:
        CheckpointError: the parameter groups differ, or something kept for a parameter has another shape.
    """
    check_names(f"{name}.", ("state", "param_groups"), state)
    here, there = optimizer.param_groups, state["param_groups"]
    if len(here) != len(there):
        raise CheckpointError(f"{_MISFIT} {name} has {len(here)} groups of parameters here and {len(there)} there")
    for index, (group, other) in enumerate(zip(here, there, strict=True)):
        mine, others = len(group["params"]), len(other["params"])
        if mine != others:
            raise CheckpointError(f"{_MISFIT} {name}, group {index}, has {mine} parameters here and {others} there")
    parameters = _parameters_by_index(optimizer, state)
    for index, kept in state["state"].items():
        if not isinstance(kept, Mapping):
            continue
        if index not in parameters:
            raise CheckpointError(f"{_MISFIT} {name} has state for parameter {index}, which is not here")
        parameter = parameters[index]
        for key, live in optimizer.state.get(parameter, {}).items():
            # Only what mirrors the parameter has a shape that is known beforehand.
            if isinstance(live, torch.Tensor) and live.shape == parameter.shape and kept.get(key) is not None:
                _check_tensor(f"{name}.state.{index}.{key}", live, kept[key])


def load_module(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Copy a state that was checked into the module's tensors, in place."""
    ordered = collections.OrderedDict(state)
    # Without the versions that stand there, modules take a state for one of an early torch.
    ordered._metadata = getattr(module.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    module.load_state_dict(ordered, strict=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer a copy of a state that was checked."""
    state = copy.deepcopy(dict(state))
    optimizer.load_state_dict(dict(state))
    # Loading casts everything to the dtype of the parameter, so a float32 average of a bfloat16 parameter would
    # lose bits; and it takes text for a sequence to be built anew.
    for index, parameter in _parameters_by_index(optimizer, state).items():
        loaded = optimizer.state.get(parameter, {})
        kept = state["state"].get(index)
        for key, value in kept.items() if isinstance(kept, Mapping) else ():
            if isinstance(value, torch.Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)
            elif isinstance(value, (str, bytes)):
                loaded[key] = value


def _parameters_by_index(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
    """The parameters by the numbers that they have in a state."""
    indices = chain.from_iterable(group["params"] for group in state["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return dict(zip(indices, parameters, strict=True))


def _check_tensor(name: str, live: torch.Tensor, other: Any) -> None:
    if not isinstance(other, torch.Tensor):
        raise CheckpointError(f"{_MISFIT} {name} is a tensor here and a {type(other).__name__} there")
    if live.shape != other.shape:
        raise CheckpointError(f"{_MISFIT} {name} has shape {list(live.shape)} here and {list(other.shape)} there")
    if live.dtype != other.dtype:
        here, there = dtype_text(live.dtype), dtype_text(other.dtype)
        raise CheckpointError(f"{_MISFIT} {name} has dtype {here} here and {there} there")
