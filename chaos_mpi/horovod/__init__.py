"""Horovod scripts, made elastic.

:class:`ChaosCallback` keeps a script on real Horovod, in MPI mode, going when ranks die, join and leave; the script is
started with ``chaosrun`` or plain ``mpirun --with-ft ulfm``. It needs a Horovod that was built for this environment:
``bash launch/install_horovod.sh``.

:class:`ChaosLightningCallback` and :class:`ChaosTrainerCallback` do the same for scripts on PyTorch Lightning and on
the Hugging Face Trainer, which have to be installed, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chaos_mpi.horovod.callback import ChaosCallback, init
    from chaos_mpi.horovod.lightning import ChaosLightningCallback
    from chaos_mpi.horovod.transformers import ChaosTrainerCallback

__all__ = ["ChaosCallback", "ChaosLightningCallback", "ChaosTrainerCallback", "init"]

# Looked up on first use, so that neither torch nor Horovod nor a trainer is loaded before.
_LAZY = {
    "ChaosCallback": "chaos_mpi.horovod.callback",
    "ChaosLightningCallback": "chaos_mpi.horovod.lightning",
    "ChaosTrainerCallback": "chaos_mpi.horovod.transformers",
    "init": "chaos_mpi.horovod.callback",
}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'chaos_mpi.horovod' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(module), name)
