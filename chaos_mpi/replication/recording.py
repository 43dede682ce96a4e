"""The side of a member while it trains on: it serves a copy of the cut, and what it gave to each optimizer step since.

An optimizer is a function of its state, its hyper-parameters and the gradients it is given. So a newcomer that has the
state of one step, the *cut*, and is told of every later call of ``optimizer.step()``, comes to the parameters and the
optimizer state of the members, bit for bit. Each member copies only the part of the cut that it is going to send, and
keeps only its slice of each gradient, until the newcomers have it.

====================================== ===========================================================================
``{"probe": nbytes, "number": n}``     send this many bytes, which mean nothing, as transfer ``n``
``{"rates": {rank: bytes_per_s}}``     the links as the newcomer has measured them: it is ready for the cut
``{"follow": [i, j], "number": n, "repeated": r}``
                                       once steps ``i`` to ``j - 1`` since the cut are made, tell of them, and send this
                                       member's slices of them as ``n``; the first ``r`` are not needed any more
``{"near": true}``                     the newcomer is as far as the members, or cannot get there while they train
====================================== ===========================================================================

Unasked, a member says ``{"cut": invitation}`` at the cut, ``{"level": steps}`` when steps that are asked for are not
made yet, ``{"lost_track": reason}`` when it will not be kept, ``{"dead": [ranks]}`` of members that left, and
``{"final": steps, "lost_track": reason, "invitation": ...}`` once this member has stopped. The rest is as in
:mod:`chaos_mpi.replication.source`.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from chaos_mpi.errors import PeerFailedError
from chaos_mpi.replication.devices import OnHost
from chaos_mpi.replication.layout import DataTransfer, Layout, Piece, Range, Transport
from chaos_mpi.replication.source import StateSource
from chaos_mpi.replication.steps import (
    Cut,
    Gradients,
    Snapshot,
    Step,
    copy_pieces,
    gradients_of,
    hyper_parameters,
    slice_of,
    unusual_strides,
)

log = logging.getLogger("chaos_mpi.replication")

#: No probe is larger.
LARGEST_PROBE_BYTES = 1 << 20
#: Slices of gradients that a member keeps at most, as a multiple of the whole state, or so many bytes.
KEPT_SHARE = 1.0
KEPT_BYTES = 64 << 20
_IDLE_S = 0.0005
#: How long the training thread may keep the interpreter from the serving thread, seconds.
SWITCH_INTERVAL_S = 0.001

#: Slices that a newcomer may never have fetched, with their transfers; MPI may still read them.
_abandoned: list[object] = []


class RecordingSource(StateSource):
    """Serves in a thread while this member trains: probes, then the cut, then the steps since; at last the live state.

    The training thread calls :meth:`cut`, :meth:`record` and :meth:`stop_training`; the thread calls the rest.

    Args:
        transport, guests, layout, tensors, invitation: see :class:`~chaos_mpi.replication.source.StateSource`.
        limit_s: a guest that says nothing for so long, although it is its turn, is lost.
        ready: called from the thread once every newcomer has measured its links.
        caught_up: called from the thread once every newcomer is as far as the members, or cannot get there.

    Attributes:
        silent: the lost guests that may be alive.
    """

    def __init__(
        self,
        transport: Transport,
        guests: Sequence[int],
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        invitation: dict[str, Any],
        limit_s: float,
        *,
        ready: Callable[[], None],
        caught_up: Callable[[], None],
    ) -> None:
        super().__init__(transport, guests, layout, tensors, invitation)
        self._ready, self._caught_up = ready, caught_up
        self._limit_s = limit_s
        self._heard = dict.fromkeys(guests, time.monotonic())
        self.silent: set[int] = set()
        self._gone: deque[int] = deque()
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        #: The links of each newcomer by the rank at their other end, bytes per second.
        self.rates: dict[int, dict[int, float]] = {}
        self._measured = threading.Event()
        self._said_ready = self._said_near = self._final = False
        self._new_cut: Cut | None = None
        self._index, self._count = 0, 1
        self._snapshot: Snapshot | None = None
        self._parked: list[tuple[int, dict[str, Any]]] = []
        self._copied, self._stop = threading.Event(), threading.Event()
        self._steps: list[Step | None] = []
        self._kept_bytes = self._dropped_bytes = self._kept_limit = 0  # each is changed by one thread only
        self._geometry: list[Any] = []
        self._gradient_layout = Gradients(layout, "", {})
        self._lost_track = ""
        self._repeated: dict[int, int] = {}
        self._dropped = 0
        self._asked: deque[tuple[int, Range, int]] = deque()
        self._slices: list[tuple[int, DataTransfer, Sequence[Step]]] = []
        self._near: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="chaos_mpi-source", daemon=True)

    # -- the training thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def waiting(self) -> list[int]:
        """Guests that are alive, as far as is known, and do not have all yet."""
        return sorted(self._waiting)

    def await_rates(self, limit_s: float) -> bool:
        """Wait until every living guest has said what its links are like; whether that is so."""
        return self._measured.wait(limit_s)

    def cut(self, cut: Cut) -> None:
        """Copy what this member is to send, in the thread. The state may change once :meth:`record` lets it."""
        self._kept_limit = max(KEPT_BYTES, int(KEPT_SHARE * cut.layout.total_bytes))
        self._new_cut = cut

    def record(self, number: int, optimizer: torch.optim.Optimizer) -> float:
        """Keep this member's slice of what ``optimizer``, number ``number``, is about to apply.

        Returns:
            How long it took, seconds; most of it, the first time, may be waiting until the cut is copied.
        """
        begun = time.perf_counter()
        while not self._copied.wait(1.0) and self._thread.is_alive():
            pass
        if self._waiting and not self._lost_track:
            try:
                self._keep(number, optimizer)
            except Exception as error:  # training goes on, whatever cannot be kept for a newcomer
                self._lost_track = f"a step cannot be kept: {type(error).__name__}: {error}"
        return time.perf_counter() - begun

    def stop_training(
        self,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        invitation: dict[str, Any],
        lost: Collection[int] = frozenset(),
    ) -> None:
        """The members have stopped: serve the live state from here on, and say so; :meth:`serve` does the rest.

        Args:
            layout, tensors, invitation: see :class:`~chaos_mpi.replication.source.StateSource`.
            lost: guests that are dead, as other members know.
        """
        self._end_thread()
        for guest in set(lost) - self.lost:
            self._lose(guest)
        self._layout, self._tensors, self._invitation = layout, tensors, invitation
        self._final, self._snapshot = True, None
        self._release_parked()
        for guest in self.waiting:
            final = {"final": len(self._steps), "lost_track": self._lost_track, "invitation": invitation}
            try:
                self._transport.send(guest, final)
            except PeerFailedError:
                self._lose(guest)

    def tell_gone(self, ranks: Sequence[int]) -> None:
        """These members have left in good order, which nobody tells the newcomers."""
        self._gone.extend(ranks)

    def abandon(self) -> None:
        """The job ends, or goes on without the newcomers."""
        self._waiting.clear()
        self._end_thread()

    def _keep(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise ValueError("a GradScaler has the optimizer unscale its gradients itself (fused=True)")
        gradients, mask = gradients_of(optimizer)
        layout, digest, strides = self._layout_of(optimizer, gradients)
        start, stop = slice_of(layout.total_bytes, self._index, self._count)
        kept = self._kept_bytes - self._dropped_bytes
        if kept + stop - start > self._kept_limit:
            self._lost_track = f"the members have kept {kept >> 20} MiB of gradients for it, and keep no more"
            return
        part, on_host = torch.empty(stop - start, dtype=torch.uint8, device="cpu"), OnHost(gradients)
        copy_pieces(layout.pieces(on_host, start, stop), part)
        meta = {"optimizer": number, "mask": mask, "layout": digest, "strides": strides,
                "hyper": hyper_parameters(optimizer)}  # fmt: skip
        self._kept_bytes += part.numel()
        self._steps.append(Step(meta, part))

    def _layout_of(self, optimizer: torch.optim.Optimizer, gradients: Mapping[str, torch.Tensor]) -> Gradients:
        """What they look like, which is most often what they did in the step before."""
        geometry = [(name, gradient.dtype, gradient.shape, gradient.stride()) for name, gradient in gradients.items()]
        if geometry != self._geometry:
            layout = Layout.of(gradients)
            self._geometry = geometry
            self._gradient_layout = Gradients(layout, layout.digest(), unusual_strides(optimizer, gradients))
        return self._gradient_layout

    def _end_thread(self) -> None:
        self._stop.set()
        self._copied.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- the serving thread ----------------------------------------------------------------------------

    def _lose(self, guest: int) -> None:
        if any(other == guest for other, _ in self._under_way):
            _abandoned.append(self._snapshot)
        super()._lose(guest)

    def step(self) -> bool:
        busy = super().step()
        for _ in range(len(self._asked)):
            guest, span, number = self._asked.popleft()
            if guest not in self._waiting:
                continue
            try:
                busy |= self._hand_out(guest, span, number)
            except PeerFailedError:
                self._lose(guest)
        return busy | self._check_slices()

    def _run(self) -> None:
        # The training thread would keep this one waiting for 5 ms at each call otherwise, and with it the newcomer.
        before = sys.getswitchinterval()
        sys.setswitchinterval(min(before, SWITCH_INTERVAL_S))
        try:
            while not self._stop.is_set():
                if self._new_cut is not None:
                    self._take(self._new_cut)
                    self._new_cut = None
                if not self.step():
                    time.sleep(_IDLE_S)
                self._lose_silent()
                self._speak_up()
        except Exception:  # the training thread must not wait for a thread that is no more
            log.exception("serving the newcomers failed; they are started again")
            self.silent |= self._waiting
            self._waiting.clear()
            self._speak_up()
        finally:
            self._copied.set()
            sys.setswitchinterval(before)

    def _take(self, cut: Cut) -> None:
        self._snapshot = Snapshot(cut.ranges, cut.layout, cut.tensors)
        self._layout, self._index, self._count = cut.layout, cut.index, cut.count
        self._copied.set()
        for guest in self.waiting:
            try:
                self._transport.send(guest, {"cut": cut.invitation})
            except PeerFailedError:
                self._lose(guest)
        self._release_parked()

    def _lose_silent(self) -> None:
        now = time.monotonic()
        asked = {guest for guest, _, _ in self._asked}
        for guest in self.waiting:
            between = guest in self.rates and self._snapshot is None
            if between or guest in asked or guest in self._near:
                self._heard[guest] = now  # it waits for the members
            elif now - self._heard[guest] > self._limit_s:
                log.error("a newcomer has said nothing for %.0f s; it is started again", self._limit_s)
                self.silent.add(guest)
                self._lose(guest)

    def _tell_of_deaths(self) -> bool:
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        for guest in self.waiting if gone else ():
            try:
                self._transport.send(guest, {"dead": gone})
            except PeerFailedError:
                self._lose(guest)
        return super()._tell_of_deaths()

    def _speak_up(self) -> None:
        if not self._said_ready and self._waiting <= set(self.rates):
            self._said_ready = True
            self._measured.set()
            self._ready()
        if not self._said_near and self._waiting <= self._near:
            self._said_near = True
            self._measured.set()
            self._caught_up()

    def _answer(self, guest: int, message: dict[str, Any]) -> None:
        self._heard[guest] = time.monotonic()
        if "probe" in message:
            self._probe(guest, min(int(message["probe"]), LARGEST_PROBE_BYTES), message["number"])
        elif "rates" in message:
            self.rates[guest] = {int(rank): float(rate) for rank, rate in message["rates"].items()}
        elif "follow" in message:
            first, stop = message["follow"]
            self._asked.append((guest, (first, stop), message["number"]))
            self._repeated[guest] = message["repeated"]
            self._drop_steps()
            if stop > len(self._steps) and not self._final:
                self._transport.send(guest, {"level": len(self._steps)})
        elif "near" in message:
            self._near.add(guest)
        elif "get" in message and self._snapshot is None and not self._final:
            self._parked.append((guest, message))  # another member was faster to tell of the cut
        else:
            super()._answer(guest, message)

    def _release_parked(self) -> None:
        parked, self._parked = self._parked, []
        for guest, message in parked:
            try:
                super()._answer(guest, message)
            except PeerFailedError:
                self._lose(guest)

    def _probe(self, guest: int, nbytes: int, number: int) -> None:
        if self._scratch.numel() < nbytes:
            self._scratch = torch.zeros(LARGEST_PROBE_BYTES, dtype=torch.uint8, device="cpu")
        self._under_way.append((guest, self._transport.send_data(guest, number, [(self._scratch.data_ptr(), nbytes)])))

    def _hand_out(self, guest: int, span: Range, number: int) -> bool:
        if span[1] > len(self._steps):
            if self._lost_track:
                self._transport.send(guest, {"lost_track": self._lost_track})
                return True
            if not self._final:
                self._asked.append((guest, span, number))
            return self._final  # it has been told how many there are
        steps = [step for step in self._steps[span[0] : span[1]] if step is not None]
        metas = [step.meta for step in steps]
        self._transport.send(guest, {"steps": metas, "first": span[0], "latest": len(self._steps)})
        pieces = [(step.part.data_ptr(), step.part.numel()) for step in steps if step.part.numel()]
        if pieces:
            self._slices.append((guest, self._transport.send_data(guest, number, pieces), steps))
        return True

    def _check_slices(self) -> bool:
        """Forget slices that have arrived, and those of guests that have all they need or are dead."""
        before = len(self._slices)
        for entry in list(self._slices):
            guest, transfer, _ = entry
            try:
                if guest in self._waiting and not transfer.done():
                    continue
            except PeerFailedError:
                self._lose(guest)
            if guest not in self._waiting:
                _abandoned.append(entry)
            self._slices.remove(entry)
        return len(self._slices) < before

    def _drop_steps(self) -> None:
        """Give back the memory of steps that every newcomer has."""
        everywhere = min((self._repeated.get(guest, 0) for guest in self._waiting), default=0)
        for index in range(self._dropped, everywhere):
            dropped = self._steps[index]
            if dropped is not None:
                self._dropped_bytes += dropped.part.numel()
            self._steps[index] = None
        self._dropped = max(self._dropped, everywhere)

    def _pieces(self, span: Sequence[int]) -> list[Piece]:
        if self._snapshot is not None:
            return self._snapshot.pieces(span[0], span[1])
        return super()._pieces(span)
