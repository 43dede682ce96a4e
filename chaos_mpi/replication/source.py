"""The side of a member: it serves byte ranges of its training state to newcomers that ask for them.

A member keeps no plan and no record of who has what: the newcomer asks, range by range, and asks somebody else when a
member dies or is slow. Requests and answers are JSON messages, bytes go straight from the tensors.

======================================  ====================================================================
``{"invitation": true}``                answer with all that a newcomer must know of the job
``{"get": [start, stop], "number": n}`` send these bytes as transfer ``n``
``{"sum": [start, stop], "number": n}`` answer ``{"sum": checksum, "number": n}``
``{"received": true}``                  the newcomer has all it needs
======================================  ====================================================================

Unasked, a member says ``{"dead": [ranks]}`` when it learns of a death: a newcomer may be the last to notice, because
launchers tell only processes that were started together. When all newcomers have all they need, it asks each of them
``{"there": true}``, to be answered with ``{"here": true}``; at last it says ``{"complete": ...}``: whether members and
newcomers go on together.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from chaos_mpi.errors import PeerFailedError, WaitTimeoutError
from chaos_mpi.replication.layout import DataTransfer, Layout, Piece, Transport, checksum

#: Do something else for so long when there is nothing to do for a while.
_IDLE_S = 0.0005
_SPIN_S = 0.02
#: Ask so often who has died.
_LOOK_PERIOD_S = 0.02

#: Memory that a newcomer may not have fetched yet, with its transfers; MPI may still read it.
_abandoned: list[object] = []


class StateSource:
    """Serves one state to newcomers.

    Args:
        transport: reaches them.
        guests: their ranks.
        layout: of the state.
        tensors: the state, by name; must not change while it is served.
        invitation: the answer to a newcomer that asks for it.
    """

    def __init__(
        self,
        transport: Transport,
        guests: Sequence[int],
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        invitation: dict[str, Any],
    ) -> None:
        self._transport, self._guests = transport, tuple(guests)
        self._waiting = set(guests)
        self._layout, self._tensors, self._invitation = layout, tensors, invitation
        self._told_dead: set[int] = set()
        self._looked_at = 0.0
        self._under_way: list[tuple[int, DataTransfer]] = []
        #: Guests that died before they had everything.
        self.lost: set[int] = set()
        #: Bytes sent to each guest.
        self.sent_bytes: dict[int, int] = dict.fromkeys(guests, 0)

    def serve(self, limit_s: float, what: Callable[[], str]) -> None:
        """Serve until every guest has all it needs, or is dead.

        Raises:
            WaitTimeoutError: a guest neither asked for anything nor finished for ``limit_s`` seconds.
        """
        active = time.monotonic()
        while self._waiting or self._under_way:
            if self.step():
                active = time.monotonic()
                continue
            idle = time.monotonic() - active
            if idle > limit_s:
                raise WaitTimeoutError(f"waited {limit_s:.0f} s for {what()}")
            if idle > _SPIN_S:
                time.sleep(_IDLE_S)
            else:
                os.sched_yield()

    def confirm(self, limit_s: float, what: Callable[[], str]) -> None:
        """Have all guests that are left say that they are still there: some may have had all they need for long.

        Raises:
            WaitTimeoutError: one has not answered within ``limit_s`` seconds.
        """
        self._waiting = set(self._guests) - self.lost
        for guest in sorted(self._waiting):
            try:
                self._transport.send(guest, {"there": True})
            except PeerFailedError:
                self._lose(guest)
        self.serve(limit_s, what)

    def conclude(self, complete: bool) -> None:
        """Tell the guests that are left whether all of them have all they need, as the members have agreed."""
        for guest in self._guests:
            if guest not in self.lost:
                with contextlib.suppress(PeerFailedError):
                    self._transport.send(guest, {"complete": complete})

    def step(self) -> bool:
        """Do what there is to do now; whether there was anything."""
        busy = self._tell_of_deaths()
        for guest in sorted(self._waiting):
            try:
                while guest in self._waiting and (message := self._transport.poll(guest)) is not None:
                    busy = True
                    self._answer(guest, message)
            except PeerFailedError:
                busy = True
                self._lose(guest)
        for guest, transfer in list(self._under_way):
            if guest in self.lost:
                continue
            try:
                if transfer.done():
                    busy = True
                    self._under_way.remove((guest, transfer))
            except PeerFailedError:
                busy = True
                self._lose(guest)
        return busy

    def _tell_of_deaths(self) -> bool:
        now = time.monotonic()
        if now - self._looked_at < _LOOK_PERIOD_S:
            return False
        self._looked_at = now
        dead = set(self._transport.failed()) - self._told_dead
        self._told_dead |= dead
        for guest in sorted(self._waiting - dead) if dead else ():
            try:
                self._transport.send(guest, {"dead": sorted(dead)})
            except PeerFailedError:
                self._lose(guest)
        for guest in sorted(dead.intersection(self._guests)):  # also those that had all, while others still fetch
            self._lose(guest)
        return bool(dead)

    def _answer(self, guest: int, message: dict[str, Any]) -> None:
        if "get" in message:
            pieces = self._pieces(message["get"])
            self._under_way.append((guest, self._transport.send_data(guest, message["number"], pieces)))
            self.sent_bytes[guest] += sum(nbytes for _, nbytes in pieces)
        elif "sum" in message:
            answer = {"sum": checksum(self._pieces(message["sum"])), "number": message["number"]}
            self._transport.send(guest, answer)
        elif "invitation" in message:
            self._transport.send(guest, self._invitation)
        elif "received" in message or "here" in message:
            self._waiting.discard(guest)

    def _pieces(self, span: Sequence[int]) -> list[Piece]:
        return self._layout.pieces(self._tensors, span[0], span[1])

    def _lose(self, guest: int) -> None:
        self._waiting.discard(guest)
        self.lost.add(guest)
        if any(other == guest for other, _ in self._under_way):
            _abandoned.append((self._tensors, self._under_way))  # memory that may still be sent from
        self._under_way = [(other, transfer) for other, transfer in self._under_way if other != guest]
