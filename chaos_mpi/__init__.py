"""Keeps distributed training alive on a cluster that never holds still.

A data parallel PyTorch script becomes elastic with a few changed lines::

    session = chaos_mpi.init()
    model = chaos_mpi.DistributedDataParallel(model)
    sampler = chaos_mpi.ElasticSampler(dataset, batch_size=32)
    loader = chaos_mpi.DataLoader(dataset, batch_sampler=sampler)
    state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, sampler=sampler, epoch=0)
    ...
    chaos_mpi.finalize()

and is started with ``chaosrun -n 4 train.py`` or ``mpirun --with-ft ulfm -n 4 python train.py``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chaos_mpi.errors import (
    ChaosError,
    CheckpointError,
    ConfigError,
    EngineError,
    JoinError,
    MismatchError,
    NoSessionError,
    RecoveryError,
    StopRequestedError,
    TooFewRanksError,
    WaitTimeoutError,
)

if TYPE_CHECKING:
    from chaos_mpi.elastic.sampler import ElasticSampler
    from chaos_mpi.elastic.session import Session, SessionResult
    from chaos_mpi.elastic.state import TrainingState
    from chaos_mpi.torch.ddp import DistributedDataParallel
    from chaos_mpi.torch.loader import DataLoader

__version__ = "0.1.0"

__all__ = [
    "ChaosError",
    "CheckpointError",
    "ConfigError",
    "DataLoader",
    "DistributedDataParallel",
    "ElasticSampler",
    "EngineError",
    "JoinError",
    "MismatchError",
    "NoSessionError",
    "RecoveryError",
    "Session",
    "SessionResult",
    "StopRequestedError",
    "TooFewRanksError",
    "TrainingState",
    "WaitTimeoutError",
    "__version__",
    "current_session",
    "finalize",
    "init",
]

# Looked up on first use, so that the launcher and the tools do not have to load torch.
_LAZY = {
    "DataLoader": "chaos_mpi.torch.loader",
    "DistributedDataParallel": "chaos_mpi.torch.ddp",
    "ElasticSampler": "chaos_mpi.elastic.sampler",
    "Session": "chaos_mpi.elastic.session",
    "SessionResult": "chaos_mpi.elastic.session",
    "TrainingState": "chaos_mpi.elastic.state",
}


def init(
    *,
    min_ranks: int | None = None,
    batch_policy: str | None = None,
    timeout_s: float | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool | None = None,
    event_log: str | None = None,
    max_ranks: int | None = None,
    join_timeout_s: float | None = None,
    join_policy: str | None = None,
    hosts_from: str | os.PathLike[str] | None = None,
    scale_policy: str | None = None,
    discovery_interval_s: float | None = None,
) -> Session:
    """Join the job and open this process's session; to be called once, before the model is wrapped.

    Arguments that are left out come from ``chaosrun``'s options (``CHAOS_*`` environment variables), else from
    the defaults.

    Args:
        min_ranks: stop, with the state saved, when fewer members are left (default 1).
        batch_policy: on a change of size: ``keep_global_batch`` (default), ``linear``, ``sqrt`` or ``none``.
        timeout_s: longest wait for other members, seconds (default 300).
        checkpoint_dir: write disk checkpoints there, in the background (default: none).
        checkpoint_every: steps between checkpoints (default 100).
        resume: go on from the newest checkpoint there, if there is one.
        max_ranks: refuse joins that would make the job larger (default: no limit).
        join_timeout_s: longest time from the start of a newcomer's process until it can take the state (default 120).
        join_policy: while a newcomer gets the state, train on (``overlap``), wait (``blocking``), or what fits the
            state and the optimizer (``auto``, the default).
        hosts_from: file with lines ``host:slots``, or program that prints them, looked at again and again.
        scale_policy: ``available`` (as many ranks as there are slots; default with ``hosts_from``) or ``manual``.
        discovery_interval_s: time between two looks at ``hosts_from`` (default 1).
        event_log: append events as JSON lines to this path; ``%h`` and ``%m`` stand for host and member.

    Raises:
        ConfigError: a setting cannot be used.
        EngineError: MPI is missing or was started without fault tolerance.
        WaitTimeoutError: the other ranks did not start in time.
    """
    from chaos_mpi.elastic.lifecycle import end_quickly, tidy_uncaught

    tidy_uncaught()  # before anything that can fail
    end_quickly()
    from chaos_mpi.config import load_settings
    from chaos_mpi.elastic.session import open_session

    return open_session(
        load_settings(
            min_ranks=min_ranks,
            batch_policy=batch_policy,
            timeout_s=timeout_s,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
            event_log=event_log,
            max_ranks=max_ranks,
            join_timeout_s=join_timeout_s,
            join_policy=join_policy,
            hosts_from=hosts_from,
            scale_policy=scale_policy,
            discovery_interval_s=discovery_interval_s,
        )
    )


def current_session() -> Session:
    """The open session; NoSessionError when there is none."""
    from chaos_mpi.elastic.current import current_session as current

    return current()


def finalize() -> SessionResult:
    """End the session in good order: the last line of a training script. See :meth:`Session.close`."""
    return current_session().close()


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'chaos_mpi' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(module), name)
