"""The calls of Horovod's interface, of ranks that all give the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from echo import hvd_job

import chaos_mpi.horovod.torch as hvd

Call = Callable[[torch.Tensor], torch.Tensor | Sequence[torch.Tensor]]
CALLS: dict[str, Call] = {
    "allreduce": lambda t: hvd.allreduce(t, op=hvd.Sum),
    "allreduce_": lambda t: hvd.allreduce_(t, op=hvd.Sum),
    "allreduce_async": lambda t: hvd.synchronize(hvd.allreduce_async(t, op=hvd.Sum)),
    "allreduce_async_": lambda t: hvd.synchronize(hvd.allreduce_async_(t, op=hvd.Sum)),
    "grouped_allreduce": lambda t: hvd.grouped_allreduce([t], op=hvd.Sum),
    "grouped_allreduce_": lambda t: hvd.grouped_allreduce_([t], op=hvd.Sum),
    "broadcast": lambda t: hvd.broadcast(t * 2, 0),
    "broadcast_": lambda t: hvd.broadcast_(t * 2, 0),
    "allgather": lambda t: hvd.allgather(t).view(2, 3).sum(0),
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_calls_in_inference_mode(call: str, inference: bool) -> None:
    with hvd_job(size=2), torch.inference_mode(inference):
        result = CALLS[call](torch.tensor([1.0, 2.0, 3.0]))
        result = result if isinstance(result, torch.Tensor) else result[0]
        assert result.tolist() == [2.0, 4.0, 6.0]
        assert result.is_inference() == inference
