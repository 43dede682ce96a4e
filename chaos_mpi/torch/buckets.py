"""Gradients in flat buckets, summed over the members while backward is still running.

The memory of one gradient step is: ``param.grad`` (the local gradient until the step is finished, the average
from then on), and two sets of buckets that take turns, because the sum of the last step is kept for a survivor
that could not finish it. Parameters that are on a GPU have one set of buckets there as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from chaos_mpi.elastic.operations import Operation, pack_bytes, unpack_bytes
from chaos_mpi.errors import ConfigError, PeerFailedError
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import Pending, World
from chaos_mpi.torch.staging import Staged, host_memory, way_to_host

_TRANSPORT = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
#: The first bucket is small, so that reducing starts early in backward (as torch's own DDP does).
FIRST_BUCKET_BYTES = 1 << 20
#: In front of the tail: members that contribute, members that have something to propose, and the sums of the number of
#: the model and of its square, which show whether all train the same one: models of one size differ in nothing else.
_CONTROL_HEADER = 4


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        params: indices into the reducer's parameter list.
        offsets: first element of each in the flat buffer.
        numel: elements of all of them.
        dtype: of the flat buffer: the gradients' own, or float32 for half precisions, which are summed in float32.
    """

    params: tuple[int, ...]
    offsets: tuple[int, ...]
    numel: int
    dtype: torch.dtype


def make_buckets(params: Sequence[torch.nn.Parameter], cap_bytes: int) -> list[Bucket]:
    """Split the parameters into buckets, in the reverse of their order, which is about the order of backward.

    Raises:
        ConfigError: a parameter has a dtype whose gradients cannot be summed, or they are on several devices.
    """
    # Each device has a thread of its own in backward, and steps are made by one.
    if len(devices := {str(param.device) for param in params}) > 1:
        raise ConfigError(f"parameters are on {', '.join(sorted(devices))}; those of one rank have to be on one device")
    for param in params:
        if param.dtype not in _TRANSPORT:
            known = ", ".join(map(str, _TRANSPORT))
            raise ConfigError(f"gradients of dtype {param.dtype} are not supported; use one of {known}")
    buckets: list[Bucket] = []
    open_buckets: dict[torch.dtype, list[int]] = {}
    for index in reversed(range(len(params))):
        dtype = _TRANSPORT[params[index].dtype]
        chosen = open_buckets.setdefault(dtype, [])
        chosen.append(index)
        cap = cap_bytes if buckets else min(FIRST_BUCKET_BYTES, cap_bytes)
        if sum(params[i].numel() for i in chosen) * dtype.itemsize >= cap:
            buckets.append(_bucket(params, open_buckets.pop(dtype), dtype))
    for dtype, chosen in open_buckets.items():
        buckets.append(_bucket(params, chosen, dtype))
    return buckets


def _bucket(params: Sequence[torch.nn.Parameter], chosen: list[int], dtype: torch.dtype) -> Bucket:
    offsets, end = [], 0
    for index in chosen:
        offsets.append(end)
        end += params[index].numel()
    return Bucket(tuple(chosen), tuple(offsets), end, dtype)


def make_staging(buckets: Sequence[Bucket], params: Sequence[torch.nn.Parameter]) -> list[Staged]:
    """The buckets on the device of the parameters; none where that is the CPU."""
    device = params[0].device
    if device.type == "cpu":
        return []
    stream = way_to_host(device)
    return [Staged(b.dtype, [params[i].shape for i in b.params], device, stream) for b in buckets]


