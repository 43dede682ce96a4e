"""The environment of a rank that runs on another host than ``mpirun``. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from chaos_mpi.errors import EngineError
from chaos_mpi.mpi.launch import TCP_FLAGS

#: What a rank on another host gets from ``mpirun``'s side: what MPI and this package are told, and nothing personal.
CARRIED_PREFIXES = ("PMIX_", "OMPI_", "PRTE_", "OPAL_", "CHAOS_")
CARRIED_NAMES = frozenset({"OMP_NUM_THREADS"})
#: Tells a rank that its number of threads follows from the cores of its host, and is not the user's choice.
THREADS_BY_HOST = "CHAOS_THREADS_BY_HOST"
#: Directories of the launch host. Where MPI needs one on the rank's host, it makes its own.
LEFT_BEHIND = frozenset({"PMIX_SERVER_TMPDIR", "PMIX_SYSTEM_TMPDIR", "OMPI_FILE_LOCATION", "PRTE_MCA_prte_tmpdir_base"})

#: The directory that ``mpirun`` makes for the time that it runs.
SESSION_DIRECTORY = "PMIX_SERVER_TMPDIR"

#: For a job over several hosts, in ``mpirun``'s own environment. PMIx hands data out in shared memory otherwise, and
#: ``mpirun`` crashes on the next spawn when only its clients are told not to.
LAUNCHER_SETTINGS = {"PMIX_MCA_gds": "hash"}

_SERVER_URI = re.compile(r"PMIX_SERVER_URI\d*")
_TCP_URI = re.compile(r"(?P<server>.+);tcp4://(?P<host>[\d.]+):(?P<port>\d{1,5})")


class Endpoint(NamedTuple):
    """A TCP address."""

    host: str
    port: int


def carried(environ: Mapping[str, str], extra: Collection[str] = ()) -> dict[str, str]:
    """The variables that a rank on another host is to have.

    Args:
        environ: those that ``mpirun`` gave.
        extra: names of further ones.
    """
    return {
        name: value
        for name, value in environ.items()
        if (name.startswith(CARRIED_PREFIXES) or name in CARRIED_NAMES or name in extra) and name not in LEFT_BEHIND
    }


def server_endpoint(environ: Mapping[str, str]) -> Endpoint | None:
    """Where the PMIx server listens that a rank with this environment connects to; None: there is none.

    Raises:
        EngineError: the address cannot be understood, or there are several.
    """
    found = {_parse(name, value) for name, value in environ.items() if _SERVER_URI.fullmatch(name)}
    if len(found) > 1:
        raise EngineError(f"the environment names several PMIx servers: {sorted(found)}")
    return found.pop() if found else None


def through_relay(environ: Mapping[str, str], relay: Endpoint) -> dict[str, str]:
    """The environment with the address of the PMIx server replaced by the relay's.

    Raises:
        EngineError: the server's address cannot be understood.
    """
    changed = dict(environ)
    for name, value in environ.items():
        if _SERVER_URI.fullmatch(name):
            _parse(name, value)
            changed[name] = _TCP_URI.sub(rf"\g<server>;tcp4://{relay.host}:{relay.port}", value)
    return changed


def moved(environ: Mapping[str, str], old_prefix: str, new_prefix: str) -> dict[str, str]:
    """The environment with paths below one Python installation replaced by those below another."""
    return {
        name: new_prefix + value.removeprefix(old_prefix)
        if value == old_prefix or value.startswith(old_prefix + "/")
        else value
        for name, value in environ.items()
    }


def host_variables(order: Mapping[str, Any], environ: Mapping[str, str], cores: int) -> dict[str, str]:
    """What a rank is told of the host that it runs on.

    Args:
        order: of the proxy: ``host`` by name, and ``neighbours``, how many ranks are started there together.
        environ: what the rank has so far; its number of threads stays as it is.
        cores: of the host.
    """
    told = {"CHAOS_HOST": str(order["host"])} if order["host"] else {}
    if "OMP_NUM_THREADS" not in environ:
        told["OMP_NUM_THREADS"] = str(max(1, cores // max(1, int(order["neighbours"]))))
        told[THREADS_BY_HOST] = "1"
    return told


def network_settings(networks: str | None) -> dict[str, str]:
    """Open MPI's parameters (by MCA name) for ranks on several hosts.

    To Open MPI all ranks are on the launch host, where the proxies are. So shared memory must not be used. And a rank
    that dies after the loss of ``mpirun`` is only noticed by the end of its TCP connections.

    Args:
        networks: interfaces or networks (``10.1.0.0/16``) to use, separated by commas; None: all but loopback.
    """
    settings = {"btl": "self,tcp", "btl_tcp_flags": TCP_FLAGS}
    if networks is not None:
        settings["btl_tcp_if_include"] = networks
    return settings


def _parse(name: str, value: str) -> Endpoint:
    match = _TCP_URI.fullmatch(value)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise EngineError(f"{name}={value!r} is not an address of a PMIx server over TCP (NAME;tcp4://ADDRESS:PORT)")
    return Endpoint(match["host"], int(match["port"]))
