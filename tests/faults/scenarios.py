"""Small scripts that do one thing wrong: ``scenarios.py NAME``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import quick_start  # noqa: F401
import torch
from torch import nn

import chaos_mpi
from chaos_mpi.cli.process import LINGER_S


def model_differs(session: chaos_mpi.Session) -> None:
    """Rank 2 has a wider layer."""
    width = 7 if session.rank == 2 else 6
    chaos_mpi.DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, width)))


def optimizer_differs(session: chaos_mpi.Session) -> None:
    """Rank 1 has another learning rate."""
    model = chaos_mpi.DistributedDataParallel(nn.Linear(4, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 if session.rank == 1 else 0.1)
    chaos_mpi.TrainingState(model=model, optimizer=optimizer)


def call_differs(session: chaos_mpi.Session) -> None:
    """Rank 1 calls something else than the others."""
    model = chaos_mpi.DistributedDataParallel(nn.Linear(4, 6))
    model(torch.ones(2, 4)).sum().backward()
    if session.rank == 1:
        session.all_reduce(torch.zeros(1000))
    else:
        model(torch.ones(2, 4)).sum().backward()


def call_of_equal_size_differs(session: chaos_mpi.Session) -> None:
    """Rank 1 wants something else than the others, of the same size."""
    session.all_reduce(torch.ones(3), "max" if session.rank == 1 else "sum")


def order_of_models_differs(session: chaos_mpi.Session) -> None:
    """Rank 1 trains two models of one size in the other order."""
    models = [chaos_mpi.DistributedDataParallel(nn.Linear(4, 6)) for _ in range(2)]
    for model in reversed(models) if session.rank == 1 else models:
        model(torch.ones(2, 4)).sum().backward()


def setting_is_wrong(session: chaos_mpi.Session) -> None:
    """Never gets here: CHAOS_MIN_RANKS is no number."""


def fails_afterwards(session: chaos_mpi.Session) -> None:
    """Training is over, and then one rank fails."""
    session.barrier()
    rank = session.rank
    chaos_mpi.finalize()
    if rank == 1:
        raise OSError("no room for the results")
    sys.exit(0)


def catches_an_error_in_backward(session: chaos_mpi.Session) -> None:
    """Rank 1 goes on after an error in its second backward pass, when gradients are on their way."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = chaos_mpi.DistributedDataParallel(net)
    rank = session.rank

    def fail(_: torch.Tensor) -> None:
        if rank == 1 and session.step == 1:
            raise MemoryError("no memory left")

    net[0].weight.register_hook(fail)
    for _ in range(4):
        try:
            model(torch.ones(2, 4)).sum().backward()
        except MemoryError:
            net.zero_grad()
    print(f"rank {rank} made {session.step} steps", flush=True)
    chaos_mpi.finalize()


def leaves_between_forwards(session: chaos_mpi.Session) -> None:
    """After each step the model is called once more; rank 1 wants to leave."""
    sampler = chaos_mpi.ElasticSampler(range(160), batch_size=2)
    model = chaos_mpi.DistributedDataParallel(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chaos_mpi.TrainingState(model=model, optimizer=optimizer, sampler=sampler)
    for _ in sampler:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        model(torch.ones(2, 4))
        if session.rank == 1 and session.step == 3:
            session.request_leave()
    chaos_mpi.finalize()


def _until_one_has_joined(
    session: chaos_mpi.Session, state: chaos_mpi.TrainingState, size: int, train: Callable[[], None]
) -> chaos_mpi.SessionResult:
    """Rank 0 asks for one more rank; when there are so many, all go on for ten rounds. The state has ``left=-1``."""
    if session.rank == 0:
        session.request_join()
    while state.left != 0:
        train()
        time.sleep(0.002)  # the newcomer needs the core to start
        if session.size == size:
            state.left = 10 if state.left < 0 else state.left - 1
    return chaos_mpi.finalize()


def joined_between_two_models(session: chaos_mpi.Session) -> None:
    """Two models are trained in turn, without a sampler, and a rank joins two."""
    models = {name: chaos_mpi.DistributedDataParallel(nn.Linear(4, 4)) for name in "ab"}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01) for name, model in models.items()}
    state = chaos_mpi.TrainingState(model=models, optimizer=optimizers, left=-1)

    def train() -> None:
        for name, model in models.items():
            optimizers[name].zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizers[name].step()

    assert _until_one_has_joined(session, state, 3, train).replicas_identical


