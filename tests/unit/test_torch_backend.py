"""How the ranks of the backend ``chaos`` find each other, whatever a script has set before."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

import chaos_mpi.torch  # noqa: F401 - registers it
from chaos_mpi.elastic import current
from chaos_mpi.elastic.session import Session
from chaos_mpi.errors import ConfigError
from chaos_mpi.membership import View
from chaos_mpi.torch import backend


def as_a_tutorial_does(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Set what torch's own handler needs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Of one rank."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    opened: Any = SimpleNamespace(
        rank=0, size=1, epoch=0, host="here", member="here:7", members=("here:7",), view=View(0, ("here:7",)),
        local_rank=0, is_newcomer=False, settings=SimpleNamespace(timeout_s=5.0),
    )  # fmt: skip
    monkeypatch.setattr(current, "_current", opened)
    yield opened
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sessions whose ranks got a store of ours."""
    served: list[Any] = []
    monkeypatch.setattr(backend, "shared_store", lambda of: served.append(of) or HashStore())
    return served


@pytest.mark.parametrize("arguments", [{}, {"rank": 0, "world_size": 1}, {"init_method": "env://"}])
def test_a_master_address_is_not_needed(
    session: Any, shared: list[Any], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_a_tutorial_does(monkeypatch, 0, 1)
    dist.init_process_group("chaos", **arguments)
    assert shared == [session]
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "chaos")


def test_a_newcomer_has_the_environment_of_another_rank(
    session: Any, shared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_a_tutorial_does(monkeypatch, 2, 4)
    session.is_newcomer = True
    dist.init_process_group("chaos", rank=3, world_size=4)
    assert shared == [session]
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)


def test_ranks_that_are_not_those_of_mpi_are_refused(
    session: Any, shared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_a_tutorial_does(monkeypatch, 2, 4)
    with pytest.raises(ConfigError, match="told to be rank 2 of 4"):
        dist.init_process_group("chaos")
    assert shared == []


def test_other_backends_find_each_other_as_ever(shared: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    as_a_tutorial_does(monkeypatch, 0, 1)
    dist.init_process_group("gloo")
    assert dist.get_backend() == "gloo"
    dist.destroy_process_group()
    assert shared == []


def test_the_place_on_the_host_is_set_unless_it_was(
    session: Any, shared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session.members = ("there:1", "here:5", "there:2", "here:7")
    session.local_rank = Session.local_rank.fget(session)
    assert session.local_rank == 1
    backend._set_local_variables(session)
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("1", "2")
    monkeypatch.setenv("LOCAL_RANK", "5")
    backend._set_local_variables(session)
    assert os.environ["LOCAL_RANK"] == "5"
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    dist.init_process_group("chaos")
    assert os.environ["LOCAL_RANK"] == "1"
