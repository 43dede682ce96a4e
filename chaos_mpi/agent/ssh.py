"""How a command is run on another host: ``ssh`` with the user's own keys and configuration."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from chaos_mpi.errors import ConfigError

#: Without questions, which nobody would answer; with a sign of life, so that the loss of the other host is noticed.
#: Its limit (2 minutes) is long: a link that comes back in time is not to cost a rank, and what is faster watches
#: elsewhere.
SSH_OPTIONS: dict[str, str] = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "8",
    "ClearAllForwardings": "yes",
    "ForwardX11": "no",
    "RequestTTY": "no",
    "ControlPath": "none",
}
DEFAULT_SSH: tuple[str, ...] = ("ssh", *(f"-o{name}={value}" for name, value in SSH_OPTIONS.items()))


def ssh_command(arguments: str = "", program: str | None = None) -> tuple[str, ...]:
    """``ssh`` with this package's options, after those of the user: ssh takes the first that it is given.

    Args:
        arguments: the user's, as in a shell: ``-p 2222 -i ~/.ssh/cluster``.
        program: another one that takes its place, called as ``PROGRAM ARGUMENTS HOST COMMAND``, where a shell on the
            host is to run the command. Gets no options but the user's.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        given = shlex.split(arguments)
        return (DEFAULT_SSH[0], *given, *DEFAULT_SSH[1:]) if program is None else (program, *given)
    except ValueError as error:
        raise ConfigError(f"the ssh arguments {arguments!r} cannot be understood: {error}") from error


def arguments_of(ssh: Sequence[str]) -> tuple[str, str | None]:
    """The reverse of :func:`ssh_command`: the user's arguments, and the program if it is not ``ssh``."""
    before = len(ssh) - len(DEFAULT_SSH) + 1
    if ssh[0] == DEFAULT_SSH[0] and before > 0 and tuple(ssh[before:]) == DEFAULT_SSH[1:]:
        return shlex.join(ssh[1:before]), None
    return shlex.join(ssh[1:]), ssh[0]


def remote_command(ssh: Sequence[str], host: str, argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` on ``host``. The other side gives it to a shell, so it is quoted for one.

    Raises:
        ConfigError: the name of the host would be taken for an option.
    """
    if not host or host.startswith("-"):
        raise ConfigError(f"{host!r} is not the name of a host")
    return [*ssh, host, "exec " + shlex.join(argv)]
