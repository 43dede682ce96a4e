"""How another launcher starts a job on several hosts anew, from what a rank tells it. Pure."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_mpi.agent.placement import parser
from chaos_mpi.agent.ssh import arguments_of
from chaos_mpi.errors import ConfigError
from chaos_mpi.membership import host_of

_THIS_MACHINE = frozenset({"localhost", "127.0.0.1"})


@dataclass(frozen=True, slots=True)
class Launch:
    """How ``chaosrun`` is to be called.

    Attributes:
        options: that say where ranks run, and how hosts are reached.
        program: what the ranks run.
        settings: variables for it.
        directory: to call it in.
    """

    options: tuple[str, ...]
    program: tuple[str, ...]
    settings: Mapping[str, str]
    directory: str


def launch_of(told: Mapping[str, Any], python: str, given: Iterable[str] = ()) -> Launch:
    """How to start the job anew where its members are.

    Args:
        told: what a rank tells of itself (``arguments``, ``directory``, ``settings``, ``proxy``), the ``members``, the
            ``host`` of the one that told them, and whether it has a training state (``has_state``).
        python: the Python of the new launcher.
        given: options of ``chaosrun`` that are said otherwise, and are left out here.

    Raises:
        ConfigError: the job cannot be started by another launcher; says why.
    """
    if not told["proxy"]:
        raise ConfigError("the job runs on one machine, with its launcher: only a job with --hosts can be taken over")
    if not told["has_state"]:
        raise ConfigError("the script has not made its TrainingState, which the job would go on from")
    way, _ = parser().parse_known_args([*told["proxy"][4:], "--", ""])
    ssh_arguments, ssh_program = arguments_of(shlex.split(way.ssh_command))
    options = {
        "--hosts": hosts_of(told["members"], told["host"]) if not {"--hosts", "--hostfile"} & {*given} else None,
        "--ssh-args": ssh_arguments,
        "--ssh-program": ssh_program,
        "--remote-python": way.remote_python,
        "--network": way.network,
        "--log-dir": way.log_dir,
        "--heartbeat-limit": None if way.heartbeat_limit is None else f"{way.heartbeat_limit:g}",
        "--even-split": way.even_split if way.heartbeat_limit is not None else None,
    }
    line = [part for name, value in options.items() if value and name not in given for part in (name, str(value))]
    if way.no_detours and "--no-detours" not in given:
        line.append("--no-detours")
    return Launch(tuple(line), _program(told["arguments"], python), dict(told["settings"]), str(told["directory"]))


def hosts_of(members: Iterable[str], here: str) -> str:
    """The hosts of these members as ``--hosts`` takes them: ``edge1:2,edge2:1``.

    Args:
        members: ids, in rank order.
        here: the host of the one that runs on this machine.

    Raises:
        ConfigError: the name of a host means another machine here.
    """
    counts = Counter(map(host_of, members))
    if elsewhere := sorted(host for host in counts if host in _THIS_MACHINE and host != here):
        raise ConfigError(
            f"the job has ranks on {elsewhere[0]}, by which its launcher meant another machine than this one: name all "
            "hosts with --hosts"
        )
    return ",".join(f"{host}:{count}" for host, count in counts.items())


def _program(arguments: Sequence[str], python: str) -> tuple[str, ...]:
    """The job's program for ``chaosrun``, which knows scripts and modules, and checks that hosts have the script."""
    if arguments[:1] == ["-m"] or Path(arguments[0]).suffix == ".py":
        return tuple(arguments)
    return (python, *arguments)
