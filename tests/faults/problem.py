"""A small training problem whose course can be recomputed exactly in one process.

Shared by the training script, which runs in many processes, and by the tests, which replay what the script logged:
given which member trained on which samples in which step, and whose gradients each step contains, the final
parameters follow. Everything is float64, so that only the order of a few additions differs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.utils.data import Dataset

import chaos_mpi


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained: sizes, optimizer and the rule for a change of size."""

    samples: int = 96
    batch_size: int = 4
    epochs: int = 2
    optimizer: str = "sgd"
    policy: str = "keep_global_batch"
    ranks: int = 4
    workers: int = 0
    clip: float | None = None
    ballast_bytes: int = 0  # more training state, so that moving it takes a while
    pause_s: float = 0.0  # in every step, as if there was more to compute
    wrapper: str = "chaos"  # or torch's DistributedDataParallel with the "hook"
    device: str = "cpu"


class Samples(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    """Inputs and targets that depend on the index alone; each item also says its index."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(11)
        self.inputs = torch.randn(length, 8, generator=generator, dtype=torch.float64)
        self.targets = torch.randn(length, 3, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, self.inputs[index], self.targets[index]


class RunningCentre(nn.Module):
    """Subtracts a running mean, kept in a buffer as BatchNorm keeps its own: wrong buffers give wrong parameters."""

    mean: torch.Tensor
    count: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Centre, then update the mean."""
        centred = x - self.mean
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.count += 1
        return centred


def build_model() -> nn.Sequential:
    """Four layers, so that there are several buckets; the same parameters on every call."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 16), RunningCentre(16), nn.Tanh(),
        nn.Linear(16, 16), nn.Tanh(),
        nn.Linear(16, 16), nn.Tanh(),
        nn.Linear(16, 3),
    ).to(torch.float64)  # fmt: skip


def build_optimizer(model: nn.Module, name: str) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """An optimizer with memory, and a scheduler that changes the rate at every step."""
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)


@dataclasses.dataclass
class Trace:
    """What one member logged.

    Attributes:
        batches: for each step, counted from the number of steps finished before it: epoch, samples, and whether
            they are a stand-in that counts nothing.
        steps: for each finished step, counted from 1, the ids of the members whose gradients are in it.
    """

    batches: dict[int, dict[str, Any]]
    steps: dict[int, list[str]]


def make_loader(problem: Problem) -> tuple[chaos_mpi.ElasticSampler, chaos_mpi.DataLoader]:
    """The sampler and the loader of a training script."""
    data = Samples(problem.samples)
    sampler = chaos_mpi.ElasticSampler(data, batch_size=problem.batch_size, seed=5)
    return sampler, chaos_mpi.DataLoader(data, batch_sampler=sampler, num_workers=problem.workers)


def log_batch(
    trace: IO[str], session: chaos_mpi.Session, epoch: int, indices: torch.Tensor, sampler: chaos_mpi.ElasticSampler
) -> None:
    """Note the samples that are about to be trained on; ``trace`` is written line by line, see :func:`read_traces`."""
    batch = {"step": session.step, "epoch": epoch, "indices": indices.tolist(), "ghost": sampler.ghost_round()}
    trace.write(json.dumps(batch) + "\n")


def log_done(trace: IO[str], session: chaos_mpi.Session) -> None:
    """Note that a step is finished, and whose gradients it contains."""
    trace.write(json.dumps({"done": session.step, "contributors": list(session.last_contributors)}) + "\n")


def write_result(
    folder: Path,
    session: chaos_mpi.Session,
    result: chaos_mpi.SessionResult,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Leave how the session of this member ended."""
    summary = {
        "digest": result.params_digest, "identical": result.replicas_identical, "steps": result.steps,
        "size": result.size, "scheduler": scheduler.last_epoch,
    }  # fmt: skip
    path = folder / f"result-{session.member}.json"
    new = path.with_suffix(".tmp")  # a test may read it as soon as it is there
    new.write_text(json.dumps(summary))
    new.replace(path)


def read_traces(folder: Path) -> dict[str, Trace]:
    """The traces of all members that got as far as training."""
    traces = {}
    for path in folder.glob("trace-*.jsonl"):
        trace = Trace({}, {})
        # A process that is killed while it writes may leave half a line, and nothing after it.
        for line in path.read_text().split("\n")[:-1]:
            entry = json.loads(line)
            if "done" in entry:
                assert entry["done"] not in trace.steps, f"{path.name}: step {entry['done']} was applied twice"
                trace.steps[entry["done"]] = entry["contributors"]
            else:
                assert entry["step"] not in trace.batches, f"{path.name}: two batches for step {entry['step']}"
                trace.batches[entry["step"]] = entry
        traces[path.name.removeprefix("trace-").removesuffix(".jsonl")] = trace
    return traces


def agreed_steps(folder: Path, traces: Mapping[str, Trace]) -> dict[int, list[str]]:
    """For each step the members whose gradients are in it, on which all agree.

    All but who dies, or is cut off, right after a step: it may have been the only one that had finished it, and then it
    is made again without it.
    """
    well = set()
    for path in folder.glob("events-*.jsonl"):
        events = [json.loads(line) for line in path.read_text().split("\n")[:-1] if '"session_ended"' in line]
        well |= {e["member"] for e in events if e["outcome"] in ("finished", "left", "moved", "stopped")}
    steps: dict[int, list[str]] = {}
    last_words: dict[int, list[str]] = {}
    for member, trace in traces.items():
        for step, contributors in trace.steps.items():
            if member not in well and step == max(trace.steps):
                last_words[step] = contributors
            else:
                assert steps.setdefault(step, contributors) == contributors, f"{member} has step {step} differently"
    return {**last_words, **steps}


def as_trained(problem: Problem, folder: Path) -> Problem:
    """A problem that was to go on until it was told to stop, with the epochs that it came to.

    Not one that only dead ranks had begun: they may have learnt that training goes on, and the others not.
    """
    traces = read_traces(folder).values()
    finished = {step for trace in traces for step in trace.steps}
    batches = [batch for trace in traces for batch in trace.batches.values() if batch["step"] + 1 in finished]
    return dataclasses.replace(problem, epochs=1 + max(batch["epoch"] for batch in batches))


def check_exactly_once(problem: Problem, steps: Mapping[int, Sequence[str]], traces: Mapping[str, Trace]) -> None:
    """Assert that the finished steps of each epoch hold each sample of the dataset exactly once."""
    seen: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(problem.epochs)}
    for step, contributors in steps.items():
        for member in contributors:
            batch = traces[member].batches[step - 1]
            if not batch["ghost"]:
                seen[batch["epoch"]].update(batch["indices"])
    for epoch, counts in seen.items():
        skipped = sorted(set(range(problem.samples)) - set(counts))
        again = sorted(index for index, count in counts.items() if count > 1)
        assert not skipped, f"epoch {epoch}: samples {skipped} were skipped"
        assert not again, f"epoch {epoch}: samples {again} were trained on more than once"