def joined_with_buffers_that_differ(session: chaos_mpi.Session) -> None:
    """Each of three ranks has statistics of its own, and a tensor besides, when a rank joins."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = chaos_mpi.DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, left=-1, seen=torch.zeros(3))

    def train() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 4) + session.rank).square().sum().backward()
        optimizer.step()
        state.seen += session.rank

    result = _until_one_has_joined(session, state, 4, train)
    assert not result.replicas_identical
    if session.is_newcomer:
        assert 0 < float(state.seen[0]) < 100, "it has the tensor of another rank than 0"


def passes_after_the_last_step(session: chaos_mpi.Session) -> None:
    """The last round of accumulation is not complete, and each rank has statistics of its own of it."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = chaos_mpi.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    chaos_mpi.TrainingState(model=model, optimizer=optimizer)
    for number in range(5):
        with contextlib.nullcontext() if number % 2 else model.no_sync():
            model(torch.randn(8, 4) + session.rank).square().sum().backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    own = net[1].running_mean.tolist()
    assert chaos_mpi.finalize().replicas_identical
    assert (net[1].running_mean.tolist() == own) == (session.rank == 0)


def works_afterwards(session: chaos_mpi.Session) -> None:
    """Training is over, and one rank still has work for longer than a launcher would wait for one that hangs."""
    rank = session.rank
    chaos_mpi.finalize()
    if rank == 0:
        until = time.monotonic() + LINGER_S + 1.5
        while time.monotonic() < until:
            time.sleep(0.1)
        Path("exported").touch()


def raises_an_exit_afterwards(session: chaos_mpi.Session) -> None:
    """Training is over, and then one rank ends with an error that Python keeps to itself."""
    rank = session.rank
    chaos_mpi.finalize()
    raise SystemExit(5 if rank == 1 else 0)


def _one_ends(session: chaos_mpi.Session, end: Callable[[], object]) -> None:
    """The last rank ends as ``end`` has it, and the others go on."""
    session.all_reduce(torch.ones(1))
    if session.rank == 2:
        end()
        return
    while session.size == 3:
        session.all_reduce(torch.ones(1))
    chaos_mpi.finalize()


def exits_by_the_builtin(session: chaos_mpi.Session) -> None:
    """One rank calls exit(1), as people do who know the prompt."""
    _one_ends(session, lambda: exit(1))


def raises_under_another_hook(session: chaos_mpi.Session) -> None:
    """One rank fails after a library has put an exception hook of its own in place of ours."""
    sys.excepthook = lambda *_: print("a prettier traceback", file=sys.stderr)

    def fail() -> None:
        raise ValueError("no such file")

    _one_ends(session, fail)


def exits_at_once(session: chaos_mpi.Session) -> None:
    """Rank 1 ends without any of Python's ceremonies, and the others go on."""
    session.barrier()
    if session.rank == 1:
        os._exit(1)
    session.barrier()
    child = os.fork()
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    chaos_mpi.finalize()


def forgets_to_close(session: chaos_mpi.Session) -> None:
    """Ends without chaos_mpi.finalize()."""
    model = chaos_mpi.DistributedDataParallel(nn.Linear(4, 6))
    model(torch.ones(2, 4)).sum().backward()


def works_on_after_the_training(session: chaos_mpi.Session) -> None:
    """Is at something else after chaos_mpi.finalize()."""
    chaos_mpi.finalize()
    print("trained", flush=True)
    signal.pause()


if __name__ == "__main__":
    scenario: Callable[[chaos_mpi.Session], None] = globals()[sys.argv[1]]
    scenario(chaos_mpi.init())
    print("came to the end", flush=True)
