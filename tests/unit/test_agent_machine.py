"""What a machine has and does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from chaos_mpi.agent.machine import Machine, accelerators, plausible


def test_this_machine() -> None:
    before = time.time()
    machine = Machine()
    seen = machine.look()
    assert seen["cores"] == os.cpu_count()
    assert seen["memory_total_bytes"] >= seen["memory_available_bytes"] > 0
    assert len(seen["load"]) == 3
    assert before <= seen["joined_at"] <= time.time()
    assert machine.look()["joined_at"] == seen["joined_at"]
    assert plausible(json.loads(json.dumps(seen))) == seen


def test_accelerators_by_their_models(tmp_path: Path) -> None:
    assert accelerators(tmp_path / "none") == []
    for bus, text in {
        "0000:18:00.0": "Model: \t\t NVIDIA H200\nIRQ:   \t\t 33\nGPU UUID: \t GPU-1f\n",
        "0000:2a:00.0": "Model: \t\t NVIDIA L4\n",
        "0000:3b:00.0": "",
    }.items():
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(text)
    assert accelerators(tmp_path) == ["NVIDIA H200", "NVIDIA L4", "unknown"]


@pytest.mark.parametrize(
    "change",
    [{"cores": "many"}, {"load": [1.0]}, {"load": [1.0, 2.0, float("nan")]}, {"accelerators": 3}, {"joined_at": None}],
)
def test_what_cannot_be_said_of_a_machine(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        plausible(Machine().look() | change)
    with pytest.raises(ValueError, match="cannot be read"):
        plausible("a machine")
