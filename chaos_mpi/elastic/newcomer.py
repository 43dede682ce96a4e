"""The way of a process that was started to join a running job, from its own side.

Until its script makes the ``TrainingState`` it is a job of one, so that model, optimizer and sampler are built as
anywhere. Then it tells its sponsor that it is ready, waits to be called in, pulls the state, and goes on as a member.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic.sponsor import versions
from chaos_mpi.errors import JoinError, PeerFailedError, WaitTimeoutError
from chaos_mpi.mpi import growth
from chaos_mpi.mpi.channel import Channel
from chaos_mpi.replication.layout import Layout
from chaos_mpi.replication.puller import SHARD_SIZES, StatePuller
from chaos_mpi.replication.tree import Packed, pack, unpack
from chaos_mpi.sharding import Neighbour, plan

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.elastic.state import TrainingState
    from chaos_mpi.mpi.growth import Bridge
    from chaos_mpi.mpi.world import World

log = logging.getLogger("chaos_mpi.elastic")

#: What is assumed of a link of which nothing is known, bytes per second. Only the ratio between links matters.
UNKNOWN_LINK_BYTES_PER_S = 1e9
#: What asking for one shard costs, about, on loopback.
SHARD_COST_S = 1e-4
_POLL_S = 0.002


@dataclass(slots=True)
class Arrival:
    """How a newcomer came in, for the event log.

    Attributes:
        id: of the join request.
        asked_at: when it was asked for, Unix seconds.
        parts: seconds spent in each part of the way.
        active_at: when it became a member, on the monotonic clock.
    """

    id: str
    asked_at: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    active_at: float = 0.0


def enter_job(session: Session, bridge: Bridge, state: TrainingState) -> Arrival:
    """Become a member of the running job, with its training state.

    Raises:
        JoinError: the job refused this process, ended meanwhile, or lost all who had the state.
        WaitTimeoutError: a wait reached its limit.
    """
    limit_s = session.settings.join_timeout_s
    try:
        arrival = _register(session, bridge, state, limit_s)
        admission = bridge.receive(limit_s, "the members to take this rank in")
        if "refused" in admission:
            raise JoinError(f"the job refused this rank ({session.member}): {admission['refused']}")
        arrival.asked_at = admission["admit"]["asked_at"]
        arrival.parts.update(admission["admit"]["timing"])
        world = growth.enter(bridge, session.settings.timeout_s)
        for sponsor in admission["admit"]["later"]:
            world = growth.grow(world, None, sponsor, session.settings.timeout_s)
    except PeerFailedError as error:
        raise JoinError(
            f"this rank ({session.member}) was to join a job that ended, or has no use for it any more ({error})"
        ) from error
    _take_state(session, world, state, arrival)
    arrival.active_at = time.monotonic()
    return arrival


def _register(session: Session, bridge: Bridge, state: TrainingState, limit_s: float) -> Arrival:
    welcome = bridge.receive(limit_s, "the word of the member that started this rank")
    bridge.send(
        {
            "member": session.member,
            "host": session.host,
            "versions": versions(),
            "signature": state.signature(),
        }
    )
    return Arrival(str(welcome["welcome"]))


def _take_state(session: Session, world: World, state: TrainingState, arrival: Arrival) -> None:
    """Pull the state, check it, take it over, and be counted."""
    channel = Channel(world)
    invitation = _invitation(channel, world, session.settings.timeout_s)
    members: list[str] = invitation["members"]
    arrival.parts["grow_s"] = invitation["grow_s"]
    layout = Layout.from_json(invitation["layout"])
    live = pack({"state": state.capture()}, clone=False).tensors
    tensors = layout.allocate(live)
    begun = time.monotonic()
    neighbours = {
        rank: Neighbour(name, UNKNOWN_LINK_BYTES_PER_S, shard_cost_s=SHARD_COST_S) for rank, name in enumerate(members)
    }
    planned = plan(layout.total_bytes, list(neighbours.values()), shard_sizes=SHARD_SIZES)
    session.emit("shard_plan", sources=planned.sources(), predicted_s=planned.predicted_s, bound_s=planned.bound_s)
    arrival.parts["scheduling_s"] = time.monotonic() - begun
    puller = StatePuller(
        channel, neighbours, layout, tensors, session.settings.timeout_s,
        lambda got, wanted, rates: _show_progress(members, got, wanted, rates),
    )  # fmt: skip
    everything = [(0, layout.total_bytes)] if layout.total_bytes else []
    fetched = puller.fetch(everything)
    arrival.parts["transfer_s"] = fetched.seconds
    again = puller.verify(everything)
    sources = {members[rank]: nbytes for rank, nbytes in fetched.sources.items()}
    session.emit(
        "shards_received", sources=sources, seconds=round(fetched.seconds, 6), moved=fetched.moved_shards, again=again
    )
    begun = time.monotonic()
    _restore(session, state, invitation, tensors)
    for rank in puller.alive:
        with contextlib.suppress(PeerFailedError):
            channel.send(rank, {"received": True})
    arrival.parts["restore_s"] = time.monotonic() - begun
    if not world.agree(True, session.settings.timeout_s, lambda: "all members and newcomers to be ready"):
        raise JoinError(f"the members did not take this rank ({session.member}) in; see their log")
    session.enter_view(world, invitation)


def _restore(
    session: Session, state: TrainingState, invitation: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    tree = unpack(Packed(invitation["skeleton"], tensors))
    state.restore(tree["state"])
    handed: Sequence[Any] = tree["samplers"]
    if len(handed) != len(session.samplers):
        raise JoinError(f"the others have {len(handed)} samplers, this rank has {len(session.samplers)}")
    for sampler, part in zip(session.samplers, handed, strict=True):
        sampler.take_over(part)


def _invitation(channel: Channel, world: World, limit_s: float) -> dict[str, Any]:
    """What the members say about the job; any of them will do."""
    limit = time.monotonic() + limit_s
    for member in range(world.rank):
        try:
            channel.send(member, {"invitation": True})
            while (answer := channel.poll(member)) is None or "layout" not in answer:
                if time.monotonic() > limit:
                    raise WaitTimeoutError(f"waited {limit_s:.0f} s for the members to say what the state consists of")
                time.sleep(_POLL_S)
        except PeerFailedError:
            continue
        return answer
    raise JoinError("all members died before this rank had joined")


def _show_progress(members: Sequence[str], got: int, wanted: int, rates: dict[int, float]) -> None:
    total = sum(rates.values())
    left = f", {(wanted - got) / total:.0f} s left" if total else ""
    parts = ", ".join(f"{members[rank]} {rate / 1e6:.0f}" for rank, rate in sorted(rates.items()))
    log.warning("%.0f of %.0f MB of training state%s (MB/s: %s)", got / 1e6, wanted / 1e6, left, parts)
