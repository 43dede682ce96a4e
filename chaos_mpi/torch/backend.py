"""The backend ``chaos`` of ``torch.distributed``: registered by ``import chaos_mpi.torch``.

``torch.distributed.init_process_group("chaos")`` needs nothing more under ``chaosrun`` or ``mpirun``: ranks and their
number are those of MPI, and the store that torch wants is set up here. ``RANK`` and ``WORLD_SIZE``, if they are set, or
given as arguments, have to agree with MPI's. ``MASTER_ADDR`` and ``MASTER_PORT`` are not needed, and not used.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlparse

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Store
from torch.distributed.rendezvous import _rendezvous_handlers, register_rendezvous_handler

from chaos_mpi.errors import ConfigError
from chaos_mpi.membership import on_host
from chaos_mpi.torch.callers import asks_for
from chaos_mpi.torch.store import shared_store

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session
    from chaos_mpi.torch.process_group import ChaosProcessGroup

NAME = "chaos"
#: Whether the open session was opened by init_process_group, which then closes it with the default group.
_owned = False
#: Rank and number of ranks as torch was last told them.
_told = (-1, -1)


def register() -> None:
    """Make the backend, and the ways to initialise it, known to torch. Once per process."""
    if NAME in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
    register_rendezvous_handler(NAME, _rendezvous)  # type: ignore[no-untyped-call]
    # The way that init_process_group takes when it is told nothing. Torch's own handler needs MASTER_ADDR and three
    # more variables; where they are missing, under mpirun, the ranks find each other by MPI. With this backend they do
    # in any case: what the script has set, as many do, was true of the ranks that the job was started with at best.
    by_environment = _rendezvous_handlers["env"]

    def handler(url: str, **options: Any) -> Any:
        started_alone = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
        without = "MASTER_ADDR" not in os.environ and ("OMPI_COMM_WORLD_SIZE" in os.environ or started_alone)
        ours = without or asks_for(NAME)
        return (_rendezvous if ours else by_environment)(url, **options)

    _rendezvous_handlers["env"] = handler


def _rendezvous(url: str, timeout: timedelta | None = None, **_: Any) -> Iterator[tuple[Store, int, int]]:
    global _told
    session = _open_session(timeout)
    query = parse_qs(urlparse(url).query)
    rank = int(query.get("rank", [os.environ.get("RANK", "-1")])[0])
    size = int(query.get("world_size", [os.environ.get("WORLD_SIZE", "-1")])[0])
    _refuse_contradiction(session, rank, size)
    store = shared_store(session)
    _set_local_variables(session)
    _told = session.rank, session.size
    yield store, *_told
    raise RuntimeError("the ranks of MPI cannot be initialised again: start the job anew")


def _set_local_variables(session: Session) -> None:
    """What torchrun sets, for scripts that ask for it; not from MPI's, to which all ranks are on the launch host."""
    os.environ.setdefault("LOCAL_RANK", str(session.local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(len(on_host(session.members, session.host))))


def _create(options: Any, _: Any) -> ChaosProcessGroup:
    """What torch calls for every group that this process is in."""
    global _owned
    from chaos_mpi.torch.carriers import SessionCarrier, subgroup
    from chaos_mpi.torch.process_group import ChaosProcessGroup

    session = _open_session(options.timeout)
    timeout = options.timeout
    if timeout == dist.default_pg_timeout:  # half an hour, which nobody has chosen
        timeout = timedelta(seconds=session.settings.timeout_s)
    ranks = list(options.global_ranks_in_group)
    if ranks:
        # And not from the group's name, in which torch counts groups: a rank that joined has not made the earlier ones.
        number = zlib.crc32(repr(ranks).encode())
        return ChaosProcessGroup(subgroup(session, ranks, number, timeout.total_seconds()), timeout)
    if (options.group_rank, options.group_size) != _told:  # as told before a rank died, perhaps
        _refuse_contradiction(session, options.group_rank, options.group_size)
    owned, _owned = _owned, False
    return ChaosProcessGroup(SessionCarrier(session, owned), timeout)


def _open_session(timeout: timedelta | None) -> Session:
    """The user's session, else one that is opened now, with the settings of the launcher."""
    global _owned
    import chaos_mpi
    from chaos_mpi.elastic.current import current_session_or_none

    session = current_session_or_none()
    if session is None:
        chosen = timeout is not None and timeout != dist.default_pg_timeout
        session = chaos_mpi.init(timeout_s=timeout.total_seconds() if chosen and timeout is not None else None)
        _owned = True
    return session


def _refuse_contradiction(session: Session, rank: int, size: int) -> None:
    if session.is_newcomer:  # it was started by MPI, with the environment of another rank
        return
    if rank not in (-1, session.rank) or size not in (-1, session.size):
        raise ConfigError(
            f"this process is rank {session.rank} of {session.size} in MPI, and was told to be rank {rank} of {size} "
            "(arguments of init_process_group, or RANK and WORLD_SIZE). Leave both out: they are those of MPI. With "
            "torchrun, start the script with 'chaosrun -n N script.py' instead"
        )


def monitored_barrier(
    group: object = None, timeout: timedelta | float | None = None, wait_all_ranks: bool = False
) -> None:
    """A barrier that tells who did not come, as torch's, which takes groups of the backend ``gloo`` only.

    Args:
        group: default: the default group. Ranks that are not in it are not waited for, and return at once.
        timeout: longest wait, or its seconds; default: the group's.
        wait_all_ranks: name all ranks that did not come, and not only the first.

    Raises:
        ConfigError: the group is of another backend.
        WaitTimeoutError: at rank 0: ranks did not come; at the others: rank 0 did not answer.
        GroupBrokenError: a rank has died.
    """
    from chaos_mpi.torch.process_group import ChaosProcessGroup

    if group is not None and not isinstance(group, ProcessGroup):  # torch's mark of a rank that is not in it
        return
    chosen: Any = group if group is not None else dist.group.WORLD
    if not isinstance(chosen, ChaosProcessGroup):
        raise ConfigError("chaos_mpi.torch.monitored_barrier takes groups of the backend 'chaos'")
    limit = timedelta(seconds=timeout) if isinstance(timeout, int | float) else timeout
    chosen.monitored_barrier(limit, wait_all_ranks)