class BufferSet:
    """Transport memory of one gradient step: a flat host tensor for each bucket, and one for the module's buffers.

    The last bucket has a tail: how many members contribute, how many have something to propose, which model they
    train, and how many of the contributors used each parameter. It rides along so that a step costs no collective of
    its own for it.

    Args:
        buckets: of the parameters.
        params: they.
        shared_bytes: size of the module's buffers.
        staged: see :func:`make_staging`; the same for all sets.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        params: Sequence[torch.nn.Parameter],
        shared_bytes: int,
        staged: Sequence[Staged],
    ) -> None:
        tail = _CONTROL_HEADER + len(params)
        last = len(buckets) - 1
        self.staged, device = staged, params[0].device
        self.flats = [host_memory(b.numel + (tail if i == last else 0), b.dtype, device) for i, b in enumerate(buckets)]
        self.gradients = [flat[: b.numel] for b, flat in zip(buckets, self.flats, strict=True)]
        self.control = self.flats[-1][-tail:]
        self.shared = torch.empty(shared_bytes, dtype=torch.uint8, device="cpu")
        self.views = [
            [flat[o : o + params[i].numel()].view(params[i].shape) for i, o in zip(b.params, b.offsets, strict=True)]
            for b, flat in zip(buckets, self.flats, strict=True)
        ]

    def sums(self) -> Iterator[list[torch.Tensor]]:
        """The sums of each bucket's gradients, where the parameters are."""
        if not self.staged:
            yield from self.views
            return
        for staged, gradients in zip(self.staged, self.gradients, strict=True):
            staged.bring_back(gradients)
            yield staged.views


