"""Objects, parameters and optimizer states, given to all ranks or gathered from them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from chaos_mpi.elastic.exchanges import AllGather
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.broadcasting import broadcast_of, for_those_with
from chaos_mpi.horovod.torch.handles import synchronize
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.moving import allgather
from chaos_mpi.horovod.torch.negotiation import Asked
from chaos_mpi.horovod.torch.process_sets import ProcessSet, global_process_set
from chaos_mpi.horovod.torch.requests import Group, Request
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import Pending

try:
    import cloudpickle as _pickler  # type: ignore[import-untyped, unused-ignore]
except ImportError:  # then what is defined in the script's main module travels by name
    _pickler = pickle


def dumped(value: Any) -> bytes:
    """The value, pickled; of what is defined in the script itself, also functions and classes if it can be done."""
    return _pickler.dumps(value)  # type: ignore[no-any-return, unused-ignore]


def broadcast_parameters(params: Mapping[str, Any] | Iterable[Any], root_rank: int) -> None:
    """Give all ranks one rank's parameters, in place.

    In a process that is to join a running job, and has not entered it yet, values stay as they are: it gets them when
    it enters.

    Args:
        params: a state dict, pairs of name and tensor, or tensors; all in the same order everywhere.
        root_rank: whose.

    Raises:
        ValueError: ``params`` is something else.
        HorovodInternalError: the ranks make different calls, or that rank has died meanwhile. Some of the parameters
            may be those of that rank then.
    """
    if isinstance(params, Mapping):
        named = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, (torch.Tensor, str)):
        named = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
    else:
        raise ValueError(f"invalid params of type: {type(params)}")
    give_tensors(named, global_process_set.member_at(root_rank))


def give_tensors(named: Sequence[tuple[str | None, Any]], root: str) -> None:
    """Give all ranks the tensors of this member. Nobody takes its place if it dies meanwhile.

    Raises:
        HorovodInternalError: it has died; at every rank, after all calls have come to their end.
    """
    handles = [broadcast_of(tensor, root, name) for name, tensor in named if isinstance(tensor, torch.Tensor)]
    failed: HorovodInternalError | None = None
    for handle in handles:
        try:
            synchronize(handle)
        except HorovodInternalError as error:
            failed = failed or error
    if failed is not None:
        raise failed


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
        HorovodInternalError: the ranks make different calls, or that rank has died meanwhile; the state is as before.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("cannot broadcast torch.optim.LBFGS state")
    give_optimizer_state(optimizer, global_process_set.member_at(root_rank))


def give_optimizer_state(optimizer: torch.optim.Optimizer, root: str) -> None:
    """Give all ranks the optimizer state of this member. Nobody takes its place if it dies meanwhile.

    Raises:
        HorovodInternalError: it has died; at every rank.
    """
    is_root = job().session.member == root
    tensors: list[torch.Tensor] = []
    state = optimizer.state_dict()
    frame = _without_tensors(state, tensors)
    told = (frame, [(t.dtype, t.shape) for t in tensors])
    frame, shapes = _object_of(root, told, "optimizer_state", global_process_set)
    if not is_root:
        tensors = [torch.empty(shape, dtype=dtype, device="cpu") for dtype, shape in shapes]
    else:
        tensors = [t.detach().cpu().contiguous().clone() for t in tensors]
    give_tensors([(f"optimizer_state.{i}", t) for i, t in enumerate(tensors)], root)
    if not is_root:
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

    Raises:
        HorovodInternalError: the ranks make different calls, or that rank has died meanwhile.
    """
    return _object_of(process_set.member_at(root_rank), obj, name, process_set)


def _object_of(root: str, obj: Any, name: str | None, process_set: ProcessSet) -> Any:
    """The object of this member, at every rank of the set."""
    name = type(obj).__name__ if name is None else name
    is_root = job().session.member == root
    queue = process_set.queue
    name = queue.name("broadcast_object", name)
    call = f"{name}[from {root}]"
    payload = torch.empty(0, dtype=torch.uint8, device="cpu")
    if is_root:
        payload = torch.frombuffer(bytearray(dumped(obj)), dtype=torch.uint8)

    def finish(operation: OfRoot, group: Group) -> Any:
        return obj if is_root else pickle.loads(operation.result.numpy().tobytes())  # noqa: S301

    request = Request(Asked(name, call), lambda _: OfRoot(call, payload, root), finish, anew=False)
    return job().waiting.wait(queue.put(request))


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """The objects of all ranks, in rank order.

    Args:
        obj: is pickled.
        name: what the ranks' calls are matched by; default: its type's name.
        process_set: which ranks.
    """
    name = type(obj).__name__ if name is None else name
    payload = torch.frombuffer(bytearray(dumped(obj)), dtype=torch.uint8)
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
    """The rows of one member, of which the others do not know the number, and have none; they fail if it dies."""

    def __init__(self, call: str, tensor: torch.Tensor, root: str) -> None:
        super().__init__(call, tensor)
        self._root = root

    def start(self, pending: Pending, view: View, rank: int) -> None:
        self.for_size = for_those_with(self._root, view)
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
