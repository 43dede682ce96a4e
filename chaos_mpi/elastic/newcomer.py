"""The way of a process that was started to join a running job, from its own side.

Until its script makes the ``TrainingState`` it is a job of one, so that model, optimizer and sampler are built as
anywhere. Then it tells its sponsor that it is ready, waits to be called in, pulls the state, and goes on as a member.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from chaos_mpi.elastic.arrival import (
    Arrival,
    ask_invitation,
    await_word,
    known_rates,
    neighbours,
    restore,
    show_progress,
)
from chaos_mpi.elastic.catchup import CaughtUp, catch_up, not_repeated
from chaos_mpi.elastic.sponsor import versions
from chaos_mpi.errors import JoinError, PeerFailedError
from chaos_mpi.mpi import growth
from chaos_mpi.mpi.channel import Channel
from chaos_mpi.replication.layout import Layout
from chaos_mpi.replication.puller import SHARD_SIZES, StatePuller
from chaos_mpi.replication.tree import pack
from chaos_mpi.sharding import plan
from chaos_mpi.sharding.plan import size

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.elastic.state import TrainingState
    from chaos_mpi.mpi.growth import Bridge
    from chaos_mpi.mpi.world import World

log = logging.getLogger("chaos_mpi.elastic")


def enter_job(session: Session, bridge: Bridge, state: TrainingState) -> Arrival:
    """Become a member of the running job, with its training state.

    Raises:
        JoinError: the job refused this process, ended meanwhile, or lost all who had the state.
        WaitTimeoutError: a wait reached its limit.
    """
    limit_s = session.settings.join_timeout_s
    try:
        arrival = _register(session, bridge, state, limit_s)
        admission = _await_call(bridge, limit_s)
        if "refused" in admission:
            raise JoinError(f"the job refused this rank ({session.member}): {admission['refused']}")
        arrival.asked_at = time.monotonic() - admission["admit"]["waited_s"]
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


def _await_call(bridge: Bridge, limit_s: float) -> dict[str, Any]:
    """What the sponsor says when this rank's turn has come; until then it asks whether this rank is still there."""
    while "wait" in (message := bridge.receive(limit_s, "the members to take this rank in")):
        bridge.send({"here": True})
    return message


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
    """Get the state, check it, take it over, and be counted."""
    limit_s = session.settings.timeout_s
    channel = Channel(world)
    invitation = ask_invitation(channel, range(world.rank), limit_s)
    arrival.parts["grow_s"] = invitation["grow_s"]
    caught_up = None
    if invitation["policy"] == "overlap":
        caught_up = catch_up(session, channel, state, invitation, arrival)
        invitation = caught_up.invitation
    begun, before = time.monotonic(), arrival.parts.get("transfer_s", 0.0)
    sources = _pull(session, channel, state, invitation, caught_up, arrival)
    for rank in sources:
        with contextlib.suppress(PeerFailedError):
            channel.send(rank, {"received": True})
    refused = JoinError(f"the members did not take this rank ({session.member}) in; see their log")
    if not await_word(channel, sources, "complete", limit_s, "the members to be done with all newcomers"):
        raise refused
    if invitation["shrink"]:
        world = world.shrink(limit_s, lambda: "the members to go on without those that died")
    agreed = world.agree(
        world.size == len(invitation["members"]) + len(invitation["newcomers"]),
        limit_s,
        lambda: "all members and newcomers to be ready",
    )
    if not agreed:
        raise refused
    elsewhere = arrival.parts["transfer_s"] - before
    arrival.parts["regroup_s" if caught_up else "restore_s"] = time.monotonic() - begun - elsewhere
    session.enter_view(world, invitation)


def _pull(
    session: Session, channel: Channel, state: TrainingState, invitation: dict[str, Any],
    caught_up: CaughtUp | None, arrival: Arrival,
) -> list[int]:  # fmt: skip
    """Fetch from members that have stopped what is lacking, and check all. Returns the members that are alive."""
    names = dict(zip(invitation["sources"], invitation["members"], strict=True))
    if caught_up is not None:
        rates = caught_up.rates
    else:
        links = session.agent.about_hosts()[0] if session.agent is not None else []
        rates = known_rates(links, session.host, names)
    serving = neighbours(names, rates)
    layout = Layout.from_json(invitation["layout"])
    live = pack({"state": state.capture()}, clone=False).tensors
    has_repeated = caught_up is not None and caught_up.repeated
    tensors = layout.allocate(live, with_values=has_repeated)
    puller = StatePuller(channel, serving, layout, tensors, session.settings.timeout_s, show_progress(session, names))
    lacking = [(0, layout.total_bytes)] if layout.total_bytes else []
    if has_repeated:
        lacking, there = not_repeated(layout, live, state.optimizers())
        if other := puller.differing(there):
            log.warning(
                "%.1f MB of the state have changed in other ways than by optimizer steps; the members wait for them",
                size(other) / 1e6,
            )
        lacking += other
    else:
        begun = time.monotonic()
        planned = plan(layout.total_bytes, list(serving.values()), shard_sizes=SHARD_SIZES)
        session.emit("shard_plan", sources=planned.sources(), predicted_s=planned.predicted_s, bound_s=planned.bound_s)
        arrival.parts["scheduling_s"] = time.monotonic() - begun
    fetched = puller.fetch(lacking)
    again = puller.verify(lacking)
    sources = {names[rank]: nbytes for rank, nbytes in fetched.sources.items()}
    session.emit(
        "shards_received", sources=sources, seconds=round(fetched.seconds, 6), moved=fetched.moved_shards, again=again
    )
    arrival.parts["transfer_s"] = arrival.parts.get("transfer_s", 0.0) + fetched.seconds
    restore(session, state, invitation, tensors)
    return puller.alive