class GradientStep(Operation):
    """The gradients of one step: started bucket by bucket during backward, delivered into ``param.grad`` at its end.

    Args:
        params: the parameters that are trained.
        buckets: their split, the same at every member.
        buffers: module buffers to be made equal to those of rank 0 (empty for none).
        memory: the transport memory to use.
        contributes: whether this member's gradients count (they do not when its samples are spent).
        proposes: asked at the end of backward whether this member has something to propose to the others.
        model: the number of the model, the same at every member.
    """

    is_gradient_step = True
    checks_label = False  # its own check needs nothing more than has to be in a step

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        buckets: Sequence[Bucket],
        buffers: list[torch.Tensor],
        memory: BufferSet,
        contributes: bool,
        proposes: Callable[[], bool],
        model: int = 1,
    ) -> None:
        super().__init__("gradient step" if model == 1 else f"gradient step of model {model}")
        self.model = model
        self._params, self._buckets, self._buffers = params, buckets, buffers
        self.memory = memory
        self.contributes = contributes
        self._proposes = proposes
        self._world: World | None = None
        self._awaited = [len(b.params) for b in buckets]
        self._next = self._staged = 0
        #: Whether gradients were sent that were not final.
        self.too_early = False

    def begin(self, world: World) -> None:
        """Start in the middle of backward: module buffers are final already, buckets follow as they fill."""
        self._world = world
        self._pending = world.pending()
        with self._failure_kept():
            self._start_buffers(self._pending, world.rank)

    def ready(self, bucket: int) -> None:
        """One more gradient of this bucket is final; start every bucket whose turn has come."""
        self._count(bucket)
        if self.failure is not None or self._pending is None:
            return
        with self._failure_kept():
            self._start_ready(self._pending)

    def more(self, bucket: int) -> None:
        """A gradient of this bucket gets more, although it seemed to be final."""
        self.too_early |= bucket < self._staged

    def start_rest(self) -> None:
        """Backward is over: start what is left."""
        if self.failure is not None or self._pending is None:
            return
        with self._failure_kept():
            self._start_all(self._pending)

    def start(self, pending: Pending, view: View, rank: int) -> None:
        self._start_buffers(pending, rank)
        self._staged = self._next = 0
        self._start_all(pending)

    def _count(self, bucket: int) -> None:
        self._awaited[bucket] -= 1
        if self.memory.staged:
            self.memory.staged[bucket].reached()

    def _start_ready(self, pending: Pending) -> None:
        """Start every bucket that is full and whose turn has come.

        In order, so that every member starts the same collectives in the same order. The last one waits for the end of
        backward: only then it is known which parameters were used.
        """
        while self._staged < len(self._buckets) - 1 and self._awaited[self._staged] <= 0:
            self._stage(self._staged)
            self._staged += 1
        while self._next < self._staged and self._is_on_host(self._next):
            pending.reduce(self.memory.flats[self._next], "sum")
            self._next += 1
        pending.test()

    def _start_all(self, pending: Pending) -> None:
        """Start what has not been started; all gradients are there."""
        first, last = self._staged, len(self._buckets)
        for index in range(first, last) if self.memory.staged else ():
            self._stage(index)
        for index in range(self._next, last):
            if not self.memory.staged and index >= first:
                self._stage(index)
            while not self._is_on_host(index):  # a GPU may be far behind
                pending.test()
                time.sleep(0)
            pending.reduce(self.memory.flats[index], "sum")
        self._staged = self._next = last

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        super().wait(what, limit_s)
        assert self._world is not None
        total, squares = self.memory.control[2:4].tolist()
        if total**2 != squares * self._world.size:  # only if the numbers differ; all see the same two sums
            self._refuse_mismatch(what, limit_s)

    def results(self) -> list[torch.Tensor]:
        return [*self.memory.flats, self.memory.shared]

    def renew_buffers(self) -> None:
        for staged in self.memory.staged:
            staged.wait()  # the old memory is written to until then
        self.memory = BufferSet(self._buckets, self._params, self.memory.shared.numel(), self.memory.staged)

    def deliver(self) -> None:
        """Put the averages into ``param.grad`` and rank 0's values into the module buffers.

        A parameter that no member used keeps its ``grad`` as it is, as with one process.
        """
        control = self.memory.control.tolist()
        count = max(control[0], 1.0)
        with torch.no_grad():  # after backward(create_graph=True) gradients have a graph
            for bucket, views in zip(self._buckets, self.memory.sums(), strict=True):
                for index, view in zip(bucket.params, views, strict=True):
                    if control[_CONTROL_HEADER + index] == 0.0:
                        continue
                    param = self._params[index]
                    if param.grad is None:
                        param.grad = torch.empty_like(param)
                    torch.div(view, count, out=param.grad)
        self.deliver_buffers()

    def deliver_buffers(self) -> None:
        """Put rank 0's values into the module buffers."""
        if self._buffers:
            unpack_bytes(self.memory.shared, self._buffers)

    def write_average(self, param: int, target: torch.Tensor) -> None:
        """Put the average of one parameter's gradients there, unless no member used the parameter."""
        if self.memory.control[_CONTROL_HEADER + param] == 0.0:
            return
        for bucket, views in zip(self._buckets, self.memory.views, strict=True):
            if param in bucket.params:
                torch.div(views[bucket.params.index(param)], max(float(self.memory.control[0]), 1.0), out=target)

    def anyone_proposes(self) -> bool:
        return bool(self.memory.control[1] > 0)

    @property
    def contributed(self) -> int:
        """How many members' gradients are in the result."""
        return int(self.memory.control[0])

    @contextmanager
    def _failure_kept(self) -> Iterator[None]:
        """Keep a failure for the end of backward; revoke now, so that nobody waits for this member meanwhile."""
        try:
            yield
        except PeerFailedError as failure:
            self.failure = failure
            if self._world is not None:
                self._world.revoke()

    def _start_buffers(self, pending: Pending, rank: int) -> None:
        if not self._buffers:
            return
        if rank == 0:
            pack_bytes(self._buffers, self.memory.shared)
        else:
            self.memory.shared.zero_()
        pending.reduce(self.memory.shared, "bor")

    def _is_on_host(self, index: int) -> bool:
        return not self.memory.staged or self.memory.staged[index].is_on_host()

    def _stage(self, index: int) -> None:
        """Bring the gradients of a bucket to where they are summed, or begin to."""
        bucket, views = self._buckets[index], self.memory.views[index]
        if index == len(self._buckets) - 1:
            self._fill_control()
        if self.memory.staged:
            gradients = [self._given(self._params[param]) for param in bucket.params]
            self.memory.staged[index].take(gradients, self.memory.gradients[index])
            return
        targets, sources = [], []
        for param, view in zip(bucket.params, views, strict=True):
            gradient = self._given(self._params[param])
            if gradient is None:
                view.zero_()
            else:
                targets.append(view)
                sources.append(gradient)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _given(self, param: torch.nn.Parameter) -> torch.Tensor | None:
        """What this member adds to the sum of a parameter's gradients."""
        return param.grad.detach() if self.contributes and param.grad is not None else None

    def _fill_control(self) -> None:
        counts = self.contributes
        # Of a member that does not count, too: it has a gradient now, of zeros, so all others need one.
        used = [0.0 if p.grad is None else 1.0 for p in self._params]
        header = [1.0 if counts else 0.0, 1.0 if self._proposes() else 0.0, self.model, self.model**2]
        self.memory.control.copy_(torch.tensor([*header, *used], device="cpu"))
