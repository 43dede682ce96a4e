"""What is to be alike at all members, and is not: newcomers get what rank 0 has, and at the end all have that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import xxhash

from chaos_mpi.elastic.digest import tensor_bytes
from chaos_mpi.replication.devices import await_devices
from chaos_mpi.replication.layout import dense

if TYPE_CHECKING:
    from chaos_mpi.elastic.collectives import CollectiveCalls
    from chaos_mpi.elastic.session import Session

log = logging.getLogger("chaos_mpi.elastic")


def tensors_of_rank_0(session: Session) -> dict[str, torch.Tensor]:
    """What members serve instead of their own where these differ, by name: copies of what rank 0 has.

    Parameters, and what optimizers keep, are the same at all members. Module buffers need not be (statistics of
    BatchNorm that are not synchronised), nor what other objects of the state keep. But each member sends a part of it,
    and checks another's part. The members' own tensors stay as they are. Called by all members, between two steps.
    """
    shared = _shared(session, session.loose_tensors())
    if shared and session.rank == 0:
        log.warning(
            "step %d: %s differ between the ranks (%d tensors); a rank that joins gets those of rank 0",
            session.step, ", ".join(name.partition(".")[2] for name in list(shared)[:3]), len(shared),
        )  # fmt: skip
    return shared


def even_out(session: CollectiveCalls, mine: Mapping[str, torch.Tensor]) -> None:
    """Give all members what rank 0 has of these live tensors, by name. Called by all members, between two steps."""
    with torch.no_grad():
        for name, tensor in _shared(session, mine).items():
            mine[name].copy_(tensor)


def _shared(session: CollectiveCalls, mine: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of what rank 0 has of those that differ, by name."""
    await_devices(mine.values())
    digests = {name: xxhash.xxh3_128_hexdigest(tensor_bytes(tensor)) for name, tensor in mine.items()}
    kinds = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in mine.items()}
    words = sorted((name, kinds[name], digests[name]) for name in mine)
    if len(set(session.gather(xxhash.xxh3_128_hexdigest(repr(words).encode(errors="backslashreplace"))))) == 1:
        return {}
    names = differing(session.gather({name: [kinds[name], digests[name]] for name in mine}))
    shared = {name: dense(mine[name]).to("cpu", copy=True) for name in names}
    session.share("tensors that differ", list(shared.values()))
    return shared


def differing(rows: Sequence[Mapping[str, Sequence[str]]]) -> list[str]:
    """Names of the tensors that all members have of one kind, with different values. Pure.

    Args:
        rows: of each member, what its tensors are: their kind, and a digest, by name.
    """
    everywhere = [name for name in rows[0] if all(name in row for row in rows)]
    alike = [name for name in everywhere if len({row[name][0] for row in rows}) == 1]
    return [name for name in alike if len({row[name][1] for row in rows}) > 1]
