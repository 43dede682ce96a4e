"""Taking newcomers in, seen from the members: they are invited, served with the state, and counted from then on.

The members wait at a step boundary while the state moves, so that it is the same at all of them, and every one can
serve any part of it. Newcomers ask; see :mod:`chaos_mpi.replication.source` for what they may ask for.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chaos_mpi.errors import PeerFailedError, WaitTimeoutError
from chaos_mpi.mpi.channel import Channel
from chaos_mpi.replication.layout import Layout, dense
from chaos_mpi.replication.source import StateSource

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.elastic.transitions import Admit
    from chaos_mpi.membership import Join
    from chaos_mpi.mpi.growth import Bridge

log = logging.getLogger("chaos_mpi.elastic")


def invite(bridge: Bridge, later: Sequence[int], timing: dict[str, float], asked_at: float) -> None:
    """Tell a newcomer to come in now.

    Args:
        bridge: reaches it.
        later: ranks of the sponsors of those that are taken in after it, in which it takes part.
        timing: what the members have measured of its way here, seconds.
        asked_at: when it was asked for, Unix seconds.
    """
    with contextlib.suppress(PeerFailedError):  # its death shows when it is taken in
        bridge.send({"admit": {"later": list(later), "timing": timing, "asked_at": asked_at}})


def replicate(session: Session, operation: Admit, joins: Sequence[Join], begun: float) -> bool:
    """Give the newcomers the state, and go on together with them.

    Args:
        session: this member's part in the job.
        operation: what connected the newcomers.
        joins: they, in the order of their ranks.
        begun: when the members stopped for it, on the performance counter.

    Returns:
        Whether all members and newcomers are in one view now; the same everywhere.
    """
    world, view = operation.world, operation.view
    assert world is not None
    assert view is not None
    newcomers = [join.newcomer for join in joins]
    guests = range(view.size, world.size)
    packed = session.pack_for_newcomers()
    tensors = {name: dense(tensor) for name, tensor in packed.tensors.items()}
    layout = Layout.of(tensors)
    session.emit("join_cut", newcomers=newcomers, state_bytes=layout.total_bytes)
    invitation: dict[str, Any] = {
        "policy": "blocking",
        "sources": list(range(view.size)),
        "shrink": False,
        "layout": layout.to_json(),
        "skeleton": packed.skeleton,
        "members": list(view.members),
        "newcomers": newcomers,
        "reports": operation.reports,
        "grow_s": time.perf_counter() - begun,
        **session.situation(),
    }
    source = StateSource(Channel(world), guests, layout, tensors, invitation)
    ready = True
    try:
        source.serve(session.settings.timeout_s, lambda: f"{', '.join(newcomers)} to take the state")
    except WaitTimeoutError as error:
        log.error("%s; it is left out", error)
        ready = False
    if not world.agree(ready, session.settings.timeout_s, lambda: "all members and newcomers to be ready"):
        world.revoke()
        session.retire(world)
        return False
    session.change_view(world, [*view.members, *newcomers], operation.reports, cause="join")
    seconds = time.perf_counter() - begun
    session.emit("stalled", seconds=round(seconds, 6), cause="join")
    if session.rank == 0:
        log.warning(
            "step %d: %s joined with %.1f MB of state; %d ranks train on after %.0f ms",
            session.step, ", ".join(newcomers), layout.total_bytes / 1e6, session.size, seconds * 1e3,
        )  # fmt: skip
    return True
