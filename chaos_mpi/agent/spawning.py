"""How a rank of a job on several hosts has another one started: the command line of its proxy. Pure.

``MPI_Comm_spawn`` starts processes on the launch host, where ``mpirun`` is. So it is asked for a proxy, which has the
rank started where it is to be.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

from chaos_mpi.errors import ConfigError

#: Tells a rank the beginning of the command line of a proxy, as a JSON list; the launch host's Python comes first.
VARIABLE = "CHAOS_PROXY"
#: Tells a newcomer's process from others: Python takes any ``-X`` option, and shows it in ``sys._xoptions``.
JOIN_OPTION = "chaos_mpi_join"


def proxy_command(python: str, options: Sequence[str]) -> list[str]:
    """A proxy's command line, up to what says where its rank is to run.

    Args:
        python: of the launch host.
        options: how hosts are reached, and more.
    """
    return [python, "-P", "-m", "chaos_mpi.agent.proxy", *options]


def variables(command: Sequence[str]) -> dict[str, str]:
    """What a rank is to have in its environment, so that it can have others started."""
    return {VARIABLE: json.dumps(list(command))}


def join_of(argv: Sequence[str]) -> str:
    """The option in a newcomer's command line that names the join that it is started for; empty if there is none."""
    options = (value for flag, value in itertools.pairwise(argv) if flag == "-X")
    return next((value for value in options if value.startswith(f"{JOIN_OPTION}=")), "")


def spawn_command(environ: Mapping[str, str], host: str, directory: str, argv: Sequence[str]) -> list[str] | None:
    """The command line for ``MPI_Comm_spawn``; None where ranks are started without proxies.

    Args:
        environ: of this rank.
        host: where the new rank is to run; empty: where this one does.
        directory: its working directory.
        argv: its Python program and arguments; the Python itself is that of its host.

    Raises:
        ConfigError: the variable that :func:`variables` has set was changed.
    """
    text = environ.get(VARIABLE)
    if not text:
        return None
    try:
        command = [str(part) for part in json.loads(text)]
        python = command[0]
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"the environment variable {VARIABLE} is {text!r}, which is no command line") from error
    where = host or environ.get("CHAOS_HOST", "")
    place = ["--host", where] if where else []
    return [*command, *place, "--wdir", directory, "--", python, *argv]
