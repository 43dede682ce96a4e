"""What ``chaosrun --doctor`` runs to learn about MPI here; each way of running it prints one JSON line.

``python -m chaos_mpi.mpi.probe library`` says which mpi4py there is and which MPI library it loads. Without an argument
it is one of two ranks that show whether fault tolerance works: one kills itself, the other notices and goes on alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

#: Longest wait for each part, seconds.
LIMIT_S = 10.0


def library() -> dict[str, object]:
    """Versions of mpi4py and of the MPI library, without starting MPI; ``problem`` is why there is no library."""
    try:
        import mpi4py
    except ImportError as error:
        return {"problem": f"{error}"}
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, libmpi is not
        return {"mpi4py": mpi4py.__version__, "problem": f"{error}"}
    return {"mpi4py": mpi4py.__version__, "library": MPI.Get_library_version().strip("\0")}


def survive() -> dict[str, object]:
    """What the survivor of two ranks saw. Does not return at the other one."""
    import torch

    from chaos_mpi.errors import PeerFailedError
    from chaos_mpi.mpi import runtime

    world = runtime.start(LIMIT_S)
    found: dict[str, object] = {"size": world.size}
    if world.size != 2:
        return found
    ones = torch.ones(1024, device="cpu")
    pending = world.pending()
    pending.reduce(ones, "sum")
    pending.wait(lambda: "the first sum", LIMIT_S)
    found["sum"] = ones[0].item()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.perf_counter()
    pending = world.pending()
    try:
        pending.reduce(ones, "sum")
        pending.wait(lambda: "the death of the other rank", LIMIT_S)
    except PeerFailedError:
        found["detect_ms"] = round((time.perf_counter() - begun) * 1e3, 1)
    begun = time.perf_counter()
    world.revoke()
    pending.drain()
    smaller = world.shrink(LIMIT_S, lambda: "the shrink")
    found["shrink_ms"] = round((time.perf_counter() - begun) * 1e3, 1)
    found["left"] = smaller.size
    found["agreed"] = smaller.agree(True, LIMIT_S, lambda: "an agreement after the shrink")
    return found


def main() -> None:
    """Print what was found, as JSON."""
    print(json.dumps(library() if sys.argv[1:] == ["library"] else survive()), flush=True)
    # Not MPI_Finalize, which would wait for the dead rank (see runtime.stop).
    os._exit(0)


if __name__ == "__main__":
    main()
