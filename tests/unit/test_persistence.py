"""The state is saved at the end of a job: what the agent beside the rank hears of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from chaos_mpi.config import load_settings
from chaos_mpi.elastic import checkpoint
from chaos_mpi.elastic.persistence import Persistence
from chaos_mpi.elastic.session import Session
from chaos_mpi.elastic.state import TrainingState


@pytest.mark.parametrize("fails", [False, True])
def test_the_agent_knows_that_the_state_is_being_saved(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float | str] = []
    save_now = checkpoint.save_now

    def save(*arguments: object) -> None:
        told.append("saves")
        if fails:
            raise OSError("no room")
        save_now(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_now", save)
    settings = load_settings(environ={}, checkpoint_dir=tmp_path, timeout_s=70.0)
    session = SimpleNamespace(
        settings=settings, step=3, initial_size=1, host="h", rank=0, agent=SimpleNamespace(saving=told.append)
    )
    persistence = Persistence(cast("Session", session))
    model = torch.nn.Linear(2, 2)
    persistence._state = TrainingState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    persistence._has_begun = True
    said = persistence.save_emergency()
    assert told == [70.0, "saves", 0.0]
    assert ("could NOT be saved" in said and "no room" in said) if fails else "The state is saved in" in said
    assert fails or checkpoint.checkpoint_path(tmp_path, 3).exists()
