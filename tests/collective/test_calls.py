"""The collective calls of a session."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import chaos_mpi
from chaos_mpi import ConfigError, DistributedDataParallel, MismatchError, Session

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]


def test_members_are_the_same_list_everywhere(session: Session) -> None:
    everyones = session.gather(list(session.members))
    assert all(members == list(session.members) for members in everyones)
    assert session.members[session.rank] == session.member
    assert len(set(session.members)) == session.size
    assert session.local_rank == session.rank  # all are on one host
    assert session.epoch == 0


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ],
)
def test_all_reduce(session: Session, dtype: torch.dtype) -> None:
    mine = torch.tensor([[session.rank, 1], [7, session.rank + 2]], dtype=dtype)
    for op, expected in [
        ("sum", [[sum(range(session.size)), session.size], [7 * session.size, sum(range(2, session.size + 2))]]),
        ("max", [[session.size - 1, 1], [7, session.size + 1]]),
        ("min", [[0, 1], [7, 2]]),
    ]:
        tensor = mine.clone()
        assert session.all_reduce(tensor, op) is tensor
        assert torch.equal(tensor, torch.tensor(expected, dtype=dtype)), op


def test_all_reduce_of_a_view_with_strides(session: Session) -> None:
    whole = torch.zeros(4, 6)
    whole.t()[1::2] += session.rank + 1
    session.all_reduce(whole.t()[1::2])
    expected = torch.zeros(4, 6)
    expected.t()[1::2] += sum(range(1, session.size + 1))
    assert torch.equal(whole, expected)


def test_all_reduce_refuses(session: Session) -> None:
    with pytest.raises(ConfigError, match="sum, max and min"):
        session.all_reduce(torch.zeros(1), "mean")
    for dtype in (torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint64):
        with pytest.raises(ConfigError, match=str(dtype).removeprefix("torch.")):
            session.all_reduce(torch.zeros(1, dtype=dtype))
    with pytest.raises(ConfigError, match="on meta"):
        session.all_reduce(torch.zeros(1, device="meta"))
    with pytest.raises(ConfigError, match="sparse"):
        session.all_reduce(torch.zeros(2, 2).to_sparse())
    session.barrier()


def test_other_calls_refuse(session: Session) -> None:
    with pytest.raises(ConfigError, match="Tensor is not JSON"):
        session.gather({"loss": torch.zeros(1)})
    with pytest.raises(ConfigError, match="complex64"):
        session.evaluate(3, lambda _: torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="on meta"):
        session.share("weights", [torch.zeros(1, device="meta")])
    session.barrier()


def test_all_reduce_of_truth_values(session: Session) -> None:
    mine = torch.tensor([session.rank == 1, False, True])
    assert session.all_reduce(mine.clone()).tolist() == [True, False, True]
    assert session.all_reduce(mine.clone(), "min").tolist() == [False, False, True]


def test_gather(session: Session) -> None:
    value = {"rank": session.rank, "text": "ü" * (10 * session.rank), "list": [None, True, 1.5]}
    everyones = session.gather(value)
    assert [row["rank"] for row in everyones] == list(range(session.size))
    assert everyones[session.rank] == value
    assert everyones[1]["text"] == "ü" * 10


@pytest.mark.parametrize("items", [0, 1, 3, 50])
def test_evaluate_counts_every_item_once(session: Session, items: int) -> None:
    def per_item(part: range) -> torch.Tensor:
        counts = torch.zeros(items + 1)
        for index in part:
            counts[index] += 1
        return counts

    assert session.evaluate(items, per_item).tolist() == [1.0] * items + [0.0]


def test_share(session: Session) -> None:
    torch.manual_seed(session.rank)
    odd = torch.randint(0, 2, (3,), dtype=torch.uint8)  # puts the tensors after it at unaligned places
    tensors = [odd, torch.randn(5), torch.randn(2, 3, dtype=torch.float64), torch.ones((), dtype=torch.int64)]
    tensors.append(torch.tensor([session.rank == 0, False]))
    session.share("test", tensors)
    torch.manual_seed(0)
    assert torch.equal(tensors[0], torch.randint(0, 2, (3,), dtype=torch.uint8))
    assert torch.equal(tensors[1], torch.randn(5))
    assert torch.equal(tensors[2], torch.randn(2, 3, dtype=torch.float64))
    assert tensors[4].tolist() == [True, False]


def test_share_from_another_member(session: Session) -> None:
    tensor = torch.full((4,), float(session.rank))
    session.share("test", [tensor], root=session.members[-1])
    assert tensor.tolist() == [session.size - 1.0] * 4


def test_barrier(session: Session) -> None:
    session.barrier()


def test_a_second_session_is_refused() -> None:
    with pytest.raises(chaos_mpi.ChaosError, match="open already"):
        chaos_mpi.init()


# -- what differs between ranks is named, at every rank ------------------------------------------------


def test_a_wider_layer_on_one_rank(session: Session) -> None:
    width = 5 if session.rank == session.size - 1 else 4
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, width))
    with pytest.raises(MismatchError, match=rf"'1\.weight' of shape \(4, 3\).*rank {session.size - 1}.*\(5, 3\)"):
        DistributedDataParallel(module)


def test_a_missing_layer_on_one_rank(session: Session) -> None:
    module = nn.Sequential(nn.Linear(3, 3), *([nn.Linear(3, 3)] if session.rank != 1 else []))
    with pytest.raises(MismatchError, match=r"'1\.weight'.*rank 1 has no further parameter"):
        DistributedDataParallel(module)


def test_a_frozen_parameter_on_one_rank(session: Session) -> None:
    module = nn.Linear(3, 3)
    module.bias.requires_grad_(session.rank == 0)
    with pytest.raises(MismatchError, match=r"'bias'.*'bias'.*not trained"):
        DistributedDataParallel(module)


def test_another_dtype_on_one_rank(session: Session) -> None:
    module = nn.Linear(3, 3, dtype=torch.float64 if session.rank == 1 else torch.float32)
    with pytest.raises(MismatchError, match=r"'weight'.*float32.*float64"):
        DistributedDataParallel(module)


def test_another_buffer_on_one_rank(session: Session) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=session.rank != 1))
    with pytest.raises(MismatchError, match="running_mean"):
        DistributedDataParallel(module)


def test_an_optimizer_that_differs(session: Session) -> None:
    model = DistributedDataParallel(nn.Linear(3, 3))
    rate = 0.2 if session.rank == 1 else 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with pytest.raises(MismatchError, match=r"rank 1.*lr.*0\.1.*0\.2"):
        chaos_mpi.TrainingState(model=model, optimizer=optimizer)


def test_another_optimizer_class_on_one_rank(session: Session) -> None:
    model = DistributedDataParallel(nn.Linear(3, 3))
    kind = torch.optim.AdamW if session.rank == 1 else torch.optim.SGD
    with pytest.raises(MismatchError, match=r"SGD.*AdamW"):
        chaos_mpi.TrainingState(model=model, optimizer=kind(model.parameters(), lr=0.1))


# -- what can never work is refused ---------------------------------------------------------------------


def test_modules_that_cannot_be_used(session: Session) -> None:
    with pytest.raises(ConfigError, match="sparse"):
        DistributedDataParallel(nn.Embedding(4, 2, sparse=True))
    with pytest.raises(ConfigError, match="no parameter"):
        DistributedDataParallel(nn.Tanh())
    with pytest.raises(ConfigError, match="complex64"):
        DistributedDataParallel(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="meta"):
        DistributedDataParallel(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match="device_ids"):
        DistributedDataParallel(nn.Linear(2, 2), device_ids=[0])
    with pytest.raises(ConfigError, match="bucket_cap_mb"):
        DistributedDataParallel(nn.Linear(2, 2), bucket_cap_mb=0)
    session.barrier()
