"""The way of a newcomer that catches up while the members train on (join policy ``overlap``).

It measures its links, fetches the state of one step, the cut, from the copies that the members have of it, and repeats
every step they made since. Once it is level with them they stop, and it fetches what steps do not bring: buffers,
scheduler, the place in the epoch. What could not be repeated is fetched then as well, while they wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic.arrival import await_word, neighbours, restore, show_progress
from chaos_mpi.errors import JoinError, PeerFailedError
from chaos_mpi.mpi.channel import Channel
from chaos_mpi.replication.layout import Layout, Range
from chaos_mpi.replication.puller import SHARD_SIZES, StatePuller
from chaos_mpi.replication.replaying import Follower, FollowError, measure_links
from chaos_mpi.replication.tree import pack
from chaos_mpi.sharding import plan
from chaos_mpi.sharding.held import widened
from chaos_mpi.sharding.plan import Plan

if TYPE_CHECKING:
    from chaos_mpi.elastic.arrival import Arrival
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.elastic.state import TrainingState

log = logging.getLogger("chaos_mpi.elastic")

#: Tensors up to this size are not worth a checksum.
FETCHED_ANYWAY_BYTES = 64 << 10
#: Large enough to measure a link by, small enough to be a small part of the state.
_SMALLEST_PROBE_BYTES, _LARGEST_PROBE_BYTES = 16 << 10, 256 << 10


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Where a newcomer is once the members have stopped for it.

    Attributes:
        invitation: what they say of the job now.
        rates: of their links, bytes per second.
        repeated: whether it has made all steps that they have.
    """

    invitation: dict[str, Any]
    rates: dict[int, float]
    repeated: bool


def catch_up(
    session: Session, channel: Channel, state: TrainingState, invitation: dict[str, Any], arrival: Arrival
) -> CaughtUp:
    """Get level with the members, or at least have them stop.

    Raises:
        JoinError: all members died, or ended the job.
        WaitTimeoutError: a wait reached its limit.
    """
    limit_s = session.settings.timeout_s
    members = list(range(len(invitation["members"])))
    follower = Follower(channel, members, state.optimizers(), limit_s)
    rates: dict[int, float] = {}
    repeated = False
    try:
        begun = time.monotonic()
        rates = _measured(channel, members, Layout.from_json(invitation["layout"]).total_bytes, limit_s)
        arrival.parts["probe_s"] = time.monotonic() - begun
        cut = _await_cut(channel, members, limit_s)
        arrival.parts["cut_wait_s"] = time.monotonic() - begun - arrival.parts["probe_s"]
        _take_cut(session, channel, state, cut, rates, arrival)
        begun = time.monotonic()
        follower = Follower(channel, cut["sources"], state.optimizers(), limit_s)
        follower.follow()
        repeated = True
        arrival.repeated_steps = follower.repeated
        arrival.parts["catch_up_s"] = time.monotonic() - begun
    except FollowError as error:
        log.warning("the members have to wait for this rank (%s) after all: %s", session.member, error)
    follower.say_near()
    final = follower.await_stop()
    if final is None:
        raise JoinError(f"this rank ({session.member}) was to join a job that ended, or has no use for it any more")
    return CaughtUp(final, rates, repeated)


def planned(total_bytes: int, names: dict[int, str], rates: dict[int, float]) -> Plan:
    """Who sends what of a cut. Members and newcomer come to the same plan, each by itself."""
    return plan(total_bytes, list(neighbours(names, rates).values()), shard_sizes=SHARD_SIZES)


def not_repeated(
    layout: Layout, live: Mapping[str, torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[list[Range], list[Range]]:
    """The byte ranges of a state that are to be fetched anyway, and those that may be there already.

    What optimizer steps bring about is there, and what is large may not have changed since the cut.

    Args:
        layout: of the members' state.
        live: this process's own, by name.
        optimizers: of it.
    """
    memory = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                memory.add(parameter.data_ptr())
                kept = optimizer.state.get(parameter, {})
                memory.update(value.data_ptr() for value in kept.values() if isinstance(value, torch.Tensor))
    repeated = {name for name, tensor in live.items() if tensor.data_ptr() in memory}
    there = [e.nbytes > FETCHED_ANYWAY_BYTES or (e.name in repeated and e.fits(live[e.name])) for e in layout.entries]
    return layout.ranges([not t for t in there]), layout.ranges(there)


def _measured(channel: Channel, members: list[int], state_bytes: int, limit_s: float) -> dict[int, float]:
    """Measure the links, and tell all members, which makes this rank ready for the cut."""
    probe_bytes = min(max(state_bytes // (64 * len(members)), _SMALLEST_PROBE_BYTES), _LARGEST_PROBE_BYTES)
    rates = measure_links(channel, members, probe_bytes, limit_s)
    for rank in members:
        try:
            channel.send(rank, {"rates": rates})
        except PeerFailedError as error:
            raise FollowError(f"a member died: {error}") from error
    return rates


def _await_cut(channel: Channel, members: Sequence[int], limit_s: float) -> dict[str, Any]:
    """What the first member says that has come to the cut."""
    cut: dict[str, Any] | None = await_word(
        channel, members, "cut", limit_s, "the members to fix the step to start from"
    )
    if cut is None:
        raise FollowError("all members died, or ended the job")
    return cut


def _take_cut(
    session: Session, channel: Channel, state: TrainingState, cut: dict[str, Any], rates: dict[int, float],
    arrival: Arrival,
) -> None:  # fmt: skip
    names = dict(zip(cut["sources"], cut["members"], strict=True))
    layout = Layout.from_json(cut["layout"])
    tensors = layout.allocate(pack({"state": state.capture()}, clone=False).tensors)
    begun = time.monotonic()
    wanted = planned(layout.total_bytes, names, rates)
    session.emit("shard_plan", sources=wanted.sources(), predicted_s=wanted.predicted_s, bound_s=wanted.bound_s)
    arrival.parts["scheduling_s"] = time.monotonic() - begun
    puller = StatePuller(
        channel, neighbours(names, rates), layout, tensors, session.settings.timeout_s, show_progress(session, names)
    )
    ranks = {name: rank for rank, name in names.items()}
    try:
        fetched = puller.fetch_planned(
            {ranks[name]: shards for name, shards in wanted.shards().items()},
            {ranks[name]: span for name, span in widened(wanted.assignment).items()},
        )
    except PeerFailedError as error:
        raise FollowError(f"{error}") from error
    arrival.parts["transfer_s"] = fetched.seconds
    sources = {names[rank]: nbytes for rank, nbytes in fetched.sources.items()}
    session.emit(
        "shards_received", sources=sources, seconds=round(fetched.seconds, 6), moved=fetched.moved_shards, again=0
    )
    restore(session, state, cut, tensors)
