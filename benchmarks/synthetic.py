"""What the ranks of ``scale_out.py`` train: a small net, and as much further state as is asked for.

How large the state is and how long a step takes are independent: only the small net has gradients, the rest of the
state is parameters that are never trained. All of it lies in one piece of memory, so that an all-gather can be done in
place.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Frozen tensors; 2, 4 and 6 workers get equally many of them.
TENSORS = 48
BATCH_SIZE = 8
#: A step's computation on an accelerator, for which the processor waits; the ranks here share few cores.
DEVICE_S = 0.02
SAMPLES = 4096
_WIDTHS = (64, 32, 10)


class SyntheticModel(nn.Module):
    """A perceptron of 2,400 parameters, and frozen parameters that make the state ``state_bytes`` large.

    Args:
        state_bytes: size of all parameters together; a multiple of four.
        blank: leave everything zero, as in a process that is to get the state from others.
    """

    def __init__(self, state_bytes: int, *, blank: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(_WIDTHS)])
        trained = list(self.net.parameters())
        self.flat = torch.empty(state_bytes // 4)
        free = self.flat.numel() - sum(p.numel() for p in trained)
        sizes = [free // TENSORS + (i < free % TENSORS) for i in range(TENSORS)]
        *views, rest = torch.split(self.flat, [*[p.numel() for p in trained], free])
        for param, view in zip(trained, views, strict=True):
            param.data = view.view_as(param).copy_(param.data)
        self.frozen = nn.ParameterList([nn.Parameter(part, requires_grad=False) for part in torch.split(rest, sizes)])
        if blank:
            self.flat.zero_()
        else:
            torch.arange(free, out=rest)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.net(inputs)
        time.sleep(DEVICE_S)
        return outputs

    def trained(self) -> list[nn.Parameter]:
        """The parameters that have gradients."""
        return list(self.net.parameters())

    def frozen_as_it_should_be(self) -> bool:
        """Whether the frozen part is what the first ranks made it."""
        rest = self.flat[sum(p.numel() for p in self.trained()) :]
        return bool(torch.equal(rest, torch.arange(rest.numel(), dtype=torch.float32)))


def dataset() -> torch.utils.data.TensorDataset:
    """Random inputs and labels, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, _WIDTHS[0], generator=generator)
    return torch.utils.data.TensorDataset(inputs, torch.randint(_WIDTHS[-1], (SAMPLES,), generator=generator))


def loss_of(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward pass and loss of one batch."""
    return F.cross_entropy(model(inputs), labels)


class Journal:
    """What one rank did and when, as JSON lines in a file of its own.

    Every line has ``event``. Times are on the monotonic clock, which is the same for all hosts of a test bed.

    Args:
        directory: of the file.
        name: of the rank; ``newcomer`` for the one that joins.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._file = os.open(directory / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self._begun = 0.0
        self.note("started", host=socket.gethostname())

    def note(self, event: str, **fields: Any) -> None:
        """Write one line at once."""
        os.write(self._file, json.dumps({"event": event, "at": time.monotonic(), **fields}).encode() + b"\n")

    def follow(self, model: SyntheticModel) -> None:
        """A step begins when the forward pass does: what is done about the event comes before."""
        model.net.register_forward_pre_hook(self._step_begins)

    def _step_begins(self, *_: object) -> None:
        self._begun = time.monotonic()

    def step_ends(self) -> None:
        """The optimizer has stepped."""
        self.note("step", begun=self._begun)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal; none when there is no such file yet."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
