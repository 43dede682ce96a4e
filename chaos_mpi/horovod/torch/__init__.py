"""The interface of ``horovod.torch``, on the engine of this package: ``import chaos_mpi.horovod.torch as hvd``.

Nothing of Horovod has to be installed. Scripts start under ``chaosrun`` or ``mpirun --with-ft ulfm``, and go on when
ranks die; with :mod:`chaos_mpi.horovod.torch.elastic`, ranks join and leave as well.
"""

from __future__ import annotations

from chaos_mpi.horovod.torch import elastic, mpi_ops
from chaos_mpi.horovod.torch.compression import Compression
from chaos_mpi.horovod.torch.functions import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from chaos_mpi.horovod.torch.mpi_ops import *  # noqa: F403
from chaos_mpi.horovod.torch.optimizer import DistributedOptimizer
from chaos_mpi.horovod.torch.sync_batch_norm import SyncBatchNorm

__all__ = [  # noqa: PLE0604
    *mpi_ops.__all__, "Compression", "DistributedOptimizer", "SyncBatchNorm", "allgather_object", "broadcast_object",
    "broadcast_optimizer_state", "broadcast_parameters", "elastic",
]  # fmt: skip


def __getattr__(name: str) -> object:
    raise AttributeError(
        f"chaos_mpi.horovod.torch has no {name!r}: it has what the README names under 'One line: "
        "chaos_mpi.horovod.torch', and nothing of Horovod's core library"
    )
