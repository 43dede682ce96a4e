"""Taking newcomers in, seen from the members: they are invited, served with the state, and counted from then on.

The members wait at a step boundary while the state moves, so that it is the same at all of them, and every one can
serve any part of it. Newcomers ask; see :mod:`chaos_mpi.replication.source` for what they may ask for.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from chaos_mpi.elastic.sponsor import ANSWER_LIMIT_S
from chaos_mpi.errors import PeerFailedError, WaitTimeoutError
from chaos_mpi.mpi.channel import Channel
from chaos_mpi.replication.devices import OnHost
from chaos_mpi.replication.layout import Layout, dense
from chaos_mpi.replication.source import StateSource

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.elastic.transitions import Admit
    from chaos_mpi.membership import Join, View
    from chaos_mpi.mpi.growth import Bridge
    from chaos_mpi.mpi.world import World

log = logging.getLogger("chaos_mpi.elastic")


def invite(bridge: Bridge, later: Sequence[int], timing: dict[str, float], waited_s: float) -> None:
    """Tell a newcomer to come in now.

    Args:
        bridge: reaches it.
        later: ranks of the sponsors of those that are taken in after it, in which it takes part.
        timing: what the members have measured of its way here, seconds.
        waited_s: how long ago it was asked for, seconds; its clock may be another one.
    """
    with contextlib.suppress(PeerFailedError):  # its death shows when it is taken in
        bridge.send({"admit": {"later": list(later), "timing": timing, "waited_s": waited_s}})


@dataclass(frozen=True, slots=True)
class LiveState:
    """The training state between two steps, and where the samplers are, as newcomers are to get it.

    Attributes:
        layout, tensors: of the state; the tensors are the live ones, or those of a GPU copied from there.
        skeleton: see :class:`~chaos_mpi.replication.tree.Packed`.
    """

    layout: Layout
    tensors: Mapping[str, torch.Tensor]
    skeleton: str

    @classmethod
    def of(cls, session: Session, others: Mapping[str, torch.Tensor]) -> Self:
        """That of this member, but for ``others``, see :func:`~chaos_mpi.elastic.alike.tensors_of_rank_0`."""
        packed = session.pack_for_newcomers()
        tensors = {name: dense(tensor) for name, tensor in {**packed.tensors, **others}.items()}
        return cls(Layout.of(tensors), OnHost(tensors), packed.skeleton)


def replicate(session: Session, operation: Admit, joins: Sequence[Join], state: LiveState, begun: float) -> bool:
    """Give the newcomers the state, and go on together with them.

    Args:
        session: this member's part in the job.
        operation: what connected the newcomers.
        joins: they, in the order of their ranks.
        state: what they get.
        begun: when the members stopped for it, on the performance counter.

    Returns:
        Whether all members and newcomers are in one view now; the same everywhere.
    """
    world, view = operation.world, operation.view
    assert world is not None
    assert view is not None
    newcomers = [join.newcomer for join in joins]
    session.emit("join_cut", newcomers=newcomers, state_bytes=state.layout.total_bytes)
    invitation: dict[str, Any] = {
        "policy": "blocking",
        "sources": list(range(view.size)),
        "shrink": False,
        "layout": state.layout.to_json(),
        "skeleton": state.skeleton,
        "members": list(view.members),
        "newcomers": newcomers,
        "reports": operation.reports,
        "grow_s": time.perf_counter() - begun,
        **session.situation(),
    }
    source = StateSource(Channel(world), range(view.size, world.size), state.layout, state.tensors, invitation)
    ready = serve(session, source, newcomers)
    moved = f"{state.layout.total_bytes / 1e6:.1f} MB of state"
    return go_on_together(session, world, view, newcomers, operation.reports, ready, moved, begun)


def serve(session: Session, source: StateSource, newcomers: Sequence[str], lost: Collection[int] = frozenset()) -> bool:
    """Give newcomers what they ask for, until they have all, and tell them whether all of them came to that, in time.

    With one that is known to be dead no view is begun, and those that came with it are started again: what is sent to
    it then, and has not left this host when its connection is closed, ends this process ("Send error after request
    freed", Open MPI 5.0). A newcomer that hangs must not keep the members from going on: they agree among themselves.

    Args:
        session: this member's part in the job.
        source: serves them.
        newcomers: they.
        lost: ranks of others that came with them, and that all members know to be dead.

    Returns:
        Whether the members are ready to go on together with the newcomers; the same at all of them.
    """
    try:
        source.serve(session.settings.guest_limit_s, lambda: f"{', '.join(newcomers)} to take the state")
        source.confirm(ANSWER_LIMIT_S, lambda: f"{', '.join(newcomers)} to say that they are still there")
    except WaitTimeoutError as error:
        log.error("%s; it is left out", error)
        complete = False
    else:
        complete = bool(newcomers) and source.lost <= set(lost)
    complete = session.agree(complete)
    source.conclude(complete)
    return complete


def go_on_together(
    session: Session,
    world: World,
    view: View,
    newcomers: Sequence[str],
    reports: list[Any],
    ready: bool,
    moved: str,
    begun: float,
) -> bool:
    """Agree with the newcomers, which are in ``world`` as well, on one view, and go on in it.

    Args:
        session: this member's part in the job.
        world: members and newcomers, in this order.
        view: the members.
        newcomers: the others.
        reports: of the members' samplers, in rank order.
        ready: what :func:`serve` returned.
        moved: what the newcomers got, in words.
        begun: when the members stopped for it, on the performance counter.

    Returns:
        Whether all are in one view now; the same everywhere. If not, ``world`` is of no more use.
    """
    whole = world.size == view.size + len(newcomers)
    try:
        together = ready and world.agree(whole, session.settings.timeout_s, lambda: "all to be ready")
    except WaitTimeoutError as error:
        session.give_up(error)
    if not together:
        world.revoke()
        session.retire(world)
        return False
    session.change_view(world, [*view.members, *newcomers], reports, cause="join")
    seconds = time.perf_counter() - begun
    session.emit("stalled", seconds=round(seconds, 6), cause="join")
    if session.rank == 0:
        log.warning(
            "step %d: %s joined with %s; %d ranks train on after %.0f ms",
            session.step, ", ".join(newcomers), moved, session.size, seconds * 1e3,
        )  # fmt: skip
    return True
