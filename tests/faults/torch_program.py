"""Scripts that use ``torch.distributed`` alone, and lose a rank: ``torch_program.py NAME FOLDER``.

Each returns what it saw, which is written into FOLDER for the test.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

if sys.argv[1] != "fully_sharded":  # which needs all of torch
    import quick_start  # noqa: F401
import torch
import torch.distributed as dist
from torch import nn

import chaos_mpi.torch
from chaos_mpi.errors import GroupBrokenError, ViewChangedError


def die() -> None:
    """End this process as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def unmodified_ddp(rank: int) -> list[float]:
    """The gradient of rank r is r + 1; rank 1 dies in its third forward."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients = []
    for step in range(6):
        if step == 2 and rank == 1:
            die()
        optimizer.zero_grad()
        model(torch.tensor([[rank + 1.0]])).sum().backward()
        optimizer.step()
        gradients.append(float(next(model.parameters()).grad.item()))  # type: ignore[union-attr]
    return gradients


def _in_steps(rank: int, act: Callable[[], object]) -> int:
    """Six steps in torch's usual frame, where the third forward of rank 1 does something; the number of ranks after."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1, bias=False))
    model.register_comm_hook(chaos_mpi.torch.ElasticState(model), chaos_mpi.torch.elastic_hook)
    dist.new_group(list(range(dist.get_world_size())))
    session = chaos_mpi.current_session()

    def reach(*_: object) -> None:
        if rank == 1 and session.step == 2:
            act()

    model.module.register_forward_hook(reach)
    size = 0
    try:
        for _ in range(6):
            model(torch.tensor([[rank + 1.0]])).sum().backward()
            size = dist.get_world_size()
    finally:
        dist.destroy_process_group()
    return size


def fails_in_a_frame(rank: int) -> int:
    """Rank 1 raises an error, and ``finally`` comes to the end of the process group before the others do."""

    def fail() -> None:
        raise KeyError("a mistake of one rank")

    return _in_steps(rank, fail)


def leaves_in_a_frame(rank: int) -> int:
    """Rank 1 leaves by agreement: it gets a SystemExit where members negotiate."""
    return _in_steps(rank, chaos_mpi.current_session().request_leave)


def initialising(_: int) -> float:
    """Rank 0 has died before the others could make their process group."""
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    chaos_mpi.finalize()
    return total.item()


def mistaken(rank: int) -> None:
    """A mistake that is made by every rank."""
    total = torch.ones(1)
    dist.all_reduce(total)
    raise KeyError("a mistake in the script")


def by_environment(rank: int) -> int:
    """RANK, WORLD_SIZE and an address are set, as torchrun does it, or the script itself."""
    return rank


def wrapping(rank: int) -> dict[str, Any]:
    """Rank 1 dies while the others wrap the model, which DDP compares between ranks."""
    if rank == 1:
        die()
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    model(torch.ones(4, 3)).sum().backward()
    return {"size": dist.get_world_size(), "weights": [p.flatten().tolist() for p in model.parameters()]}


def collectives(rank: int) -> dict[str, Any]:
    """Rank 2 dies, and the others make one call after another."""
    size = dist.get_world_size()
    seen: dict[str, Any] = {}
    outputs = [torch.full((2,), -1) for _ in range(size)]
    if rank == 2:
        die()
    dist.all_gather(outputs, torch.full((2,), rank + 1))
    seen["gathered"] = [int(t[0]) for t in outputs]
    total = [torch.tensor([1.0, rank]) for _ in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in total]
    for work in works:
        work.wait()
    seen["sums"] = [t.tolist() for t in total]
    average = torch.tensor([float(rank)])
    dist.all_reduce(average, dist.ReduceOp.AVG)
    seen["average"] = average.item()
    seen["now"] = [dist.get_rank(), dist.get_world_size()]
    return seen


def objects(rank: int) -> dict[str, Any]:
    """Rank 1 dies before the others exchange objects of different lengths, in lists as long as the job was once."""
    gathered: list[Any] = [None] * dist.get_world_size()
    if rank == 1:
        die()
    seen: dict[str, Any] = {}
    for name in ("first", "second"):
        dist.all_gather_object(gathered, "x" * (10 * rank))
        seen[name] = [None if entry is None else len(entry) for entry in gathered]
    outputs = [torch.empty(1, dtype=torch.int64) for _ in range(4)]
    dist.all_gather(outputs, torch.tensor([rank]))
    seen["old ranks"] = [int(t) for t in outputs]
    return seen


