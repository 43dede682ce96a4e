"""One rank of a job that ``scale_out.py`` lets a rank join; it trains until the driver hangs up.

It is started outside of the test bed and puts itself into a host before MPI is initialised. So a newcomer, which is
started with the command line of a member, gets to the host that is meant for newcomers, and the product needs
no knowledge of test beds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import SPEC_VARIABLE, Link, join_driver

ROOT = Path(__file__).resolve().parents[1]


def go_to_host() -> None:
    """Become the same program in this rank's host of the test bed."""
    sys.path.insert(0, str(ROOT))
    from launch.testbed.testbed import TestBed

    spec = json.loads(os.environ[SPEC_VARIABLE])
    bed = TestBed.attach(spec["bed"])
    if socket.gethostname() in bed.hosts:
        return
    spawned = os.environ["OMPI_COMM_WORLD_SIZE"] == "1"
    host = spec["newcomer_host"] if spawned else spec["hosts"][int(os.environ["OMPI_COMM_WORLD_RANK"])]
    argv = bed.command(host, [sys.executable, *sys.orig_argv[1:]])
    os.execvp(argv[0], argv)


def train_chaos(link: Link, spec: dict[str, Any]) -> None:
    """An ordinary elastic training script."""
    import torch
    from synthetic import BATCH_SIZE, Journal, SyntheticModel, dataset, loss_of

    import chaos_mpi

    session = chaos_mpi.init(timeout_s=240, batch_policy="none")
    newcomer = os.environ["OMPI_COMM_WORLD_SIZE"] == "1"
    journal = Journal(Path(spec["directory"]), "newcomer" if newcomer else f"rank{session.rank}")
    torch.manual_seed(0)
    net = SyntheticModel(spec["state_bytes"], blank=newcomer)
    journal.follow(net)
    model = chaos_mpi.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.trained(), lr=0.01)
    data = dataset()
    sampler = chaos_mpi.ElasticSampler(data, batch_size=BATCH_SIZE, seed=0)
    loader: Any = chaos_mpi.DataLoader(data, batch_sampler=sampler)
    journal.note("ready")
    state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, sampler=sampler, epoch=0)
    if not newcomer:
        _ready(link, session.rank, session.request_join)
    for state.epoch in range(state.epoch, 10**9):  # noqa: B020
        sampler.set_epoch(state.epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            journal.step_ends()
            if newcomer:
                newcomer = False
                journal.note("contributed", right=net.frozen_as_it_should_be())
                _follow(link, None)


def train_baseline(link: Link, spec: dict[str, Any]) -> None:
    """The loop of the other systems."""
    from baselines.loop import Member
    from synthetic import Journal

    member = Member(spec, lambda name: Journal(Path(spec["directory"]), name))
    if os.environ["OMPI_COMM_WORLD_SIZE"] == "1":
        _follow(link, None)
    else:
        _ready(link, member.world.rank, member.request, wait=not spec.get("restarted"))
    member.train()


def _ready(link: Link, rank: int, request: Callable[[], object], *, wait: bool = True) -> None:
    link.send({"rank": rank, "pid": os.getpid()})
    if wait:
        link.receive()  # all ranks are up: go
    _follow(link, request)


def _follow(link: Link, request: Callable[[], object] | None) -> None:
    threading.Thread(target=_end_with_driver, args=(link, request), daemon=True).start()


def _end_with_driver(link: Link, request: Callable[[], object] | None) -> None:
    """Make the request when the driver says so, and end when it hangs up."""
    try:
        while link.receive():
            if request is not None:
                request()
    except (OSError, EOFError):
        os._exit(0)


def main() -> None:
    """Train as the driver says."""
    go_to_host()
    import torch

    link, spec = join_driver()
    torch.set_num_threads(1)
    (train_chaos if spec["contender"].startswith("chaos") else train_baseline)(link, spec)


if __name__ == "__main__":
    main()
