"""Collective operations in which members give and get different amounts."""

from __future__ import annotations

import pytest
import torch

from chaos_mpi import ConfigError, MismatchError, Session
from chaos_mpi.elastic.exchanges import AllGather, AllReduce, AllToAll, Barrier, Broadcast, ReduceScatter, equal_rows

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sum", "product", "max", "min"])
def test_all_reduce_of_several(session: Session, dtype: torch.dtype, op: str) -> None:
    def of(rank: int) -> list[torch.Tensor]:
        return [torch.tensor([rank + 1, 1, 2]).to(dtype), torch.full((2, 2), rank % 2 + 1).to(dtype)]

    operation = AllReduce("test", of(session.rank), op)
    session.execute(operation)
    operation.finish()
    every = [torch.stack([of(rank)[i].to(torch.float64) for rank in range(session.size)]) for i in range(2)]
    for result, stacked in zip(operation.results(), every, strict=True):
        expected = {"sum": stacked.sum(0), "product": stacked.prod(0), "max": stacked.amax(0), "min": stacked.amin(0)}
        assert torch.equal(result.to(dtype).to(torch.float64), expected[op])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.complex64, torch.complex128])
def test_all_gather_of_different_lengths(session: Session, dtype: torch.dtype) -> None:
    mine = torch.full((session.rank * 2, 3), session.rank).to(dtype)
    operation = AllGather("test", mine)
    session.execute(operation)
    operation.finish()
    assert operation.lengths == [2 * rank for rank in range(session.size)]
    expected = [torch.full((rank * 2, 3), rank).to(dtype) for rank in range(session.size)]
    assert torch.equal(operation.result, torch.cat(expected))


def test_all_to_all(session: Session) -> None:
    splits = [to + 1 for to in range(session.size)]
    rows = torch.cat([torch.full((n, 2), 10 * session.rank + to) for to, n in enumerate(splits)])
    operation = AllToAll("test", rows, splits, session.size)
    session.execute(operation)
    operation.finish()
    assert operation.received == [session.rank + 1] * session.size
    expected = [torch.full((session.rank + 1, 2), 10 * source + session.rank) for source in range(session.size)]
    assert torch.equal(operation.result, torch.cat(expected))
    with pytest.raises(ConfigError, match="do not share 3 rows"):
        AllToAll("test", torch.zeros(3), [5] * session.size, session.size)


def test_broadcast_from_the_last(session: Session) -> None:
    tensors = [torch.full((3,), float(session.rank)), torch.tensor(session.rank), torch.zeros(0)]
    operation = Broadcast("test", tensors, session.size - 1)
    session.execute(operation)
    operation.finish()
    operation.deliver()
    assert torch.equal(tensors[0], torch.full((3,), session.size - 1.0))
    assert int(tensors[1]) == session.size - 1


def test_reduce_scatter(session: Session) -> None:
    rows = equal_rows(2 * session.size + 1, session.size)
    operation = ReduceScatter("test", torch.arange(2 * session.size + 1).float().unsqueeze(1).repeat(1, 2), rows)
    session.execute(operation)
    operation.finish()
    start = sum(rows[: session.rank])
    expected = torch.arange(start, start + rows[session.rank]).float().unsqueeze(1).repeat(1, 2) * session.size
    assert torch.equal(operation.result, expected)


def test_calls_that_differ_are_refused_and_the_next_one_works(session: Session) -> None:
    odd = session.rank == session.size - 1
    with pytest.raises(MismatchError, match=r"one\[sum, float32 \(3,\)\].*two\[float32"):
        session.execute(AllGather("two", torch.zeros(3)) if odd else AllReduce("one", [torch.zeros(3)]))
    with pytest.raises(MismatchError, match=r"float32 \(2,\)"):
        session.execute(AllReduce("one", [torch.zeros(2 if odd else 3)]))
    session.execute(Barrier())
    assert session.all_reduce(torch.ones(1)).item() == session.size


def test_background_calls_keep_their_order(session: Session) -> None:
    operations = [AllReduce(f"test {i}", [torch.full((1000,), float(i))]) for i in range(50)]

    def run(operation: AllReduce) -> float:
        session.execute(operation)
        return float(operation.results()[0][0])

    futures = [session.submit(lambda operation=operation: run(operation)) for operation in operations]
    assert session.all_reduce(torch.ones(1)).item() == session.size  # after all of them
    assert [future.done() for future in futures] == [True] * 50
    assert [future.result() for future in futures] == [i * session.size for i in range(50)]
    session.execute(Barrier())


def test_an_error_in_the_background_is_that_of_its_call(session: Session) -> None:
    wrong = session.submit(lambda: session.all_reduce(torch.zeros(1), "median"))
    right = session.submit(lambda: session.all_reduce(torch.ones(1)))
    with pytest.raises(ConfigError, match="median"):
        wrong.result(30)
    assert right.result(30).item() == session.size
