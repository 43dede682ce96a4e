"""A model that draws random numbers, and logs what it drew: ``random_stream.py FOLDER RANKS SEEDS``.

Trains until RANKS ranks take part, and ten steps more. With SEEDS ``alike`` all ranks have the same seed, and those
that join another one; with ``own`` each has its own.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import quick_start  # noqa: F401
import torch
from fault_points import own_label
from torch import nn

import chaos_mpi

STEPS = 10


class Draws(nn.Module):
    """A line through the origin, and a draw from each generator at each call, written to ``log``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.drawn: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Draw; Gaussian ones too, of which numpy and Python keep every second one for later."""
        self.drawn = [torch.rand(1).item(), float(np.random.standard_normal()), random.gauss(0.0, 1.0)]
        return self.weight * x


def main() -> None:
    """Train."""
    folder, ranks, seeds = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    label = own_label()
    seed = 7 + (label if seeds == "own" or label >= 100 else 0)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    session = chaos_mpi.init()
    module = Draws()
    model = chaos_mpi.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, rng=True, left=STEPS)
    torch.rand(3)  # as the making of a loader's iterator
    if session.size < ranks and session.step == 0 and session.rank == 0:
        session.request_join()
    with open(folder / f"draws-{label}.jsonl", "a", buffering=1) as log:
        while state.left:
            optimizer.zero_grad()
            model(torch.ones(1)).sum().backward()
            optimizer.step()
            log.write(json.dumps({"step": session.step, "drawn": module.drawn}) + "\n")
            state.left -= session.size == ranks
    (folder / f"result-{label}.json").write_text(json.dumps({"identical": chaos_mpi.finalize().replicas_identical}))


if __name__ == "__main__":
    main()
