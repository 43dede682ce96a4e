"""Two ranks that show whether fault tolerance works here: one kills itself, the other notices and goes on alone.

Run by ``chaosrun --doctor`` as ``mpirun ... python -m chaos_mpi.mpi.probe``. The survivor prints one JSON line.
"""

from __future__ import annotations

import json
import os
import signal
import time

import torch

from chaos_mpi.errors import PeerFailedError
from chaos_mpi.mpi import runtime

#: Longest wait for each part, seconds.
LIMIT_S = 15.0


def main() -> None:
    """Be one of the two ranks."""
    world = runtime.start(LIMIT_S)
    ones = torch.ones(1024)
    pending = world.pending()
    pending.reduce(ones, "sum")
    pending.wait(lambda: "the first sum", LIMIT_S)
    found: dict[str, object] = {"size": world.size, "sum": ones[0].item()}
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.perf_counter()
    again = world.pending()
    try:
        again.reduce(ones, "sum")
        again.wait(lambda: "the death of the other rank", LIMIT_S)
    except PeerFailedError:
        found["detect_ms"] = round((time.perf_counter() - begun) * 1e3, 1)
    begun = time.perf_counter()
    world.revoke()
    again.drain()
    smaller = world.shrink(LIMIT_S, lambda: "the shrink")
    found["shrink_ms"] = round((time.perf_counter() - begun) * 1e3, 1)
    found["left"] = smaller.size
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
