"""``chaosrun`` on several hosts: which they are, how they are reached, and whether they have what the job needs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from chaos_mpi.agent.environment import LAUNCHER_SETTINGS, network_settings
from chaos_mpi.agent.guard import Settings
from chaos_mpi.agent.hosts import Host, host_name, parse_host_list, parse_hostfile, place
from chaos_mpi.agent.placement import is_here
from chaos_mpi.agent.preflight import ask, ask_here, judge
from chaos_mpi.agent.spawning import proxy_command, variables
from chaos_mpi.agent.ssh import ssh_command
from chaos_mpi.cli.options import Seconds
from chaos_mpi.cli.starting import names
from chaos_mpi.cli.terminal import say
from chaos_mpi.errors import ConfigError
from chaos_mpi.monitor.cluster import EVEN_SPLITS, Timing
from chaos_mpi.mpi.launch import MCA_DEFAULTS

#: Holds what ``chaosctl add --host`` needs to check a host, in the job's private directory.
HOSTS_FILE = "hosts"

_OPTIONS = (
    click.option("--hosts", help="Run on these hosts, over ssh: edge1:1,edge2:2,edge3 (host:ranks)."),
    click.option(
        "--hostfile", type=click.Path(dir_okay=False, path_type=Path), help="The same from a file in Open MPI's syntax."
    ),
    click.option("--ssh-args", default="", help="Options for ssh, as in a shell: '-p 2222 -i ~/.ssh/cluster'."),
    click.option("--ssh-program", help="Runs commands on hosts in the place of ssh: PROGRAM HOST COMMAND."),
    click.option("--remote-python", help="Python on the hosts. Default: the same path as here."),
    click.option("--network", help="Interfaces or networks (10.1.0.0/16) for the ranks. Default: all but loopback."),
    click.option(
        "--heartbeat-limit", type=Seconds(), help="A host that was silent so long, seconds, is lost. Default: 0.5."
    ),
    click.option(
        "--even-split", type=click.Choice(EVEN_SPLITS),
        help="When hosts fall apart into equal halves: the one with the lowest member goes on (default), or none.",
    ),
    click.option(
        "--no-detours", is_flag=True, help="Set no routes round cut links; one of the two hosts is given up instead."
    ),
    click.option(
        "--log-dir", type=click.Path(file_okay=False, path_type=Path),
        help="On each host, for output once mpirun is gone. Default: ~/.local/state/chaos_mpi/logs.",
    ),
)  # fmt: skip


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command line options that say where a job runs."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the ranks of a job are to run.

    Attributes:
        hosts: the host of each rank.
        ssh: command that runs another one on a host.
        python: the Python to use there.
        network: see ``--network``.
        log_dir: see ``--log-dir``.
        heartbeat_limit_s: see ``--heartbeat-limit``.
        even_split: see ``--even-split``.
        paths: files and directories that have to exist on every host.
        detours: unless ``--no-detours``.
    """

    hosts: tuple[str, ...]
    ssh: tuple[str, ...]
    python: str
    network: str | None = None
    log_dir: Path | None = None
    heartbeat_limit_s: float = 0.5
    even_split: str = EVEN_SPLITS[0]
    detours: bool = True
    paths: tuple[str, ...] = ()

    @property
    def remote(self) -> list[str]:
        """The hosts that are not this one, each once."""
        return [host for host in dict.fromkeys(self.hosts) if not is_here(host)]

    def check(self) -> list[str]:
        """What keeps the hosts from being used, a line for each problem; this one as well, if ranks are to run here.

        Raises:
            ChaosError: nothing can be checked from here.
        """
        answers = ask(self.remote, self.python, self.ssh, self._needed, on_wait=lambda hosts: say(_slow(hosts)))
        here = any(map(is_here, self.hosts))
        return [str(problem) for problem in judge(answers, ask_here(self._needed), self.python, here_takes_part=here)]

    @property
    def _needed(self) -> tuple[str, ...]:
        """What is to be on every host, as for :func:`chaos_mpi.agent.preflight.ask`."""
        log_dir = [f"+{self.log_dir}"] if self.log_dir is not None else []
        network = [f"@{self.network}"] if self.network is not None else []
        return (*self.paths, *log_dir, *network)

    def proxy(self, run_dir: Path) -> list[str]:
        """The beginning of a proxy's command line."""
        way = ["--ssh-command", shlex.join(self.ssh), "--remote-python", self.python, "--register", str(run_dir)]
        way += ["--heartbeat-limit", f"{self.heartbeat_limit_s:g}", "--even-split", self.even_split]
        if not self.detours:
            way.append("--no-detours")
        if self.network is not None:
            way += ["--network", self.network]
        if self.log_dir is not None:
            way += ["--log-dir", str(self.log_dir)]
        return proxy_command(sys.executable, way)

    def rank_command(self, run_dir: Path, argv: Sequence[str], witness: str | None = None) -> list[str]:
        """What ``mpirun`` is to start for each rank.

        Args:
            run_dir: the job's private directory on this host.
            argv: the command of a rank.
            witness: which member of the watch has no rank; None: all have.
        """
        beside = ["--witness", witness] if witness is not None else []
        return [*self.proxy(run_dir), *beside, "--hosts", ",".join(self.hosts), "--", *argv]

    def witness_settings(self) -> Settings | None:
        """How a witness on this host watches the job; None where a rank here has a vote already."""
        if any(map(is_here, self.hosts)):
            return None
        return Settings(
            "", False, Timing.of_limit(self.heartbeat_limit_s, self.even_split), self.network, self.detours
        )  # fmt: skip

    def environment(self, run_dir: Path) -> dict[str, str]:
        """Variables for ``mpirun`` and the ranks."""
        return {**LAUNCHER_SETTINGS, **variables(self.proxy(run_dir))}

    def mca_settings(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Open MPI's parameters; what the user set in the environment is left alone."""
        settings = MCA_DEFAULTS | network_settings(self.network)
        return {name: value for name, value in settings.items() if f"OMPI_MCA_{name}" not in environ}

    def note(self, run_dir: Path) -> None:
        """Leave what is needed to check further hosts in the job's directory."""
        fields = {"python": self.python, "ssh": self.ssh, "wanted": self._needed}
        (run_dir / HOSTS_FILE).write_text(json.dumps(fields), encoding="utf-8")


def cluster_of(
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    ssh_args: str,
    ssh_program: str | None,
    remote_python: str | None,
    network: str | None,
    log_dir: Path | None,
    heartbeat_limit: float | None,
    even_split: str | None,
    no_detours: bool = False,
) -> Cluster | None:
    """Where the ranks are to run, from the command line; None for this machine alone.

    Args:
        ranks: how many; None for all slots.

    Raises:
        ConfigError: it cannot be used.
    """
    if hosts is not None and hostfile is not None:
        raise ConfigError("--hosts and --hostfile both say where to run: give one of them")
    if hosts is None and hostfile is None:
        given = {
            "--ssh-args": ssh_args, "--ssh-program": ssh_program, "--remote-python": remote_python,
            "--network": network, "--log-dir": log_dir, "--heartbeat-limit": heartbeat_limit,
            "--even-split": even_split, "--no-detours": no_detours,
        }  # fmt: skip
        if unused := [name for name, value in given.items() if value]:
            raise ConfigError(f"{unused[0]} is for jobs on several hosts: give --hosts or --hostfile as well")
        return None
    found = parse_host_list(hosts) if hosts is not None else _read(hostfile)
    python = remote_python or sys.executable
    return Cluster(
        place(found, ranks), ssh_command(ssh_args, ssh_program), python, network,
        log_dir.absolute() if log_dir is not None else None,  # like all paths: there it would be one in the home
        heartbeat_limit or Timing().limit_s, even_split or EVEN_SPLITS[0], not no_detours,
    )  # fmt: skip


def check_further(job: Path, host: str) -> list[str]:
    """What keeps a host from being added to a running job, as far as that can be told from here.

    Args:
        job: its private directory on this machine.
        host: its name for ssh.

    Raises:
        ConfigError: that cannot be a name.
        ChaosError: nothing can be checked from here.
    """
    try:
        fields = json.loads((job / HOSTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # a job on one machine, or not the machine that it was started on
    host_name(host, "--host")
    if is_here(host):
        return []
    answers = ask(
        [host], fields["python"], fields["ssh"], fields["wanted"], on_wait=lambda hosts: click.echo(_slow(hosts))
    )
    return [str(problem) for problem in judge(answers, ask_here(), fields["python"])]


def _slow(hosts: list[str]) -> str:
    return f"no answer yet from {names(hosts)}"


def _read(hostfile: Path | None) -> tuple[Host, ...]:
    assert hostfile is not None
    try:
        return parse_hostfile(hostfile.read_text(encoding="utf-8-sig"), str(hostfile))
    except OSError as error:
        raise ConfigError(f"the host file {hostfile} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the host file {hostfile} is not text in UTF-8: {error}") from error
