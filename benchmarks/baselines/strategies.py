"""How the state gets to a newcomer that is in the communicator already: one function for each side and strategy.

All run at a step boundary, and everybody waits until the newcomer has all: it is to be in the next allreduce.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from synthetic import SyntheticModel

from chaos_mpi.mpi.channel import Channel
from chaos_mpi.mpi.runtime import Watchdog
from chaos_mpi.mpi.world import MPI, World
from chaos_mpi.replication.layout import Layout
from chaos_mpi.replication.puller import StatePuller
from chaos_mpi.replication.source import StateSource
from chaos_mpi.sharding import Neighbour

#: Longest wait for one state, seconds.
LIMIT_S = 240.0


def send_from_one(world: World, model: SyntheticModel, source: int) -> None:
    """The members' side of the single source: it sends everything, the others wait. The newcomer has the last rank."""
    if world.rank == source:
        tensors = variables(model)
        serving = StateSource(Channel(world), [world.size - 1], Layout.of(tensors), tensors, {})
        serving.serve(LIMIT_S, lambda: "the newcomer to take the state")


def pull_from_one(world: World, model: SyntheticModel, source: int) -> None:
    """The newcomer's side of the single source."""
    channel, tensors = Channel(world), variables(model)
    layout = Layout.of(tensors)
    puller = StatePuller(channel, {source: Neighbour(f"rank {source}", 1e9)}, layout, tensors, LIMIT_S)
    puller.fetch([(0, layout.total_bytes)])
    channel.send(source, {"received": True})


def all_gather(world: World, model: SyntheticModel) -> None:
    """Both sides of the all-gather: each old worker puts in its slice of the variables, the newcomer nothing.

    One blocking call over old and new workers, so that the old ones get all slices, too.
    """
    nbytes = [4 * n for n in slices([p.numel() for p in model.parameters()], world.size - 1)]
    starts = [0, *itertools.accumulate(nbytes)]
    buffer = [MPI.buffer.fromaddress(model.flat.data_ptr(), model.flat.nbytes), [*nbytes, 0], starts, MPI.BYTE]
    with Watchdog("MPI_Allgatherv of the state", LIMIT_S):
        world.comm.Allgatherv(MPI.IN_PLACE, buffer)


def variables(model: SyntheticModel) -> dict[str, torch.Tensor]:
    """The state, by name."""
    return {name: param.detach() for name, param in model.named_parameters()}


def slices(sizes: Sequence[int], workers: int) -> list[int]:
    """Sizes of the slices of a variable list, one for each worker, with as equal numbers of variables as can be."""
    cuts = [len(sizes) * i // workers for i in range(workers + 1)]
    return [sum(sizes[a:b]) for a, b in itertools.pairwise(cuts)]