def replay(
    problem: Problem, steps: Mapping[int, Sequence[str]], traces: Mapping[str, Trace]
) -> dict[str, torch.Tensor]:
    """Train in this process with the logged membership history; the final parameters and buffers."""
    data, model = Samples(problem.samples), build_model()
    optimizer, scheduler = build_optimizer(model, problem.optimizer)
    parameters = list(model.parameters())
    for step in range(1, len(steps) + 1):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        after: dict[str, torch.Tensor] = {}
        total: list[torch.Tensor] | None = None
        count = 0
        for rank, member in enumerate(steps[step]):
            batch = traces[member].batches[step - 1]
            model.load_state_dict(before, strict=False)
            indices = torch.tensor(batch["indices"])
            loss = nn.functional.mse_loss(model(data.inputs[indices]), data.targets[indices])
            if rank == 0:
                after = {name: buffer.clone() for name, buffer in model.named_buffers()}
            if not batch["ghost"]:
                gradients = torch.autograd.grad(loss, parameters)
                total = list(gradients) if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
                count += 1
        assert total is not None, f"step {step} has no gradient at all"
        model.load_state_dict(after, strict=False)
        for parameter, summed in zip(parameters, total, strict=True):
            parameter.grad = summed / count
        if problem.clip is not None:
            nn.utils.clip_grad_norm_(parameters, problem.clip)
        share = len(steps[step]) / problem.ranks
        factor = {"linear": share, "sqrt": math.sqrt(share)}.get(problem.policy, 1.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(here: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, relative to that tensor's largest value."""
    assert here.keys() == there.keys()
    worst = 0.0
    for name, tensor in here.items():
        scale = max(tensor.abs().max().item(), 1e-30)
        worst = max(worst, (tensor - there[name]).abs().max().item() / scale)
    return worst