def roots(rank: int) -> dict[str, Any]:
    """Rank 0 dies instead of handing something out, and rank 1 does it; then the new rank 2 dies likewise."""
    seen: dict[str, Any] = {}
    tensor = torch.full((3,), rank)
    if rank == 0:
        die()
    dist.broadcast(tensor, 0)
    seen["broadcast"] = tensor.tolist()
    tensor = torch.full((3,), rank)
    if rank == 3:
        die()
    try:
        dist.broadcast(tensor, 2)
    except ViewChangedError as error:
        seen["error"] = str(error)
    dist.all_reduce(tensor)
    seen["sum"] = tensor.tolist()
    return seen


def names(rank: int) -> dict[str, Any]:
    """Rank 0 dies; ranks of a group that it was not in go on with the numbers that it was made with."""
    seen: dict[str, Any] = {}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if rank == 0:
        die()
    dist.barrier()
    mine = pairs[rank // 2]
    if rank > 1:
        seen["group"] = [mine.rank(), mine.size()]
        total = torch.full((1,), float(rank))
        dist.all_reduce(total, group=mine)
        seen["sum"], peer = total.item(), 5 - rank
        works = [dist.isend(torch.full((1,), float(rank)), peer, group=mine), dist.irecv(total, peer, group=mine)]
        for work in works:
            work.wait()
        seen["from peer"] = total.item()
        total = torch.full((1,), float(rank))
        dist.broadcast(total, 3, group=mine)
        seen["from root"] = total.item()
    return seen


def handing_out_objects(rank: int) -> dict[str, Any]:
    """Rank 0 dies instead of handing out an object, which nobody else has."""
    given: list[Any] = [{"learning": "rate"}] if rank == 0 else [None]
    seen: dict[str, Any] = {}
    if rank == 0:
        die()
    try:
        dist.broadcast_object_list(given)
    except ViewChangedError as error:
        seen["error"] = str(error)
    given = [rank]
    dist.broadcast_object_list(given)
    seen["second"] = given
    return seen


def scattering_objects(rank: int) -> dict[str, Any]:
    """Rank 0 dies instead of handing out an object to each rank."""
    given: list[Any] = [None]
    seen: dict[str, Any] = {}
    if rank == 0:
        die()
    try:
        dist.scatter_object_list(given, None, src=0)
    except ViewChangedError as error:
        seen["error"] = str(error)
    mine = [{"to": to} for to in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.scatter_object_list(given, mine, src=0)
    seen["second"] = given
    return seen


def gathering(rank: int) -> dict[str, Any]:
    """Rank 0 dies instead of taking what is gathered, for which nobody else has room."""
    seen: dict[str, Any] = {}
    if rank == 0:
        die()
    dist.gather(torch.tensor([rank]), None, dst=0)
    rows = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(torch.tensor([rank]), rows, dst=0)
    seen["second"] = [int(row) for row in rows] if rows is not None else None
    return seen


def subgroups(rank: int) -> dict[str, Any]:
    """Rank 1 of five dies, and the others make groups of two."""
    if rank == 1:
        die()
    dist.barrier()
    seen: dict[str, Any] = {"ranks": dist.get_process_group_ranks(None)}
    mine, _ = dist.new_subgroups(2)
    total = torch.full((1,), float(dist.get_rank()))
    dist.all_reduce(total, group=mine)
    seen["sum"] = total.item()
    return seen


def fully_sharded(rank: int) -> dict[str, Any]:
    """FSDP on a group of its own: rank 1 dies in the third step, and the others are told in that step."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    mesh = DeviceMesh.from_group(dist.new_group(), "cpu")
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        if rank == 1 and step == 2:
            die()
        try:
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        except GroupBrokenError as error:
            return {"step": step, "error": str(error)}
    return {}


def messages(rank: int) -> dict[str, Any]:
    """Rank 0 dies while rank 1 waits for a message of it; the others exchange messages all the same."""
    seen: dict[str, Any] = {}
    tensor = torch.zeros(1)
    if rank == 0:
        die()
    if rank == 1:
        try:
            dist.recv(tensor, 0)
        except GroupBrokenError as error:
            seen["error"] = str(error)
    dist.barrier()
    seen["now"] = [dist.get_rank(), dist.get_world_size()]
    if rank == 1:
        seen["source"] = dist.recv(tensor)
        seen["received"] = tensor.item()
    if rank == 3:
        dist.send(torch.full((1,), 7.0), 0)  # which was rank 1
    dist.barrier()
    return seen


def group_of_some(rank: int) -> dict[str, Any]:
    """Rank 2 dies, which is in a group with ranks 0 and 1."""
    seen: dict[str, Any] = {}
    group = dist.new_group([0, 1, 2])
    tensor = torch.ones(1)
    if rank < 3:
        dist.all_reduce(tensor, group=group)
    seen["before"] = tensor.item()
    if rank == 2:
        die()
    errors = []
    for _ in range(2 if rank < 3 else 0):
        try:
            dist.all_reduce(tensor, group=group)
        except GroupBrokenError as error:
            errors.append(str(error))
    seen["errors"] = errors
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    seen["after"] = tensor.item()
    return seen


def _train_sharded(
    rank: int, deaths: dict[int, int], leaves: dict[int, int] | None = None, per_node: int = 2
) -> dict[str, Any]:
    """Four ranks, ``per_node`` on each of the nodes, against the same steps without sharding.

    Args:
        rank: of this process.
        deaths, leaves: who dies, or asks to leave, in which step.
        per_node: how many ranks are a node.
    """
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    model.register_comm_hook(chaos_mpi.torch.ElasticState(model), chaos_mpi.torch.elastic_hook)
    nodes = {member: place // per_node for place, member in enumerate(chaos_mpi.current_session().members)}
    optimizer = chaos_mpi.torch.ShardedOptimizer(
        model.parameters(), torch.optim.AdamW, node_of=lambda member: str(nodes[member]), lr=0.1
    )
    plain = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
    reference = torch.optim.AdamW(plain, lr=0.1)
    seen: dict[str, Any] = {"error": ""}
    for step in range(8):
        if deaths.get(rank) == step:
            die()
        if (leaves or {}).get(rank) == step:
            chaos_mpi.current_session().request_leave()
        optimizer.zero_grad()
        model(torch.full((3, 4), float(rank + step))).pow(2).sum().backward()
        for copy, param in zip(plain, model.parameters(), strict=True):
            copy.grad = param.grad.clone()  # type: ignore[union-attr]
        try:
            optimizer.step()
        except chaos_mpi.RecoveryError as error:
            seen["error"] = str(error)
            break
        reference.step()
    seen["equal"] = all(torch.equal(a, b) for a, b in zip(plain, model.parameters(), strict=True))
    seen["parameters"] = [param.flatten().tolist() for param in model.parameters()]
    seen["kept"] = list(optimizer.kept)
    return seen


def sharded_optimizer(rank: int) -> dict[str, Any]:
    """One rank of each node dies, one after the other, and not the same."""
    return _train_sharded(rank, {1: 2, 2: 5})


def sharded_optimizer_and_a_leave(rank: int) -> dict[str, Any]:
    """There is one node, and a rank of it leaves, which alone keeps its part."""
    return _train_sharded(rank, {}, {1: 2}, per_node=4)


def sharded_optimizer_without_replica(rank: int) -> dict[str, Any]:
    """A whole node dies, and then one rank of the other."""
    return _train_sharded(rank, {0: 2, 1: 2, 3: 5})


if __name__ == "__main__":
    if sys.argv[1] == "by_environment":
        rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
        wrong = int(os.environ.get("WRONG", "0"))
        os.environ.update(RANK=str((rank + wrong) % size), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="192.0.2.1", MASTER_PORT="29500")  # where nobody is
    if sys.argv[1] == "initialising":
        session = chaos_mpi.init()
        if session.rank == 0:
            die()
    dist.init_process_group("chaos", timeout=timedelta(seconds=20))
    program: Callable[[int], Any] = globals()[sys.argv[1]]
    own = dist.get_rank()
    result = program(own)
    if dist.is_initialized():
        dist.destroy_process_group()
    (Path(sys.argv[2]) / f"saw-{own}.json").write_text(json.dumps(result))
