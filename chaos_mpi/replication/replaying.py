"""The side of a newcomer while the members train on: it measures its links, and repeats their steps since the cut.

See :mod:`chaos_mpi.replication.recording` for what it asks of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from chaos_mpi.errors import PeerFailedError, WaitTimeoutError
from chaos_mpi.replication.layout import DataTransfer, Layout, Piece, Transport
from chaos_mpi.replication.recording import LARGEST_PROBE_BYTES
from chaos_mpi.replication.steps import gradient_name, parameters_of, slice_of
from chaos_mpi.replication.tree import Packed, unpack

#: A newcomer that is no nearer after so many repeated steps is too slow to ever catch up.
PATIENCE_STEPS = 40
#: Steps asked for at a time, and bytes of their gradients, if more than one is asked for.
BATCH_STEPS = 32
BATCH_BYTES = 32 << 20
#: Batches asked for and not repeated yet: one comes while another is repeated.
_BATCHES = 2
#: Apart from the numbers of the transfers of the state.
_FIRST_NUMBER = 1 << 14
_IDLE_S = 0.0005
#: Probes under way from one member at a time, and how long they are sent.
_PROBES = 3
PROBE_S, SLOW_PROBE_S, ENOUGH_PROBES = 0.2, 0.8, 8

#: Memory that a transfer which nobody waits for any more may still write to; it is never given back.
_abandoned: list[object] = []


class FollowError(Exception):
    """The newcomer cannot follow the members; it needs the whole state while they wait. Never leaves the package."""


def measure_links(transport: Transport, sources: Sequence[int], probe_bytes: int, limit_s: float) -> dict[int, float]:
    """Bytes per second of the link from each source, all used at the same time for :data:`PROBE_S` seconds.

    It takes up to :data:`SLOW_PROBE_S` where few probes come, and longer only until one has come from each source.

    Args:
        transport: reaches the sources.
        sources: their ranks.
        probe_bytes: size of one probe.
        limit_s: longest wait for a first probe.

    Raises:
        FollowError: a source died.
        WaitTimeoutError: a probe did not come within ``limit_s`` seconds.
    """
    probe_bytes = min(probe_bytes, LARGEST_PROBE_BYTES)
    memory = torch.empty(probe_bytes, dtype=torch.uint8, device="cpu")
    number = _FIRST_NUMBER
    under_way: dict[int, deque[DataTransfer]] = {rank: deque() for rank in sources}
    arrivals: dict[int, list[float]] = {rank: [] for rank in sources}
    begun = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            spent, fewest = now - begun, min(len(times) for times in arrivals.values())
            over = fewest > 0 and (spent > SLOW_PROBE_S or (spent > PROBE_S and fewest >= ENOUGH_PROBES))
            for rank, transfers in under_way.items():
                while transfers and transfers[0].done():
                    transfers.popleft()
                    arrivals[rank].append(now)
                while not over and len(transfers) < _PROBES:
                    number += 1
                    # What comes means nothing, so all may come into the same memory.
                    transfers.append(transport.receive_data(rank, number, [(memory.data_ptr(), probe_bytes)]))
                    transport.send(rank, {"probe": probe_bytes, "number": number})
            if over and not any(under_way.values()):
                break
            if now - begun > limit_s:
                raise WaitTimeoutError(f"waited {limit_s:.0f} s for a first answer of all members")
            time.sleep(0)
    except PeerFailedError as error:
        _abandoned.append(memory)
        raise FollowError(f"a member died: {error}") from error
    return {rank: _rate(times, begun, probe_bytes) for rank, times in arrivals.items()}


def _rate(times: Sequence[float], begun: float, nbytes: int) -> float:
    """From the first half of the probes on, if there are enough: what is on the way at first says little."""
    first = len(times) // 2
    since = times[first - 1] if first else begun
    return nbytes * (len(times) - first) / max(times[-1] - since, 1e-6)


@dataclass(slots=True)
class Batch:
    """Steps that were asked for.

    Attributes:
        first, stop: their numbers since the cut.
        number: of the transfers that bring their gradients.
        metas: of each step, see :class:`chaos_mpi.replication.steps.Step`; empty until all members have told.
        gradients: memory for them, by name, for each step.
        transfers: one for each member that sends a part.
    """

    first: int
    stop: int
    number: int
    metas: Sequence[Mapping[str, Any]] = ()
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    transfers: list[DataTransfer] = field(default_factory=list)


class Follower:
    """Repeats the members' steps since the cut.

    Args:
        transport: reaches the members.
        sources: their ranks at the cut, in the order of their slices.
        optimizers: of the training state, in its order.
        limit_s: longest time without a word from the members.

    Attributes:
        repeated: steps repeated so far.
    """

    def __init__(
        self,
        transport: Transport,
        sources: Sequence[int],
        optimizers: Sequence[torch.optim.Optimizer],
        limit_s: float,
    ) -> None:
        self._transport, self._sources = transport, list(sources)
        self._optimizers, self._limit_s = optimizers, limit_s
        self._made = dict.fromkeys(self._sources, 0)
        self._ends: dict[int, int] = {}
        self._invitation: dict[str, Any] | None = None
        self._answers: dict[int, deque[dict[str, Any]]] = {rank: deque() for rank in self._sources}
        self._batches: deque[Batch] = deque()
        self._dead: set[int] = set()
        self._trouble = ""
        self._told = False
        self._lags: deque[tuple[int, int]] = deque()
        self._asked = self._numbers = self._step_bytes = 0
        self.repeated = 0

    def follow(self) -> None:
        """Repeat steps until the members have stopped and all of theirs are repeated.

        Raises:
            FollowError: a member died, the steps cannot be repeated here, or this process is too slow.
            WaitTimeoutError: no word from the members within the limit.
        """
        limit = time.monotonic() + self._limit_s
        try:
            while not all(self._ends.get(rank, self.repeated + 1) <= self.repeated for rank in self._sources):
                self._ask()
                self._hear_all()
                self._receive()
                if self._repeat():
                    limit = time.monotonic() + self._limit_s
                    self._judge()
                else:
                    self._refuse_trouble()
                    self._check(limit)
            if self._trouble:
                raise FollowError(self._trouble)
        except PeerFailedError as error:
            raise FollowError(f"a member died: {error}") from error
        finally:
            _abandoned.extend(self._batches)

    def say_near(self) -> None:
        """Ask the members to stop, because this process is as far as they are, or cannot get there."""
        if self._told:
            return
        self._told = True
        for rank in self._living():
            try:
                self._transport.send(rank, {"near": True})
            except PeerFailedError:
                self._dead.add(rank)

    def await_stop(self) -> dict[str, Any] | None:
        """Wait until the living members have stopped. What else they say is dropped.

        Returns:
            What they say of the job then; None if none is left.

        Raises:
            WaitTimeoutError: one has not within the limit.
        """
        limit = time.monotonic() + self._limit_s
        while any(rank not in self._ends for rank in self._living()):
            self._hear_all()
            self._check(limit)
        return self._invitation if self._living() else None

    def _lag(self) -> int:
        """How many steps the members are ahead, as far as is known."""
        return max(self._made.values()) - self.repeated

    def _judge(self) -> None:
        """See whether this process is near, or will never be."""
        self._lags.append((self.repeated, self._lag()))
        if self._lags[-1][1] <= 1:
            self.say_near()
        repeated, earlier = self._lags[0]
        if self.repeated - repeated >= PATIENCE_STEPS:
            self._lags.popleft()
            if not self._told and self._lag() >= earlier:
                raise FollowError(f"it fell behind: {self._lag()} steps after {self.repeated} repeated ones")

    def _ask(self) -> None:
        """Ask for the next steps: those that all members have made by now, or else for the one under way."""
        while len(self._batches) < _BATCHES and all(
            self._ends.get(r, self._asked + 1) > self._asked for r in self._sources
        ):
            most = max(1, BATCH_BYTES // self._step_bytes) if self._step_bytes else 1
            count = min(max(min(self._made.values()) - self._asked, 1), BATCH_STEPS, most)
            self._numbers += 1
            batch = Batch(self._asked, self._asked + count, _FIRST_NUMBER + self._numbers)
            self._batches.append(batch)
            self._asked += count
            question = {"follow": [batch.first, batch.stop], "number": batch.number, "repeated": self.repeated}
            for rank in self._sources:
                self._transport.send(rank, question)

    def _receive(self) -> None:
        """Let the gradients come of steps that all members have told of."""
        for batch in self._batches:
            if batch.metas or not all(self._answers.values()):
                continue
            told = [self._answers[rank].popleft() for rank in self._sources]
            batch.metas = told[0]["steps"]
            layouts = [self._make_room(batch, meta) for meta in batch.metas]
            for position, rank in enumerate(self._sources):
                pieces: list[Piece] = []
                for layout, gradients in zip(layouts, batch.gradients, strict=True):
                    pieces += layout.pieces(gradients, *slice_of(layout.total_bytes, position, len(self._sources)))
                if pieces:
                    batch.transfers.append(self._transport.receive_data(rank, batch.number, pieces))

    def _make_room(self, batch: Batch, meta: Mapping[str, Any]) -> Layout:
        parameters = parameters_of(self._optimizers[meta["optimizer"]])
        if len(parameters) != len(meta["mask"]):
            raise FollowError(f"the optimizer has {len(meta['mask'])} parameters there and {len(parameters)} here")
        gradients = {
            gradient_name(i): torch.empty_like(parameter, device="cpu")
            for i, (parameter, used) in enumerate(zip(parameters, meta["mask"], strict=True))
            if used
        }
        for name, stride in meta["strides"].items():
            if name in gradients:
                like = gradients[name]
                gradients[name] = torch.empty_strided(like.shape, stride, dtype=like.dtype, device="cpu")
        layout = Layout.of(gradients)
        if layout.digest() != meta["layout"]:
            raise FollowError("gradients are laid out in another way at the members")
        self._step_bytes = layout.total_bytes
        batch.gradients.append(gradients)
        return layout

    def _repeat(self) -> bool:
        """Repeat a batch of steps if its gradients have come; whether they have."""
        batch = self._batches[0] if self._batches else None
        if batch is None or not batch.metas or not all(transfer.done() for transfer in batch.transfers):
            return False
        self._batches.popleft()
        for meta, gradients in zip(batch.metas, batch.gradients, strict=True):
            try:
                self._apply(meta, gradients)
            except Exception as error:  # of the optimizer, or of the script's hooks on it
                raise FollowError(f"a step cannot be repeated here: {type(error).__name__}: {error}") from error
            self.repeated += 1
        return True

    def _apply(self, meta: Mapping[str, Any], gradients: Mapping[str, torch.Tensor]) -> None:
        optimizer = self._optimizers[meta["optimizer"]]
        for i, parameter in enumerate(parameters_of(optimizer)):
            gradient = gradients.get(gradient_name(i))
            parameter.grad = gradient.to(parameter.device) if gradient is not None else None
        for group, hyper in zip(optimizer.param_groups, unpack(Packed(meta["hyper"], {})), strict=True):
            group.update(hyper)
        optimizer.step()
        optimizer.zero_grad()

    def _living(self) -> list[int]:
        return [rank for rank in self._sources if rank not in self._dead]

    def _hear_all(self) -> None:
        for rank in self._living():
            try:
                while (message := self._transport.poll(rank)) is not None:
                    self._hear(rank, message)
            except PeerFailedError:
                self._dead.add(rank)

    def _hear(self, rank: int, message: Mapping[str, Any]) -> None:
        if "final" in message:
            self._ends[rank], self._invitation = message["final"], message["invitation"]
            self._made[rank] = message["final"]
            self._trouble = self._trouble or message["lost_track"]
        elif "steps" in message:
            self._answers[rank].append(dict(message))
            self._made[rank] = message["latest"]
        elif "level" in message:
            self._made[rank] = message["level"]
            if self._lag() <= 1:
                self.say_near()
        elif "dead" in message:
            self._dead.update(message["dead"])
        elif "lost_track" in message:
            self._trouble = message["lost_track"]

    def _refuse_trouble(self) -> None:
        if self._dead & set(self._sources):
            raise FollowError("a member died or left, and with it its part of the gradients")
        if self._trouble:
            raise FollowError(self._trouble)
        if len(self._ends) == len(self._sources) and len(set(self._ends.values())) > 1:
            raise FollowError("the members have not kept the same steps")

    def _check(self, limit: float) -> None:
        if time.monotonic() > limit:
            raise WaitTimeoutError(f"waited {self._limit_s:.0f} s for the members' gradients")
        time.sleep(_IDLE_S)
