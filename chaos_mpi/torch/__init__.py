"""The integration with PyTorch: data parallel modules, data loading, and a backend of ``torch.distributed``.

Importing it registers the backend, so that ``torch.distributed.init_process_group("chaos")`` works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed

if TYPE_CHECKING:
    from chaos_mpi.torch.backend import monitored_barrier
    from chaos_mpi.torch.ddp import DistributedDataParallel
    from chaos_mpi.torch.hook import ElasticState, elastic_hook
    from chaos_mpi.torch.loader import DataLoader
    from chaos_mpi.torch.sharded_optimizer import ShardedOptimizer

__all__ = [
    "DataLoader",
    "DistributedDataParallel",
    "ElasticState",
    "ShardedOptimizer",
    "elastic_hook",
    "monitored_barrier",
]

# On first use, because they load MPI.
_LAZY = {
    "DataLoader": "chaos_mpi.torch.loader",
    "DistributedDataParallel": "chaos_mpi.torch.ddp",
    "ElasticState": "chaos_mpi.torch.hook",
    "ShardedOptimizer": "chaos_mpi.torch.sharded_optimizer",
    "elastic_hook": "chaos_mpi.torch.hook",
    "monitored_barrier": "chaos_mpi.torch.backend",
}

if torch.distributed.is_available():
    from chaos_mpi.torch.backend import register

    register()


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'chaos_mpi.torch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(module), name)
