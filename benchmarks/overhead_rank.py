"""One rank of a job that ``overhead.py`` measures: trains the same model in one of three systems, whenever
asked to.

The bare MPI loops are meant to be as fast as this machine allows without any fault tolerance: gradients are
copied once, into flat buckets, summed there in place, and ``param.grad`` becomes a view of the bucket. No
gradient is kept, nothing is copied back, no control data travels, no failure is looked for.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jobs import join_driver
from models import WORKLOADS

Clock = Callable[[], float]
_now: Clock = time.perf_counter


class System(Protocol):
    """A way of training data parallel."""

    rank: int
    net: torch.nn.Module

    def use(self, variant: str) -> None:
        """Train this way from now on."""

    def backward(self, loss: torch.Tensor) -> None:
        """Put the gradients averaged over all ranks into ``param.grad``."""

    def timed_parts(self) -> dict[str, tuple[Any, str]]:
        """Name of a part of the step -> the method that does it, for the breakdown."""


class Chaos(System):
    """This package."""

    def __init__(self, net: torch.nn.Module) -> None:
        import chaos_mpi

        self._session = chaos_mpi.init()
        self.rank = self._session.rank
        self.net = chaos_mpi.DistributedDataParallel(net)

    def use(self, variant: str) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def timed_parts(self) -> dict[str, tuple[Any, str]]:
        from chaos_mpi.elastic.sequence import OperationSequence
        from chaos_mpi.elastic.session import Session
        from chaos_mpi.torch.buckets import GradientStep
        from chaos_mpi.torch.ddp import DistributedDataParallel

        return {
            "step boundary": (Session, "boundary"),
            "begin": (DistributedDataParallel, "_backward_begins"),
            "gradient hooks": (GradientStep, "ready"),
            "copy in": (GradientStep, "_stage"),
            "end of backward": (DistributedDataParallel, "_backward_ends"),
            "wait for the sum": (OperationSequence, "settle"),
            "average and copy out": (GradientStep, "deliver"),
        }


class Gloo(System):
    """torch's DistributedDataParallel over Gloo, with its defaults."""

    def __init__(self, net: torch.nn.Module) -> None:
        import torch.distributed as dist

        self.rank = int(os.environ["RANK"])
        dist.init_process_group(
            "gloo",
            init_method=os.environ["BENCH_RENDEZVOUS"],
            rank=self.rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=300),
        )
        self.net = torch.nn.parallel.DistributedDataParallel(net)

    def use(self, variant: str) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def timed_parts(self) -> dict[str, tuple[Any, str]]:
        return {}


class BareMpi(System):
    """mpi4py and nothing else, in two variants.

    ``overlap``: buckets as torch's DDP makes them, summed by ``Iallreduce`` while backward goes on.
    ``flat``: one ``Allreduce`` of all gradients after backward.
    """

    def __init__(self, net: torch.nn.Module) -> None:
        from mpi4py import MPI

        from chaos_mpi.torch.buckets import make_buckets

        MPI.Init_thread()  # chaos_mpi's launch settings, once imported, leave this to the program
        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank, self._size = self._comm.Get_rank(), self._comm.Get_size()
        self.net = net
        self._params = [p for p in net.parameters() if p.requires_grad]
        self._buckets = make_buckets(self._params, 25 << 20)
        self._flat = torch.zeros(sum(p.numel() for p in self._params))
        self._views: list[list[torch.Tensor]] = []
        self._parts: list[torch.Tensor] = []
        end = 0
        for bucket in self._buckets:
            part = self._flat[end : end + bucket.numel]
            end += bucket.numel
            self._parts.append(part)
            self._views.append(
                [
                    part[o : o + self._params[i].numel()].view_as(self._params[i])
                    for i, o in zip(bucket.params, bucket.offsets, strict=True)
                ]
            )
        # Given the tensor itself, mpi4py describes it anew at each call; done once, it costs nothing.
        self._messages = [self._describe(part) for part in self._parts]
        self._whole = self._describe(self._flat)
        self._hooks: list[Any] = []
        self._missing: list[int] = []
        self._requests: list[Any] = []

    def use(self, variant: str) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._missing = [len(b.params) for b in self._buckets]
        if variant == "overlap":
            for position, bucket in enumerate(self._buckets):
                for index in bucket.params:
                    register: Callable[..., Any] = self._params[index].register_post_accumulate_grad_hook
                    self._hooks.append(register(self._hook(position)))

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if self._hooks:
            self.await_sum()
        else:
            self.sum_at_once()
        self.average()

    def sum_at_once(self) -> None:
        for position in range(len(self._buckets)):
            self.copy_in(position)
        self._comm.Allreduce(self._mpi.IN_PLACE, self._whole, self._mpi.SUM)

    def await_sum(self) -> None:
        self._mpi.Request.Waitall(self._requests)
        self._requests.clear()
        self._missing = [len(b.params) for b in self._buckets]

    def average(self) -> None:
        self._flat.div_(self._size)
        for bucket, views in zip(self._buckets, self._views, strict=True):
            for index, view in zip(bucket.params, views, strict=True):
                self._params[index].grad = view

    def copy_in(self, position: int) -> None:
        grads = [grad for i in self._buckets[position].params if (grad := self._params[i].grad) is not None]
        torch._foreach_copy_(self._views[position], grads)

    def start(self, position: int) -> None:
        self.copy_in(position)
        self._requests.append(self._comm.Iallreduce(self._mpi.IN_PLACE, self._messages[position], self._mpi.SUM))

    def timed_parts(self) -> dict[str, tuple[Any, str]]:
        return {
            "copy in and start": (BareMpi, "start" if self._hooks else "copy_in"),
            "wait for the sum": (BareMpi, "await_sum" if self._hooks else "sum_at_once"),
            "average": (BareMpi, "average"),
        }

    def _describe(self, tensor: torch.Tensor) -> list[Any]:
        return [self._mpi.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), self._mpi.FLOAT]

    def _hook(self, position: int) -> Callable[[torch.Tensor], None]:
        def gradient_is_final(_: torch.Tensor) -> None:
            self._missing[position] -= 1
            if self._missing[position] == 0:
                self.start(position)
            elif self._requests:
                self._mpi.Request.Testall(self._requests)  # MPI moves data only when called

        return gradient_is_final


