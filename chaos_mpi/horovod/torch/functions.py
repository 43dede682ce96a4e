"""Objects, parameters and optimizer states, given to all ranks or gathered from them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from chaos_mpi.elastic.exchanges import AllGather
from chaos_mpi.horovod.torch.calls import Group, Request
from chaos_mpi.horovod.torch.handles import synchronize
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.moving import allgather, broadcast_async_
from chaos_mpi.horovod.torch.negotiation import Asked
from chaos_mpi.horovod.torch.process_sets import ProcessSet, global_process_set
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import Pending

try:
    import cloudpickle as _pickler  # type: ignore[import-untyped, unused-ignore]
except ImportError:  # then what is defined in the script's main module travels by name
    _pickler = pickle


def broadcast_parameters(params: Mapping[str, Any] | Iterable[Any], root_rank: int) -> None:
    """Give all ranks one rank's parameters, in place.

    In a process that is to join a running job, and has not entered it yet, values stay as they are: it gets them when
    it enters.

    Args:
        params: a state dict, pairs of name and tensor, or tensors; all in the same order everywhere.
        root_rank: whose.

    Raises:
        ValueError: ``params`` is something else.
    """
    if isinstance(params, Mapping):
        named = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, (torch.Tensor, str)):
        named = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
    else:
        raise ValueError(f"invalid params of type: {type(params)}")
    handles = [broadcast_async_(tensor, root_rank, name) for name, tensor in named if isinstance(tensor, torch.Tensor)]
    for handle in handles:
        synchronize(handle)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Give all ranks one rank's optimizer state and hyper-parameters; also to ranks that have no state yet.

    Args:
        optimizer: of the same parameters everywhere.
        root_rank: whose.
        model: not needed.

    Raises:
        ValueError: the optimizer is LBFGS, whose state is not one of parameters.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("cannot broadcast torch.optim.LBFGS state")
    tensors: list[torch.Tensor] = []
    state = optimizer.state_dict()
    frame = _without_tensors(state, tensors)
    frame, shapes = broadcast_object((frame, [(t.dtype, t.shape) for t in tensors]), root_rank, "optimizer_state")
    if job().session.rank != root_rank:
        tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in shapes]
    else:
        tensors = [t.detach().cpu().contiguous().clone() for t in tensors]
    broadcast_parameters([(f"optimizer_state.{i}", t) for i, t in enumerate(tensors)], root_rank)
    if job().session.rank != root_rank:
        optimizer.load_state_dict(_with_tensors(frame, tensors))


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """One rank's object, pickled, at every rank of the set.

    Args:
        obj: at the other ranks only its type's name counts, if there is no ``name``.
        root_rank: whose.
        name: what the ranks' calls are matched by.
        process_set: which ranks.
    """
    name = type(obj).__name__ if name is None else name
    root = process_set.place_of(root_rank)
    queue = process_set.queue
    name = queue.name("broadcast_object", name)
    call = f"{name}[from rank {root_rank}]"
    # Of every rank, since another one is the root if this one dies.
    payload = torch.frombuffer(bytearray(_pickler.dumps(obj)), dtype=torch.uint8)

    def finish(operation: OfRoot, group: Group) -> Any:
        is_root = group.rank == min(root, group.size - 1)
        return obj if is_root else pickle.loads(operation.result.numpy().tobytes())  # noqa: S301

    request = Request(Asked(name, call), lambda _: OfRoot(call, payload, root), finish)
    return job().waiting.wait(queue.put(request))


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """The objects of all ranks, in rank order.

    Args:
        obj: is pickled.
        name: what the ranks' calls are matched by; default: its type's name.
        process_set: which ranks.
    """
    name = type(obj).__name__ if name is None else name
    payload = torch.frombuffer(bytearray(_pickler.dumps(obj)), dtype=torch.uint8)
    head = torch.frombuffer(bytearray(payload.numel().to_bytes(8, "little")), dtype=torch.uint8)
    # Length and content in one call, because who takes part may differ between two.
    gathered = allgather(torch.cat([head, payload]), f"{name}.t", process_set).numpy().tobytes()
    objects, at = [], 0
    while at < len(gathered):
        end = at + 8 + int.from_bytes(gathered[at : at + 8], "little")
        objects.append(pickle.loads(gathered[at + 8 : end]))  # noqa: S301
        at = end
    return objects


class OfRoot(AllGather):
    """The rows of one rank, of which the others do not know the number; the root is as in a broadcast."""

    def __init__(self, call: str, tensor: torch.Tensor, root: int) -> None:
        super().__init__(call, tensor)
        self._own, self._root = self._input, root

    def start(self, pending: Pending, view: View, rank: int) -> None:
        is_root = rank == min(self._root, view.size - 1)
        self._input = self._own if is_root else self._own[:0]
        self._my_sizes[0] = self._input.shape[0]
        self._comparison.say(self.call, self._input.shape[0])
        super().start(pending, view, rank)


class _Place(int):
    """Where a tensor was."""


def _without_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _without_tensors(entry, tensors) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(entry, tensors) for entry in value)
    return copy.copy(value)


def _with_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value]
    if isinstance(value, dict):
        return {key: _with_tensors(entry, tensors) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(entry, tensors) for entry in value)
    return value
