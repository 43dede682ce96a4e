"""What a newcomer has to have in common with the members."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chaos_mpi.elastic.sponsor import Sponsorship, versions
from chaos_mpi.membership import Join


def sponsorship(**versions: str) -> Sponsorship:
    requirements: dict[str, Any] = {"versions": versions, "signature": {"optimizers": {}}, "sizes": None}
    return Sponsorship(Join("join-a:1-1", "", 0, "a:1"), requirements, 60.0, lambda _: None)


def word(**versions: str) -> dict[str, Any]:
    return {"member": "b:2", "host": "b", "versions": versions, "signature": {"optimizers": {}}}


def test_a_newcomer_of_another_version_is_refused() -> None:
    assert sponsorship(torch="2.13.0")._misfit(word(torch="2.13.0")) is None
    assert sponsorship(torch="2.13.0")._misfit(word(torch="2.12.0")) == "torch is 2.13.0 here and 2.12.0 at b"


def test_builds_of_one_version_for_different_accelerators_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    here = versions()
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert sponsorship(**here)._misfit(word(**versions())) is None
    monkeypatch.setattr(torch, "__version__", "2.12.0+cpu")
    assert sponsorship(**here)._misfit(word(**versions())) == "torch is 2.13.0 here and 2.12.0 at b"
