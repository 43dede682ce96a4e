"""Where a rank runs and how to get there, from the command line of its proxy."""

from __future__ import annotations

import argparse
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chaos_mpi.agent.guard import Settings
from chaos_mpi.agent.ssh import DEFAULT_SSH, remote_command
from chaos_mpi.errors import ConfigError
from chaos_mpi.monitor.cluster import EVEN_SPLITS, Timing

SUPERVISOR_MODULE = "chaos_mpi.agent.supervisor"


@dataclass(frozen=True)
class Placement:
    """Where a rank runs, and how to get there.

    Attributes:
        host: its name as ssh knows it; None: this host.
        remote: whether it is another one than this.
        python: the Python to use there.
        ssh: command that runs another one on a host, with its options.
        directory: working directory of the rank.
        export: further environment variables that the rank is to get.
        log_directory: for its output when the launcher is gone; None: the user's state directory there.
        neighbours: how many ranks are started on that host together.
        watch: how the nodes of the job watch each other; None: they do not.
    """

    host: str | None
    remote: bool
    python: str = sys.executable
    ssh: tuple[str, ...] = DEFAULT_SSH
    directory: str = ""
    export: tuple[str, ...] = ()
    log_directory: str | None = None
    neighbours: int = 1
    watch: Settings | None = None


def supervisor_command(placement: Placement) -> list[str]:
    """The command that runs a supervisor where the rank is to be."""
    argv = [placement.python, "-P", "-m", SUPERVISOR_MODULE]
    return argv if not placement.remote else remote_command(placement.ssh, str(placement.host), argv)


def is_here(host: str) -> bool:
    """Whether this is a name of the machine that this process runs on."""
    name = host.rpartition("@")[2]
    return name in ("localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().partition(".")[0])


def placement_of(options: argparse.Namespace, environ: Mapping[str, str]) -> Placement:
    """Where this rank belongs.

    Raises:
        ConfigError: it is not said.
    """
    hosts = options.hosts.split(",") if options.hosts else []
    host = options.host
    if hosts and host is None:
        rank = int(environ.get("PMIX_RANK", "0"))
        if rank >= len(hosts):
            raise ConfigError(f"--hosts names {len(hosts)} hosts, one for each rank; this is rank {rank}")
        host = hosts[rank]
    remote = bool(host) and not is_here(str(host))
    return Placement(
        host or None,
        remote,
        options.remote_python if remote else sys.executable,
        tuple(shlex.split(options.ssh_command)),
        options.wdir,
        tuple(options.export),
        options.log_dir,
        max(1, hosts.count(host or "")),
        watch_of(options, host or ""),
    )


def watch_of(options: argparse.Namespace, host: str) -> Settings | None:
    """How this rank's agent watches the other nodes; None: not at all.

    Raises:
        ConfigError: a limit is wrong, or it is not said where the contacts of the agents are kept.
    """
    if options.heartbeat_limit is None:
        return None
    if options.register is None:
        raise ConfigError("--heartbeat-limit needs --register, where the agents find each other")
    try:
        timing = Timing.of_limit(options.heartbeat_limit, options.even_split)
    except ValueError as error:
        raise ConfigError(f"--heartbeat-limit: {error}") from error
    return Settings(host, not options.hosts, timing, options.network, not options.no_detours, options.witness)


def parser() -> argparse.ArgumentParser:
    """The command line of the proxy."""
    made = argparse.ArgumentParser(
        prog="chaos_mpi.agent.proxy", description="Runs a rank of an MPI job on another host."
    )
    where = made.add_mutually_exclusive_group()
    where.add_argument("--host", help="where the rank runs; default: this host")
    where.add_argument("--hosts", help="the host of each rank, separated by commas; an empty one is this host")
    made.add_argument("--remote-python", default=sys.executable, help="Python there (default: the same path)")
    made.add_argument("--ssh-command", default=shlex.join(DEFAULT_SSH), help="what runs a command there")
    made.add_argument("--wdir", default="", help="working directory of the rank (default: this one)")
    made.add_argument("--export", action="append", default=[], metavar="NAME", help="variable to take along")
    made.add_argument("--log-dir", help="for output once mpirun is gone")
    made.add_argument("--register", type=Path, metavar="DIRECTORY", help="the job's private directory on this host")
    made.add_argument("--heartbeat-limit", type=float, metavar="SECONDS", help="a host that is silent so long is lost")
    made.add_argument("--even-split", choices=EVEN_SPLITS, default="lowest", help="who goes on of two halves")
    made.add_argument("--no-detours", action="store_true", help="leave routes as they are when a link is cut")
    made.add_argument("--witness", metavar="MEMBER", help="takes part in the vote, and has no rank")
    made.add_argument("--network", help="interfaces or networks for the agents, separated by commas (default: any)")
    made.add_argument("argv", nargs="+", metavar="COMMAND")
    return made
