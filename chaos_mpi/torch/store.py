"""The store that ``torch.distributed`` wants: rank 0 serves it, and all ranks connect with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import HashStore, Store, TCPStore

from chaos_mpi.agent.contacts import nearest, own_interfaces, select
from chaos_mpi.errors import ConfigError

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session

_LOOPBACK = "127.0.0.1"
#: The interfaces or networks that the job keeps to (``chaosrun --network``; Open MPI, ``btl_tcp_if_include``).
_NETWORK = "OMPI_MCA_btl_tcp_if_include"
#: Longest wait for an answer from one address, seconds; then for the store. How long its calls may take, torch sets.
_TRY_S = 5.0
_CONNECT = timedelta(seconds=30)


def shared_store(session: Session) -> Store:
    """A store that all ranks share; called by all of them. On loopback if all ranks are on one host.

    Raises:
        ConfigError: a rank cannot reach rank 0; at every rank, and says which.
    """
    while session.size > 1:
        members = session.members
        alone = len(set(session.gather(session.host))) == 1
        store: Store | None = None
        where: dict[str, Any] = {}
        problem = ""
        try:
            if session.rank == 0:
                store, where = serve(alone)
        except (ConfigError, OSError, RuntimeError) as error:
            problem = f"rank 0 ({session.host}): {error}"
        where = session.gather(where)[0]
        try:
            if store is None and where:
                store = connect(where)
        except (OSError, RuntimeError, ValueError) as error:
            problem = f"rank {session.rank} ({session.host}): {error}"
        answers = session.gather([store is not None, problem])
        if store is not None and all(reached for reached, _ in answers):
            return store
        if problems := [problem for _, problem in answers if problem and session.members == members]:
            raise ConfigError(
                f"rank 0 ({members[0]}) cannot serve torch's store to all ranks: {'; '.join(problems)}. If hosts have "
                "several networks, name the one to use with --network"
            )
    return HashStore()


def serve(alone: bool) -> tuple[Store, dict[str, Any]]:
    """Rank 0's store, and where the others find it: ``addresses`` and ``port``.

    Args:
        alone: whether all ranks are on this host.

    Raises:
        ConfigError: no address of this host is in the network to use.
    """
    network = os.environ.get(_NETWORK)
    addresses = [_LOOPBACK] if alone else _in_order(select(own_interfaces(), network))
    own = addresses[0] if alone or network else ""
    family = socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET
    listener = socket.create_server((own, 0), family=family)
    port = listener.getsockname()[1]
    own = own or ("::1" if family == socket.AF_INET6 else _LOOPBACK)
    store = TCPStore(own, port, None, True, _CONNECT, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, {"addresses": addresses if not (alone or network) else addresses[:1], "port": port}


def connect(where: Mapping[str, Any]) -> Store:
    """The store of another rank, at the address in a network of this host first.

    Raises:
        OSError: no address answers.
        RuntimeError: what answers is no store.
    """
    addresses, port = list(where["addresses"]), int(where["port"])
    first = nearest(addresses, select(own_interfaces()), same_machine=addresses == [_LOOPBACK])
    failures = []
    for address in dict.fromkeys([first, *addresses]):
        try:
            socket.create_connection((address, port), _TRY_S).close()
        except OSError as error:
            failures.append(f"{address}, port {port}: {error.strerror or error}")
            continue
        return TCPStore(address, port, None, False, _CONNECT, wait_for_workers=False)
    raise OSError(f"no answer from {'; '.join(failures)}")


def _in_order(interfaces: Sequence[Any]) -> list[str]:
    """Their addresses, of one kind: IPv4 if there is any."""
    kinds = {interface.version for interface in interfaces}
    return [str(interface.ip) for interface in interfaces if interface.version == min(kinds)]
