"""Calls of Horovod's interface in which a rank dies: ``horovod_calls.py JOB.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import quick_start  # noqa: F401
import torch
from fault_points import FaultPoints

import chaos_mpi.horovod.torch as hvd
from chaos_mpi import current_session


def main() -> None:
    """Four ranks; the second dies before the calls that the others make."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    faults = FaultPoints(job["faults"], folder)
    hvd.init()
    session = current_session()
    first = hvd.add_process_set([0, 1])
    second = hvd.add_process_set([2, 3])
    mine = first if first.included() else second
    results: dict[str, Any] = {"before": hvd.allreduce(torch.ones(1), process_set=mine, op=hvd.Sum).item()}
    hvd.barrier()
    if job["what"] == "join":
        if hvd.rank() == 0:
            results["last"] = hvd.join()
        else:
            faults.reach("call")
            results["sum"] = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
            results["last"] = hvd.join()
        results["members"] = hvd.size()
    elif job["what"] == "bound":
        rows = torch.arange(12)
        calls = {
            "alltoall": lambda: hvd.alltoall(rows),
            "reducescatter": lambda: hvd.reducescatter(rows, op=hvd.Sum),
            "broadcast": lambda: hvd.broadcast(torch.tensor([hvd.rank()]), 2),
            "splits": lambda: hvd.alltoall(rows, [3, 3, 3, 3]),
        }
        faults.reach("call")
        try:
            results["got"] = calls[job["call"]]().tolist()
        except hvd.HorovodInternalError as error:
            results["got"] = str(error)
        results["next"] = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
    elif job["what"] == "gradient":
        given = torch.ones(hvd.rank() + 1, requires_grad=True)
        gathered = hvd.allgather(given)
        faults.reach("call")
        (gathered * torch.arange(len(gathered))).sum().backward()
        results["gradient"] = given.grad.tolist()
    else:
        faults.reach("call")
        handles = [hvd.allreduce_async(torch.ones(4) * i, name=f"tensor {i}", op=hvd.Sum) for i in range(4)]
        results["sums"] = [hvd.synchronize(handle)[0].item() for handle in handles]
        results["mean"] = hvd.allreduce(torch.full((2,), 3.0))[0].item()
        results["object"] = hvd.broadcast_object(["from", session.member], 1)
        results["all"] = hvd.allgather_object(session.member)
        for name, group in (("first", first), ("second", second)):
            if group.included():
                try:
                    results[name] = hvd.allreduce(torch.ones(1), process_set=group, op=hvd.Sum).item()
                except hvd.HorovodInternalError as error:
                    results[name] = str(error)
        again = hvd.add_process_set([0, 1])
        if again.included():
            results["again"] = hvd.allreduce(torch.ones(1), process_set=again, op=hvd.Sum).item()
        results["order"] = order(hvd.rank())
    (folder / f"result-{session.member}.json").write_text(json.dumps({"steps": 0, **results}))


def order(rank: int) -> list[float]:
    """Calls in an order of this rank's own."""
    names = ["a", "b", "c"] if rank == 0 else ["c", "a", "b"]
    handles = {name: hvd.allreduce_async(torch.full((1,), float(ord(name))), name=name) for name in names}
    return [hvd.synchronize(handles[name]).item() for name in "abc"]


if __name__ == "__main__":
    main()
