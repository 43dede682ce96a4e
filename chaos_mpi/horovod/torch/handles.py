"""Handles of calls that are under way."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from chaos_mpi.elastic.exchanges import Barrier
from chaos_mpi.horovod.torch.calls import CallQueue
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.negotiation import JOIN, Asked
from chaos_mpi.horovod.torch.process_sets import ProcessSet, global_process_set
from chaos_mpi.horovod.torch.requests import Request

_numbers = itertools.count()
_requests: dict[int, Request] = {}
_lock = threading.Lock()


def start(queue: CallQueue, request: Request) -> int:
    """Make a call in the background; its handle."""
    queue.put(request)
    with _lock:
        handle = next(_numbers)
        _requests[handle] = request
    return handle


def poll(handle: int) -> bool:
    """Whether :func:`synchronize` would return at once."""
    request = _requests.get(handle)
    if request is None:
        raise ValueError(f"{handle!r} is not the handle of a call, or has been synchronized already")
    return request.done


def synchronize(handle: int) -> Any:
    """Wait for a call, and return its result; None if that was done already.

    Raises:
        HorovodInternalError: the ranks' calls do not fit, or a process set has lost a member.
    """
    with _lock:
        request = _requests.pop(handle, None)
    return job().waiting.wait(request) if request is not None else None


def join(device: int = -1) -> int:
    """This rank has no more data: until all ranks have come here, it takes part in the others' sums with zeros.

    That holds for ``allreduce`` with Sum or Average, and for the gradients of ``DistributedOptimizer``, whose
    parameters and state this rank then gets from the rank that was last. Other calls of the others meanwhile raise
    HorovodInternalError there.

    Args:
        device: ignored.

    Returns:
        The rank that came last.
    """
    here = job()
    queue = here.queue
    queue.settle()
    request = Request(Asked(JOIN, JOIN), lambda _: Barrier(JOIN), lambda done, _: len(done.contributors) - 1)
    last = int(here.waiting.wait(queue.put(request)))
    missed, queue.with_zeros = queue.with_zeros, []
    for number in dict.fromkeys(spec["step"] for spec in missed if "step" in spec):
        if (steps := here.steps.get(number)) is not None:
            steps.share_from(queue.last_to_join)
    return last


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return once all ranks have called it."""
    queue = process_set.queue
    name = queue.name("barrier", None)
    job().waiting.wait(queue.put(Request(Asked(name, name), lambda _: Barrier(name))))
