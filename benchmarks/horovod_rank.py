"""One rank of a job that ``horovod.py`` measures, until it is killed: ``horovod_rank.py SYSTEM MODEL FOLDER``.

``gloo`` and ``dropin`` run the same script, written for Elastic Horovod; nothing but the import differs. ``callback``
is an ordinary Horovod loop, with real Horovod on MPI, and the callback that makes it elastic. Each rank writes a line
for each step it has finished into a file of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import WORKLOADS, Workload

sys.path.append(sys.path.pop(0))  # or this directory's horovod.py would be taken for the package

#: Should the driver be killed, no rank stays behind for long. More than the driver waits for all that it waits for.
LIFE_LIMIT_S = 600
#: As often Elastic Horovod's own examples commit.
COMMIT_EVERY = 10


class StepLog:
    """Lines with ``mono`` (seconds), ``step``, ``size``, ``rank`` and ``member``, one for each finished step."""

    def __init__(self, folder: Path) -> None:
        self._member = f"rank:{os.getpid()}"
        self._file = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def finished(self, step: int, hvd: Any) -> None:
        """This rank has finished this step, with so many others."""
        line = {"mono": time.monotonic(), "step": step, "size": hvd.size(), "rank": hvd.rank(), "member": self._member}
        self._file.write(json.dumps(line) + "\n")


def make_step(
    hvd: Any, workload: Workload, data: tuple[torch.Tensor, torch.Tensor], model: Any, optimizer: Any, state: Any
) -> None:
    """Train on this rank's next batch."""
    inputs, targets = data
    first = (state.batch * hvd.size() + hvd.rank()) * workload.batch_size % (len(inputs) - workload.batch_size)
    x, y = inputs[first : first + workload.batch_size], targets[first : first + workload.batch_size]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    state.batch += 1


def train_elastic(hvd: Any, model_name: str, log: StepLog) -> None:
    """A script as written for Elastic Horovod."""
    workload = WORKLOADS[model_name]
    hvd.init()
    torch.manual_seed(0)
    model = workload.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    data = workload.dataset()

    @hvd.elastic.run  # type: ignore[untyped-decorator]
    def train(state: Any) -> None:
        while True:
            make_step(hvd, workload, data, model, optimizer, state)
            log.finished(state.batch, hvd)
            if state.batch % COMMIT_EVERY == 0:
                state.commit()

    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0))


def train_with_callback(model_name: str, log: StepLog) -> None:
    """An ordinary Horovod loop, made elastic by the callback."""
    import horovod.torch as hvd

    from chaos_mpi.horovod import ChaosCallback

    workload = WORKLOADS[model_name]
    torch.manual_seed(0)
    model = workload.build()
    chaos = ChaosCallback(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), batch=0)
    optimizer, state = chaos.optimizer, chaos.state
    data = workload.dataset()
    while True:
        make_step(hvd, workload, data, model, optimizer, state)
        log.finished(state.batch, hvd)
        chaos.on_batch_end()


def main() -> None:
    """Train."""
    signal.alarm(LIFE_LIMIT_S)
    system, model_name, log = sys.argv[1], sys.argv[2], StepLog(Path(sys.argv[3]))
    torch.set_num_threads(1)
    if system == "callback":
        train_with_callback(model_name, log)
    elif system == "dropin":
        import chaos_mpi.horovod.torch as dropin

        train_elastic(dropin, model_name, log)
    else:
        import horovod.torch as real

        train_elastic(real, model_name, log)


if __name__ == "__main__":
    main()
