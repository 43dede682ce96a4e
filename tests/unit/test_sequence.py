"""Recoveries in a thread of their own, while the training loop goes on in another one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from chaos_mpi.elastic.operations import Operation
from chaos_mpi.elastic.recovery import Position, Regrouped
from chaos_mpi.elastic.sampler import ElasticSampler
from chaos_mpi.elastic.sequence import OperationSequence
from chaos_mpi.errors import PeerFailedError
from chaos_mpi.membership import View
from chaos_mpi.membership.progress import Decision
from chaos_mpi.mpi.world import Pending, World

#: How long the loop is given to do what it must not do.
LOOK_S = 0.2


class FakeWorld:
    """A communicator of two, of which the other one is dead, or has never been."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, payload: bytes, what: Any, limit_s: float) -> list[bytes]:
        return [payload, b"b"]

    def agree(self, ok: bool, limit_s: float, what: Any) -> bool:
        return ok

    def failed_ranks(self) -> list[int]:
        return [1]

    def revoke(self) -> None:
        pass

    def pending(self) -> None:
        pass


class Interrupted(Operation):
    """Whose first attempt ends by a death."""

    checks_label = False

    def __init__(self) -> None:
        super().__init__("all_reduce")
        self.attempts = 0

    def start(self, pending: Pending, view: View, rank: int) -> None:
        self.attempts += 1

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        if self.attempts < 2 and self._world is not None and self._world.size == 2:
            raise PeerFailedError("b is dead")

    def results(self) -> list[torch.Tensor]:
        return []

    def renew_buffers(self) -> None:
        pass


class Member:
    """One with a sampler: a session to that, a listener to the sequence."""

    member, members, initial_size, expected_size, batch_policy = "a", ("a", "b"), 2, 2, "none"

    def __init__(self) -> None:
        self.sampler: ElasticSampler | None = None

    def attach_sampler(self, sampler: ElasticSampler) -> None:
        self.sampler = sampler

    def emit(self, event: str, **fields: Any) -> None:
        pass

    def operation_finished(self, operation: Operation) -> None:
        pass

    def why_not_without(self, lost: tuple[str, ...]) -> str:
        return ""

    def sampler_reports(self) -> list[dict[str, Any]]:
        assert self.sampler is not None
        return [self.sampler.report()]

    def view_changed(self, regrouped: Regrouped, old: View, reports: list[list[dict[str, Any]]]) -> None:
        assert self.sampler is not None
        self.members, self.expected_size = regrouped.view.members, 1  # type: ignore[misc, assignment]
        self.sampler.apply_change([of_member[0] for of_member in reports], old.members, self.members)


def test_the_loop_waits_while_others_reckon_with_where_it_was() -> None:
    member: Any = Member()
    first: Any = FakeWorld(2)
    sequence = OperationSequence(first, "a", 1.0, member)
    sampler = ElasticSampler(12, 2, session=member)
    loop = iter(sampler)
    trained = list(next(loop))
    sampler.commit()
    asked, moved = threading.Event(), threading.Event()

    def train() -> None:
        asked.set()
        trained.extend(next(loop))
        moved.set()

    training = threading.Thread(target=train, daemon=True)

    def regroup(world: World, view: View, position: Callable[[], Position], **_: Any) -> Regrouped:
        reports = position().samplers
        training.start()
        assert asked.wait(10.0)
        assert not moved.wait(LOOK_S), "the loop got a batch that the others know nothing of"
        smaller: Any = FakeWorld(1)
        return Regrouped(smaller, View(1, ("a",)), Decision(0, None, (), 0), (), [reports], ("b",), False)

    sequence._regrouping.run = regroup  # type: ignore[method-assign, assignment]
    failures: list[BaseException] = []

    def recover() -> None:
        try:
            sequence.execute(Interrupted())
        except BaseException as error:  # for the main thread
            failures.append(error)

    background = threading.Thread(target=recover, daemon=True)
    background.start()
    background.join(10.0)
    assert not failures
    training.join(10.0)
    assert moved.is_set()
    sampler.commit()
    for batch in loop:
        trained += batch
        sampler.commit()
    other = ElasticSampler(12, 2, session=Member())
    assert sorted(trained) == sorted(set(range(12)) - _of_b(other))


def _of_b(sampler: ElasticSampler) -> set[int]:
    """What the dead one had trained on in the first round."""
    return set(sampler._current_plan().assignment(0, "b").tolist())
