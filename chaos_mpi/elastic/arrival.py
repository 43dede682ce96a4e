"""What both ways of taking the state have in common at the newcomer: sources, progress, and taking it over."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median_high
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic.lifecycle import write_record
from chaos_mpi.elastic.transfer import TRANSFER, Transfer
from chaos_mpi.errors import JoinError, PeerFailedError, WaitTimeoutError
from chaos_mpi.membership import host_of
from chaos_mpi.monitor.hostlinks import CUT, DOWN
from chaos_mpi.mpi.channel import Channel
from chaos_mpi.replication.tree import Packed, unpack
from chaos_mpi.sharding import Neighbour

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.elastic.state import TrainingState

log = logging.getLogger("chaos_mpi.elastic")

#: What is assumed of a link of which nothing is known, bytes per second. Only the ratio between links matters.
UNKNOWN_LINK_BYTES_PER_S = 1e9
#: And of one that is cut, with no way round.
UNUSABLE_LINK_BYTES_PER_S = 1.0
#: What asking for one shard costs, about, on loopback.
SHARD_COST_S = 1e-4
POLL_S = 0.002
#: Members that have stopped say what is next at once.
_SPIN_S = 0.02


@dataclass(slots=True)
class Arrival:
    """How a newcomer came in, for the event log.

    Attributes:
        id: of the join request.
        asked_at: when it was asked for, on the monotonic clock.
        parts: seconds spent in each part of the way.
        active_at: when it became a member, on the monotonic clock.
        repeated_steps: steps of the members that it has repeated to catch up.
    """

    id: str
    asked_at: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    active_at: float = 0.0
    repeated_steps: int = 0


def neighbours(names: Mapping[int, str], rates: Mapping[int, float]) -> dict[int, Neighbour]:
    """The members that serve, by rank; ``rates`` of links in bytes per second, where they are known."""
    return {
        rank: Neighbour(name, rates.get(rank, UNKNOWN_LINK_BYTES_PER_S), shard_cost_s=SHARD_COST_S)
        for rank, name in names.items()
    }


def known_rates(links: Sequence[Mapping[str, Any]], host: str, names: Mapping[int, str]) -> dict[int, float]:
    """How fast members can be expected to send to a host, by what the cluster monitor knows. Pure.

    Args:
        links: see :meth:`chaos_mpi.monitor.linktable.LinkTable.rows`.
        host: that of the newcomer.
        names: of the members, by rank.

    Returns:
        Bytes per second by rank; empty where nothing is known. A link that is not known counts as one of the middle of
        those that are; one that cannot be used as next to nothing.
    """
    known: dict[int, float] = {}
    for rank, name in names.items():
        ends = {host_of(name), host}
        row = next((row for row in links if {row["a"], row["b"]} == ends), None)
        if row is not None and row["state"] in (CUT, DOWN):
            known[rank] = UNUSABLE_LINK_BYTES_PER_S
        elif row is not None and row["bytes_per_s"]:
            known[rank] = float(row["bytes_per_s"])
    usable = [rate for rate in known.values() if rate > UNUSABLE_LINK_BYTES_PER_S]
    usual = median_high(usable) if usable else UNKNOWN_LINK_BYTES_PER_S
    return {rank: known.get(rank, usual) for rank in names} if known else {}


def ask_invitation(channel: Channel, members: Sequence[int], limit_s: float) -> dict[str, Any]:
    """What the members say about the job; any of them will do.

    Raises:
        JoinError: all are dead.
        WaitTimeoutError: the one that was asked did not answer within ``limit_s`` seconds.
    """
    limit = time.monotonic() + limit_s
    for member in members:
        try:
            channel.send(member, {"invitation": True})
            while (answer := channel.poll(member)) is None or "layout" not in answer:
                if time.monotonic() > limit:
                    raise WaitTimeoutError(f"waited {limit_s:.0f} s for the members to say what the state consists of")
                time.sleep(POLL_S if answer is None else 0)
        except PeerFailedError:
            continue
        return answer
    raise JoinError("all members died, or ended the job, before this rank had joined")


def await_word(channel: Channel, members: Sequence[int], word: str, limit_s: float, what: str) -> Any:
    """What the first member says that says this word; None if all of them died, or gave this rank up.

    Who asks whether this rank is still there is answered.

    Args:
        channel: reaches them.
        members: their ranks.
        word: the key of the message.
        limit_s: how long to wait.
        what: for people.

    Raises:
        WaitTimeoutError: nothing was said within ``limit_s`` seconds.
    """
    begun = time.monotonic()
    gone: set[int] = set()
    while living := [rank for rank in members if rank not in gone]:
        for rank in living:
            try:
                message = channel.poll(rank)
            except PeerFailedError:
                gone.add(rank)
                continue
            if message is not None and word in message:
                return message[word]
            if message is not None and "there" in message:
                with contextlib.suppress(PeerFailedError):
                    channel.send(rank, {"here": True})
        waited = time.monotonic() - begun
        if waited > limit_s:
            raise WaitTimeoutError(f"waited {limit_s:.0f} s for {what}")
        if waited > _SPIN_S:
            time.sleep(POLL_S)
        else:
            os.sched_yield()
    return None


def restore(
    session: Session, state: TrainingState, invitation: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Take the state over, and the place in the epoch. The tensors belong to the state from then on.

    Raises:
        JoinError: the members have other samplers than this rank.
        CheckpointError: the state does not fit.
    """
    tree = unpack(Packed(invitation["skeleton"], tensors))
    state.restore(tree["state"], owned=True)
    handed: Sequence[Any] = tree["samplers"]
    if len(handed) != len(session.samplers):
        raise JoinError(
            f"the others have {len(handed)} samplers, this rank has {len(session.samplers)}: make all of them "
            "before the TrainingState, once for all epochs"
        )
    for sampler, part in zip(session.samplers, handed, strict=True):
        sampler.take_over(part)
    session.take_rng(tree["rng"])


def show_progress(session: Session, names: Mapping[int, str]) -> Callable[[int, int, dict[int, float]], None]:
    """What tells people how far the transfer is, given bytes received, bytes wanted, and each source's rate.

    It is logged, and written down where members that are asked for the job's status find it.
    """

    def show(got: int, wanted: int, rates: dict[int, float]) -> None:
        total = sum(rates.values())
        left_s = (wanted - got) / total if total else None
        left = "" if left_s is None else f", {left_s:.0f} s left"
        parts = ", ".join(f"{names[rank]} {rate / 1e6:.0f}" for rank, rate in sorted(rates.items()))
        log.warning("%.0f of %.0f MB of training state%s (MB/s: %s)", got / 1e6, wanted / 1e6, left, parts)
        of_sources = {names[rank]: rate for rank, rate in sorted(rates.items())}
        transfer = Transfer(session.member, got, wanted, of_sources, left_s, time.time())
        write_record(session.settings.run_dir, TRANSFER, asdict(transfer))

    return show
