from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from chaos_mpi.elastic.sampler import ElasticSampler
from chaos_mpi.errors import ConfigError
from chaos_mpi.torch.loader import DataLoader


class FakeSession:
    def __init__(self, member: str, members: tuple[str, ...]) -> None:
        self.member = member
        self.members = members
        self.initial_size = len(members)
        self.batch_policy = "none"

    @property
    def expected_size(self) -> int:
        return len(self.members)

    def attach_sampler(self, sampler: ElasticSampler) -> None:
        """Nothing to keep."""


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


WORKERS = [
    pytest.param({"num_workers": 0}, id="no workers"),
    pytest.param({"num_workers": 2}, id="workers"),
    pytest.param({"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3}, id="persistent"),
]


def make(n: int, length: int, batch: int, workers: dict[str, Any]) -> list[tuple[ElasticSampler, DataLoader[Any]]]:
    members = tuple(f"m{i}" for i in range(n))
    samplers = [ElasticSampler(length, batch, session=FakeSession(m, members)) for m in members]
    return [(s, DataLoader(Numbers(length), batch_sampler=s, **workers)) for s in samplers]


def change(samplers: list[ElasticSampler], members: tuple[str, ...]) -> None:
    reports = [sampler.report() for sampler in samplers]
    for sampler in samplers:
        session = sampler._session
        assert isinstance(session, FakeSession)
        sampler.apply_change(reports, session.members, members)
        session.members = members


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_are_counted_when_the_loop_gets_them(workers: dict[str, Any]) -> None:
    ((sampler, loader),) = make(1, 20, 2, workers)
    ahead = 2 * workers.get("prefetch_factor", 2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert len(loader) == 10
        seen: list[int] = []
        for i, batch in enumerate(loader, start=1):
            assert sampler.in_flight() == batch.tolist()
            report = sampler.report()
            assert report["taken"] == i
            assert report["issued"] == (i if workers["num_workers"] == 0 else min(10, i + ahead))
            sampler.commit()
            seen += batch.tolist()
        assert sorted(seen) == list(range(20))
        assert sampler.report()["ended"]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("at", [0, 3, 7, 8, 9])
def test_a_death_is_made_good_within_the_same_loop(workers: dict[str, Any], at: int) -> None:
    """Kill the third of three ranks in each part of the epoch, also when all of it is already being fetched."""
    ranks = make(3, 60, 2, workers)[:2]
    trained: list[int] = []
    third = ElasticSampler(60, 2, session=FakeSession("m2", ("m0", "m1", "m2")))
    of_third = iter(third)
    loops = [iter(loader) for _, loader in ranks]
    rounds = 0
    while True:
        batches = [next(loop, None) for loop in loops]
        assert (batches[0] is None) == (batches[1] is None)
        if batches[0] is None:
            break
        if rounds == at:
            change([sampler for sampler, _ in ranks], ("m0", "m1"))
        elif rounds < at:
            trained += next(of_third)
        for (sampler, _), batch in zip(ranks, batches, strict=True):
            assert batch is not None
            assert sampler.in_flight() == batch.tolist()
            trained += sampler.in_flight()
            sampler.commit()
        rounds += 1
    assert sorted(trained) == list(range(60))
    for sampler, loader in ranks:  # and the next epoch is a whole one
        sampler.set_epoch(1)
        assert len(loader) == 15


@pytest.mark.parametrize("workers", WORKERS)
def test_breaking_off_and_going_on_in_the_same_epoch(workers: dict[str, Any]) -> None:
    ((sampler, loader),) = make(1, 24, 2, workers)
    seen: list[int] = []
    for stop in (3, 2, 100):
        for i, batch in enumerate(loader, start=1):
            seen += batch.tolist()
            sampler.commit()
            if i == stop:
                break
    assert sorted(seen) == list(range(24))
    assert sampler.epoch == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_breaking_off_and_going_to_the_next_epoch(workers: dict[str, Any]) -> None:
    ((sampler, loader),) = make(1, 24, 2, workers)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for _ in loader:
            break
    sampler.set_epoch(3)
    assert sorted(i for batch in loader for i in batch.tolist()) == list(range(24))
    assert sorted(i for batch in loader for i in batch.tolist()) == list(range(24))  # no set_epoch: the next
    assert sampler.epoch == 4


def test_an_old_loop_is_refused() -> None:
    ((sampler, loader),) = make(1, 24, 2, {"num_workers": 0})
    old = iter(loader)
    next(old)
    new = iter(loader)
    with pytest.raises(RuntimeError, match="another was begun"):
        next(old)
    next(new)
    sampler.set_epoch(5)
    with pytest.raises(RuntimeError, match="epoch changed"):
        next(new)


def test_resume_in_the_middle_with_workers() -> None:
    ((sampler, loader),) = make(1, 30, 2, {"num_workers": 2})
    seen: list[int] = []
    for i, batch in enumerate(loader):
        if i == 4:
            state = sampler.state_dict()  # the batch in hand is not part of it, nor what is being fetched
            break
        seen += batch.tolist()
        sampler.commit()
    ((sampler, loader),) = make(1, 30, 2, {"num_workers": 2})
    sampler.load_state_dict(state)
    assert len(loader) == 11
    seen += [i for batch in loader for i in batch.tolist()]
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize("workers", WORKERS[:2])
def test_it_is_the_loader_of_torch_for_any_other_sampler(workers: dict[str, Any]) -> None:
    data = TensorDataset(torch.arange(10))
    ours = DataLoader(data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1), **workers)
    theirs = torch.utils.data.DataLoader(
        data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1), **workers
    )
    assert [b[0].tolist() for b in ours] == [b[0].tolist() for b in theirs]
    assert len(ours) == len(theirs)
    assert type(iter(ours)) is type(iter(theirs))


def test_batches_out_of_order_are_refused() -> None:
    sampler = ElasticSampler(10, session=FakeSession("a", ("a",)))
    with pytest.raises(ConfigError, match="in_order"):
        DataLoader(Numbers(10), batch_sampler=sampler, num_workers=1, in_order=False)


class Leaves:
    """A script's own ``worker_init_fn``, which can be sent to a process that is not forked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, worker: int) -> None:
        (self.folder / str(worker)).touch()


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_outlive_a_sigterm_to_all_processes(context: str, tmp_path: Path) -> None:
    how = {"multiprocessing_context": context, "worker_init_fn": Leaves(tmp_path), "prefetch_factor": 1}
    ((_, loader),) = make(1, 40, 2, {"num_workers": 1, **how})
    loop = iter(loader)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)  # it may be at its very beginning
    seen = next(loop).tolist()
    os.kill(worker.pid, signal.SIGTERM)
    for batch in loop:
        seen += batch.tolist()
    assert sorted(seen) == list(range(40))
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert worker.exitcode == 0, "it ends when the loader tells it to"


@pytest.mark.parametrize("killed", [False, True], ids=["the-end-of-the-script", "a-rank-that-is-killed"])
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_end_with_their_rank(context: str, killed: bool) -> None:
    script = textwrap.dedent("""
        import multiprocessing, os, signal, sys
        from chaos_mpi.torch.loader import DataLoader

        how = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": sys.argv[2]}
        loader = DataLoader(range(20), batch_size=2, **how)
        assert len(list(loader)) == 10
        print(len(multiprocessing.active_children()), "workers", flush=True)
        if sys.argv[1] == "True":
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    # The workers have this end of the pipe, too: it is read to its end when the last one has ended.
    command = [sys.executable, "-c", script, str(killed), context]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=False)
    assert done.stdout == b"2 workers\n"
    assert done.returncode == (-signal.SIGKILL if killed else 0)
