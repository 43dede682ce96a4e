"""Collective calls of all kinds, in an order drawn at random, while ranks die: ``calls.py FOLDER SEED CALLS DEATHS``.

Each rank checks each result against who took part. The ranks from 1 on, as many as DEATHS says, kill themselves, each
in one of the calls, up to two milliseconds after its beginning. What the others saw is left in ``result-N.json``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import quick_start  # noqa: F401
import torch
from fault_points import own_label

import chaos_mpi
from chaos_mpi.elastic.exchanges import AllGather, AllReduce, AllToAll, Barrier, Broadcast, Exchange, ReduceScatter
from chaos_mpi.elastic.subgroup import Subgroup
from chaos_mpi.errors import GroupBrokenError, ViewChangedError


def value_of(member: str) -> int:
    """A number that is the member's own."""
    return int(member.rpartition(":")[2])


class Calls:
    """Makes calls, and knows what has to come out of them."""

    def __init__(self, session: chaos_mpi.Session, folder: Path) -> None:
        self.session = session
        self.mine = value_of(session.member)
        self.folder = folder
        self.seen: list[list[str]] = []
        self.kinds: list[Callable[[], list[str]]] = [
            self.all_reduce, self.all_gather, self.all_to_all, self.broadcast, self.broadcast_from_last,
            self.reduce_scatter, self.barrier, self.background,
        ]  # fmt: skip

    def run(self, operation: Exchange) -> tuple[str, ...]:
        """Make a call; who took part."""
        self.session.execute(operation)
        operation.finish()
        return operation.contributors

    def all_reduce(self) -> list[str]:
        """Of large and of small tensors."""
        operation = AllReduce("sum", [torch.full((200_000,), float(self.mine)), torch.tensor([self.mine])])
        members = self.run(operation)
        total = sum(value_of(m) for m in members)
        assert operation.results()[1].item() == total
        assert bool((operation.results()[0] == operation.results()[0][0]).all())
        return list(members)

    def all_gather(self) -> list[str]:
        """Of lengths that differ, also 0."""
        operation = AllGather("gather", torch.full((self.mine % 3,), self.mine))
        members = self.run(operation)
        assert operation.result.tolist() == [value_of(m) for m in members for _ in range(value_of(m) % 3)]
        return list(members)

    def all_to_all(self) -> list[str]:
        """One number to each."""
        size = self.session.size
        operation = AllToAll("exchange", torch.tensor([self.mine * 10 + to for to in range(size)]), None, size)
        members = self.run(operation)
        rank = members.index(self.session.member)
        assert operation.result.tolist() == [value_of(m) * 10 + rank for m in members]
        return list(members)

    def broadcast(self) -> list[str]:
        """From rank 0, whoever it is."""
        tensor = torch.tensor([self.mine])
        operation = Broadcast("from 0", [tensor], 0)
        members = self.run(operation)
        operation.deliver()
        assert tensor.item() == value_of(members[0])
        return list(members)

    def broadcast_from_last(self) -> list[str]:
        """From the last rank of those that call."""
        tensor = torch.tensor([self.mine])
        operation = Broadcast("from last", [tensor], self.session.size - 1)
        members = self.run(operation)
        operation.deliver()
        assert tensor.item() == value_of(members[-1])
        return list(members)

    def reduce_scatter(self) -> list[str]:
        """A row for each."""
        size = self.session.size
        operation = ReduceScatter("scatter", torch.full((size, 3), self.mine), [1] * size)
        members = self.run(operation)
        assert operation.result.tolist() == [[sum(value_of(m) for m in members)] * 3]
        return list(members)

    def barrier(self) -> list[str]:
        """No data."""
        return list(self.run(Barrier()))

    def background(self) -> list[str]:
        """Several calls, in the background."""
        futures = [self.session.submit(self.all_reduce), self.session.submit(self.broadcast)]
        return [member for future in futures for member in future.result(60)]


def die_soon(delay_s: float) -> None:
    """Have this process killed a little later."""
    threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()


def main() -> None:
    """Call."""
    folder, seed, n_calls, deaths = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    session = chaos_mpi.init(timeout_s=40.0)
    label, common, own = own_label(), random.Random(seed), random.Random(seed * 1000 + own_label())
    my_last = own.randrange(5, n_calls - 5) if 1 <= label <= deaths else -1
    calls = Calls(session, folder)
    pair = Subgroup(session, [0, 1], 1, 30.0) if session.rank < 2 else None
    lost_pair = False
    for number in range(n_calls):
        call = common.choice(calls.kinds)
        if number == my_last:
            die_soon(own.uniform(0.0, 0.002))
        try:
            calls.seen.append([call.__name__, *call()])
        except ViewChangedError:
            calls.seen.append([call.__name__, "view changed"])
        if pair is not None and not lost_pair:
            try:
                pair.execute(AllReduce("pair", [torch.ones(10)]))
            except GroupBrokenError:
                lost_pair = True
    identical = session.close().size
    result = {"seen": calls.seen, "size": identical, "lost_pair": lost_pair}
    (folder / f"result-{label}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
