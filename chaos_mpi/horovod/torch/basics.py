"""Who is where, and what there is: what a script asks without talking to other ranks."""

from __future__ import annotations

from collections.abc import Sequence

from chaos_mpi.horovod.torch.job import job
from chaos_mpi.membership import host_of, on_host


def rank() -> int:
    """This rank, of those that took part in the last call that the script has waited for; the same in all of a step."""
    return job().rank


def size() -> int:
    """The number of ranks that took part in the last call that the script has waited for.

    Where the script is at the same line, it is the same at every rank, whoever has heard of a death already.
    """
    return len(job().members)


def local_rank() -> int:
    """This rank's place among those on the same machine."""
    here = job()
    return on_host(here.members, here.session.host).index(here.session.member)


def local_size() -> int:
    """The number of ranks on this machine."""
    here = job()
    return len(on_host(here.members, here.session.host))


def cross_rank() -> int:
    """This machine's place among those that have a rank with the same local rank."""
    return _across().index(job().session.host)


def cross_size() -> int:
    """The number of machines that have a rank with the same local rank."""
    return len(_across())


def is_homogeneous() -> bool:
    """Whether all machines have equally many ranks."""
    members = job().members
    return len({len(on_host(members, host)) for host in _hosts(members)}) == 1


def mpi_threads_supported() -> bool:
    """Whether threads besides the main one may call MPI."""
    from chaos_mpi.mpi.world import MPI

    job()
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def mpi_enabled() -> bool:
    """True: all communication is MPI's."""
    return True


def mpi_built() -> bool:
    """True: all communication is MPI's."""
    return True


def gloo_enabled() -> bool:
    """False: there is no Gloo here."""
    return False


def gloo_built() -> bool:
    """False: there is no Gloo here."""
    return False


def nccl_built() -> int:
    """0: there is no NCCL here."""
    return 0


def ddl_built() -> bool:
    """False: there is no DDL here."""
    return False


def ccl_built() -> bool:
    """False: there is no oneCCL here."""
    return False


def cuda_built() -> bool:
    """False: tensors on a GPU go through the memory of the host."""
    return False


def rocm_built() -> bool:
    """False: tensors on a GPU go through the memory of the host."""
    return False


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Not supported: use the event log and ``chaosctl timeline``.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "there is no Horovod timeline here: start the job with --event-log, or CHAOS_EVENT_LOG, and look at the log "
        "with 'chaosctl timeline'"
    )


def stop_timeline() -> None:
    """Not supported, see :func:`start_timeline`.

    Raises:
        NotImplementedError: always.
    """
    start_timeline("")


def _hosts(members: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(map(host_of, members)))


def _across() -> list[str]:
    members, place = job().members, local_rank()
    return [host for host in _hosts(members) if len(on_host(members, host)) > place]
