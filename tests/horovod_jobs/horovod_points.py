"""Points where a rule of the tests with Horovod may hold, besides those of :mod:`fault_points`.

``horovod`` (Horovod has all gradients of the step), ``confirm`` (all of this rank's are reduced), ``horovod:start`` (it
is to be started on a new communicator), and ``horovod:in start``, which is somewhere inside that.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from fault_points import FaultPoints
from problem import Problem


def begin() -> tuple[dict[str, Any], Path, Problem, FaultPoints]:
    """The job that a script is told of by its first argument, its folder, what to train, and the rules, which begin."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    faults = FaultPoints(job["faults"], folder, may_be_armed=job["may_be_armed"])
    attach(faults)
    faults.reach("start")
    return job, folder, Problem(**job["problem"]), faults


def attach(faults: FaultPoints) -> None:
    """Find the points that lie inside the integration."""
    from chaos_mpi.horovod import optimizer, runtime, step

    for owner, name, point in (
        (optimizer.KeptGradients, "finish", "horovod"),
        (step.HorovodStep, "_confirm", "confirm"),
        (runtime.HorovodRuntime, "start", "horovod:start"),
    ):
        setattr(owner, name, faults._before_call(getattr(owner, name), lambda *_, point=point: point))
    start = runtime.HorovodRuntime.start

    def start_with_a_fault_inside(self: Any, world: Any) -> None:
        timer = threading.Timer(0.002, faults.reach, ("horovod:in start",))
        timer.daemon = True
        timer.start()
        start(self, world)

    runtime.HorovodRuntime.start = start_with_a_fault_inside  # type: ignore[method-assign]
