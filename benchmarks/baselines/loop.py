"""The training loop of the baselines: what an elastic loop does, without any care for failures.

A gradient step is one allreduce of the flat gradient, with one more number in it: whether rank 0 wants all to stop
for the event. What happens then is up to the strategy. Rank 0 starts the newcomer, in a thread, while training goes on.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from synthetic import BATCH_SIZE, Journal, SyntheticModel, dataset, loss_of

from baselines import storage, strategies
from chaos_mpi.elastic.sponsor import START_DIRECTORY
from chaos_mpi.mpi import growth, runtime
from chaos_mpi.mpi.growth import Bridge
from chaos_mpi.mpi.world import World

#: Longest wait for an allreduce, or for the newcomer to be up, seconds.
LIMIT_S = 120.0


class Member:
    """One rank.

    Args:
        spec: what the driver said: ``contender``, ``state_bytes``, ``source`` (rank that sends), ``storage``,
            ``restarted``.
        journal: makes the journal of a rank, given its name.
    """

    def __init__(self, spec: dict[str, Any], journal: Callable[[str], Journal]) -> None:
        self._spec = spec
        self.world: World = runtime.start(LIMIT_S)
        bridge = growth.bridge_to_sponsor()
        restarted = bool(spec.get("restarted"))
        self.last = bridge is not None or (restarted and self.world.rank == self.world.size - 1)
        self.journal = journal("newcomer" if self.last else f"rank{self.world.rank}")
        torch.manual_seed(0)
        self._model = SyntheticModel(spec["state_bytes"], blank=bridge is not None or restarted)
        self.journal.follow(self._model)
        self._optimizer = torch.optim.SGD(self._model.trained(), lr=0.01)
        numbers = [p.numel() for p in self._model.trained()]
        self._flat = torch.zeros(sum(numbers) + 1)
        self._views = [
            part.view_as(p)
            for part, p in zip(torch.split(self._flat[:-1], numbers), self._model.trained(), strict=True)
        ]
        self._bridge: Bridge | None = None
        self._wanted = threading.Event()
        self._timing: dict[str, float] = {}
        if bridge is not None:
            self._enter(bridge)
        elif restarted:
            self._read_checkpoint()

    def request(self) -> None:
        """The event is asked for, at rank 0, in any thread."""
        if self._spec["contender"] == "checkpoint":
            self._wanted.set()
        else:
            threading.Thread(target=self._start_newcomer, daemon=True).start()

    def train(self) -> None:
        """Train until the process is ended, or the job is to be restarted."""
        inputs, labels = dataset().tensors
        order = torch.Generator().manual_seed(self.world.rank)
        first = self.last
        while True:
            chosen = torch.randint(len(inputs), (BATCH_SIZE,), generator=order)
            batch = inputs[chosen], labels[chosen]
            event = self._step(*batch)
            self.journal.step_ends()
            if first:
                first = False
                self.journal.note("contributed", right=self._model.frozen_as_it_should_be())
            if event:
                self._change()

    def _step(self, inputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """One step; whether rank 0 wants all to stop now."""
        self._optimizer.zero_grad()
        loss_of(self._model, inputs, labels).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self._model.trained() if p.grad is not None]
        torch._foreach_copy_(self._views, gradients)
        self._flat[-1] = float(self._wanted.is_set())
        pending = self.world.pending()
        pending.reduce(self._flat, "sum")
        pending.wait(lambda: "the gradients of the others", LIMIT_S)
        event = bool(self._flat[-1] > 0)
        self._flat.div_(self.world.size)
        torch._foreach_copy_(gradients, self._views)
        self._optimizer.step()
        return event

    # -- the event -----------------------------------------------------------------------------------

    def _change(self) -> None:
        self._wanted.clear()
        if self._spec["contender"] == "checkpoint":
            self._write_checkpoint_and_end()
        begun = time.monotonic()
        if self._bridge is not None:
            timing = {**self._timing, "waited_s": begun - self._timing.pop("ready_at")}
            self._bridge.send({"admit": timing})
        self.world = growth.grow(self.world, self._bridge, 0, LIMIT_S)
        if self._spec["contender"] == "all_gather":
            strategies.all_gather(self.world, self._model)
        else:
            strategies.send_from_one(self.world, self._model, self._spec["source"])
        self._agree()

    def _enter(self, bridge: Bridge) -> None:
        self.journal.note("ready")
        bridge.send({"ready": True})
        timing = bridge.receive(LIMIT_S, "the members to take this rank in")["admit"]
        begun = time.monotonic()
        self.world = growth.enter(bridge, LIMIT_S)
        entered = time.monotonic()
        if self._spec["contender"] == "all_gather":
            strategies.all_gather(self.world, self._model)
        else:
            strategies.pull_from_one(self.world, self._model, self._spec["source"])
        moved = time.monotonic()
        self._agree()
        self.journal.note("parts", **timing, grow_s=entered - begun, transfer_s=moved - entered)

    def _agree(self) -> None:
        if not self.world.agree(True, LIMIT_S, lambda: "all to be ready"):
            sys.exit("the members did not agree")

    def _start_newcomer(self) -> None:
        begun = time.monotonic()
        bridge = growth.spawn([sys.executable, *sys.orig_argv[1:]], host="", directory=START_DIRECTORY)
        bridge.receive(LIMIT_S, "the newcomer to build its model")
        self._bridge = bridge
        self._timing = {"launch_s": time.monotonic() - begun, "ready_at": time.monotonic()}
        self._wanted.set()

    # -- through storage -----------------------------------------------------------------------------

    def _write_checkpoint_and_end(self) -> None:
        address, port = self._spec["storage"]
        self.journal.note("stopped")
        if self.world.rank == 0:
            storage.put(address, port, memoryview(self._model.flat.numpy().data).cast("B"))
        self._agree()
        self.journal.note("saved")
        os._exit(0)

    def _read_checkpoint(self) -> None:
        address, port = self._spec["storage"]
        self.journal.note("reading")
        storage.get(address, port, memoryview(self._model.flat.numpy().data).cast("B"))
        self.journal.note("read")