SYSTEMS: dict[str, Callable[[torch.nn.Module], System]] = {"chaos": Chaos, "gloo": Gloo, "mpi": BareMpi}


class Trainer:
    """The training loop, the same for every system."""

    def __init__(self, system: str, model: str) -> None:
        torch.set_num_threads(1)
        self._workload = WORKLOADS[model]
        net = self._fresh()
        self.system = SYSTEMS[system](net)
        self._net = net
        self._optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        # One batch again and again: this measures a step, not the reading of data.
        inputs, targets = self._workload.dataset()
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(self.system.rank))
        chosen = order[: self._workload.batch_size]
        self._inputs, self._targets = inputs[chosen], targets[chosen]

    def step(self) -> None:
        """One training step."""
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self.system.net(self._inputs), self._targets)
        self.system.backward(loss)
        self._optimizer.step()

    def run(self, steps: int) -> list[float]:
        """Seconds of each of ``steps`` steps, after one that is not counted."""
        self.step()
        seconds = []
        for _ in range(steps):
            begun = _now()
            self.step()
            seconds.append(_now() - begun)
        return seconds

    def breakdown(self, steps: int) -> dict[str, float]:
        """Seconds per step in each part of the communication; parts may contain one another."""
        with _timed(self.system.timed_parts()) as spent:
            self.run(steps)
        return {name: seconds / (steps + 1) for name, seconds in spent.items()}

    def check(self, steps: int) -> float:
        """Checksum of the parameters ``steps`` steps from the start: the same for all systems, but for rounding."""
        with torch.no_grad():
            for mine, fresh in zip(self._net.parameters(), self._fresh().parameters(), strict=True):
                mine.copy_(fresh)
        for _ in range(steps):
            self.step()
        return sum(float(p.detach().abs().sum(dtype=torch.float64)) for p in self._net.parameters())

    def _fresh(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return self._workload.build()


@contextmanager
def _timed(parts: dict[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    spent: dict[str, float] = defaultdict(float)
    originals = [(owner, method, getattr(owner, method)) for owner, method in parts.values()]

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = _now()
            try:
                return original(*args, **kwargs)
            finally:
                spent[name] += _now() - begun

        return call

    for name, (owner, method) in parts.items():
        setattr(owner, method, wrapped(name, getattr(owner, method)))
    try:
        yield spent
    finally:
        for owner, method, original in originals:
            setattr(owner, method, original)


def main() -> None:
    """Do what the driver asks until it hangs up."""
    link, spec = join_driver()
    trainer = Trainer(spec["system"], spec["model"])
    link.send({"rank": trainer.system.rank, "pid": os.getpid()})
    while True:
        try:
            request = link.receive()
        except (EOFError, ConnectionError):
            os._exit(0)  # nothing to tidy up, and MPI_Finalize would take its time
        trainer.system.use(request["variant"])
        does: dict[str, Callable[[int], Any]] = {
            "run": trainer.run,
            "check": trainer.check,
            "breakdown": trainer.breakdown,
        }
        link.send({"result": does[request["do"]](request["steps"])})


if __name__ == "__main__":
    main()
