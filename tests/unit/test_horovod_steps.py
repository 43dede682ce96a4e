"""The gradient step of Horovod's interface, when other ranks make other calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from chaos_mpi.errors import MismatchError, ViewChangedError
from chaos_mpi.horovod.torch.step import AnnouncedStep
from chaos_mpi.membership import View
from chaos_mpi.torch.buckets import BufferSet, make_buckets


class FakePending:
    """Two ranks, of which the other one has said this."""

    size = 2

    def __init__(self, theirs: list[int]) -> None:
        self._theirs = theirs

    def gather(self, mine: np.ndarray, everyones: np.ndarray) -> None:
        everyones.view(np.int64)[:] = [mine.view(np.int64).tolist(), self._theirs]

    def test(self) -> bool:
        return True

    def wait(self, what: Any, limit_s: float) -> None:
        pass


class FakeWorld:
    """Their communicator; all that is gathered has come from both when it returns."""

    def __init__(self, theirs: list[int]) -> None:
        self.rank, self.size, self._theirs = 0, 2, theirs
        self.gathered = 0

    def pending(self) -> FakePending:
        return FakePending(self._theirs)

    def all_gather(self, payload: bytes, what: Any, limit_s: float) -> list[bytes]:
        self.gathered += 1
        return [payload, b"another call"]


class FakeSteps:
    """Whose steps."""

    number = 1

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params, self.buckets = params, make_buckets(params, 100)

    def proposes(self) -> bool:
        return False

    def given(self, param: torch.nn.Parameter) -> torch.Tensor | None:
        return param.grad


@pytest.mark.parametrize(("theirs", "error"), [([7, 0, 0], MismatchError), ([7, 0, 1], ViewChangedError)])
def test_a_step_that_is_refused_has_no_sums_to_hand_out(theirs: list[int], error: type[Exception]) -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    steps: Any = FakeSteps(params)
    step = AnnouncedStep("step", steps, BufferSet(steps.buckets, params, 0, []), zeros=False)
    world: Any = FakeWorld(theirs)
    assert step.results()
    step.launch(world, View(0, ("a", "b")))
    with pytest.raises(error):
        step.wait(lambda: "the other", 1.0)
    assert world.gathered == 1, "it is left when all know that it is refused"
    assert step.results() == []
    with pytest.raises(MismatchError):
        step.finish()
    step.launch(world, View(1, ("a", "c")))  # the other one has died meanwhile
    assert step.results()
