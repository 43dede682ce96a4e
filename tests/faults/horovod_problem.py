"""The problem of the fault tests for Horovod scripts: that of the others, without buffers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from problem import Samples, Trace, agreed_steps, build_optimizer, read_traces
from problem import build_model as build_model_with_buffers
from torch import nn

SAMPLES = 96
BATCH_SIZE = 4
CLIP = 0.5


def build_model() -> nn.Sequential:
    """Four layers, so that there are several gradients; the same parameters on every call."""
    model = build_model_with_buffers()
    model[1] = nn.Identity()
    return model


def replay(steps: Mapping[int, Sequence[str]], traces: Mapping[str, Trace]) -> dict[str, torch.Tensor]:
    """Train in this process with the logged membership history; the final parameters."""
    data, model = Samples(SAMPLES), build_model()
    optimizer, scheduler = build_optimizer(model, "sgd")
    for step in range(1, len(steps) + 1):
        optimizer.zero_grad()
        for member in steps[step]:
            indices = torch.tensor(traces[member].batches[step - 1]["indices"])
            loss = nn.functional.mse_loss(model(data.inputs[indices]), data.targets[indices])
            (loss / len(steps[step])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def history(folder: Path) -> tuple[dict[int, list[str]], dict[str, Trace]]:
    """Whose gradients are in each step, on which all agree, and the traces of all members."""
    traces = read_traces(folder)
    steps = agreed_steps(folder, traces)
    assert sorted(steps) == list(range(1, len(steps) + 1)), f"steps are missing: {sorted(steps)}"
    return steps, traces


def times_trained(steps: Mapping[int, Sequence[str]], traces: Mapping[str, Trace]) -> dict[int, Counter[int]]:
    """How often each sample is in the finished steps of each epoch."""
    seen: dict[int, Counter[int]] = {}
    for step, contributors in steps.items():
        for member in contributors:
            batch = traces[member].batches[step - 1]
            seen.setdefault(batch["epoch"], Counter()).update(batch["indices"])
    return seen


def write(path: Path, value: object) -> None:
    """A line of a trace, at once."""
    with open(path, "a", buffering=1) as file:
        file.write(json.dumps(value) + "\n")
