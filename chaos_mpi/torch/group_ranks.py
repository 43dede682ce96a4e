"""Keeps torch's table of who is who in each process group: global ranks change when members come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import _world

from chaos_mpi.torch.process_group import ChaosProcessGroup

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.mpi.world import World


class GroupRanks:
    """A :class:`~chaos_mpi.elastic.changes.Companion` of the session.

    Torch notes the global rank of each rank of a group when the group is made, and answers by it ever after
    (``get_rank(group)``, ``get_group_rank``, the peers of messages).
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def enter_view(self, world: World) -> None:
        """Note who has which global rank now. A member that is gone has a negative one."""
        ranks = {member: rank for rank, member in enumerate(self._session.members)}
        for group in list(_world.pg_group_ranks):
            if isinstance(group, ChaosProcessGroup):
                _world.pg_group_ranks[group] = {
                    ranks.get(member, -1 - index): index for index, member in enumerate(group.members)
                }

    def end(self, world: World) -> None:
        """Nothing is left to do."""
