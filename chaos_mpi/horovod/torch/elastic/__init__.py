"""Training in which ranks come and go, for scripts that were written for Elastic Horovod.

They run unchanged, and differ in this: a rank that dies does not interrupt the training function. The others finish the
step among themselves, and at the next ``state.commit()`` or ``state.check_host_updates()`` all are told of the change,
as they are of ranks that join or leave there: by a :class:`HostsUpdatedInterrupt`, with nothing restored.
"""

from __future__ import annotations

from chaos_mpi.horovod.torch.elastic.run import run
from chaos_mpi.horovod.torch.elastic.sampler import ElasticSampler
from chaos_mpi.horovod.torch.elastic.state import ObjectState, State, TorchState

__all__ = ["ElasticSampler", "ObjectState", "State", "TorchState", "run"]
