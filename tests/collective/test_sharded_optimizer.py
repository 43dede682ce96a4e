"""An optimizer whose state is split within nodes and replicated between them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from chaos_mpi import Session
from chaos_mpi.errors import ConfigError
from chaos_mpi.torch import ShardedOptimizer

pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(60)]


def build() -> torch.nn.Sequential:
    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def set_gradients(models: list[torch.nn.Module], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for params in zip(*[model.parameters() for model in models], strict=True):
        gradient = torch.randn(params[0].shape, generator=generator)
        for param in params:
            param.grad = gradient.clone()


def groups_of(model: torch.nn.Module) -> list[dict[str, object]]:
    params = list(model.parameters())
    return [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "weight_decay": 0.0}]


def halves(session: Session) -> dict[str, str]:
    """Two nodes: the first half of the ranks, and the rest."""
    return {member: "a" if rank < session.size // 2 else "b" for rank, member in enumerate(session.members)}


def test_the_parameters_are_those_of_the_plain_optimizer(session: Session) -> None:
    ours, plain = build(), build()
    nodes = halves(session)
    optimizer = ShardedOptimizer(groups_of(ours), torch.optim.AdamW, node_of=nodes.__getitem__, lr=0.01)
    reference = torch.optim.AdamW(groups_of(plain), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, reference)]
    for step in range(4):
        set_gradients([ours, plain], step)
        optimizer.step()
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    everyone = session.gather([nodes[session.member], *optimizer.kept])
    for node in ("a", "b"):
        kept = sorted(number for row in everyone if row[0] == node for number in row[1:])
        assert kept == list(range(session.size - session.size // 2))


def test_parameters_that_are_added_later(session: Session) -> None:
    ours, plain = build(), build()
    optimizer = ShardedOptimizer(ours[0].parameters(), torch.optim.AdamW, node_of=halves(session).__getitem__, lr=0.01)
    reference = torch.optim.AdamW(plain[0].parameters(), lr=0.01)
    for model, chosen in ((ours, optimizer), (plain, reference)):
        chosen.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
    for step in range(2):
        set_gradients([ours, plain], step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    with pytest.raises(ConfigError, match="before the first step"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def test_a_member_that_lacks_its_part_gets_it(session: Session) -> None:
    ours, plain = build(), build()
    optimizer = ShardedOptimizer(
        ours.parameters(), torch.optim.AdamW, parts=2, node_of=halves(session).__getitem__, lr=0.01
    )
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, reference)]
    for step in range(4):
        set_gradients([ours, plain], step)
        if step == 2 and session.rank == 0:  # as a rank that has just joined
            optimizer.load_state_dict({})
            optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_checkpoints(session: Session, tmp_path: Path) -> None:
    dist.init_process_group("chaos")
    folder: list[object] = [str(tmp_path)]
    dist.broadcast_object_list(folder)
    ours, plain = build(), build()
    optimizer = ShardedOptimizer(
        ours.parameters(), torch.optim.AdamW, parts=2, node_of=halves(session).__getitem__, lr=0.01
    )
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for step in range(2):
        set_gradients([ours, plain], step)
        optimizer.step()
        reference.step()
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=str(folder[0]))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer = ShardedOptimizer(
        ours.parameters(), torch.optim.AdamW, parts=2, node_of=halves(session).__getitem__, lr=0.5
    )
    before = [param.detach().clone() for param in ours.parameters()]
    optimizer.allocate()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
    state = {"optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=str(folder[0]))
    optimizer.load_state_dict(state["optimizer"])
    assert sorted(saved) == sorted(optimizer.state_dict())
    for step in range(2, 4):
        set_gradients([ours, plain], step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    dist.destroy_process_group()
