"""The states of the random number generators that scripts draw from: those of torch, numpy and Python.

As JSON values with text in them, not as tensors: they may differ between members, while the tensors of a training state
are served to a newcomer, in parts, by all of them.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from chaos_mpi.errors import CheckpointError, ConfigError


def capture_rng() -> dict[str, Any]:
    """Where the generators of this process are.

    Raises:
        ConfigError: numpy's global generator was replaced by one of another kind.
    """
    name, keys, position, has_gauss, gauss = _numpy_state()
    version, words, next_gauss = random.getstate()
    # That of the present GPU, if there is one in use: to ask would take it into use.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": _text(torch.get_rng_state().numpy()),
        "cuda": _text(torch.cuda.get_rng_state().numpy()) if in_use else None,
        "numpy": [name, _text(keys), position, has_gauss, gauss],
        "python": [version, _text(np.array(words, dtype="<u4")), next_gauss],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Go on from a captured state.

    Raises:
        CheckpointError: it is not one that the generators here can take.
    """
    try:
        name, keys, *rest = state["numpy"]
        version, words, next_gauss = state["python"]
        torch.set_rng_state(torch.from_numpy(_array(state["torch"], "u1")))
        if state.get("cuda") is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], "u1")))
        np.random.set_state((name, _array(keys, "<u4"), *rest))
        random.setstate((version, tuple(_array(words, "<u4").tolist()), next_gauss))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the state of the random number generators cannot be used here: {error}") from error


def of_rank(states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any]:
    """The state that ``rank`` goes on from, of those of an earlier job in rank order: its own, else that of rank 0."""
    return states[rank if rank < len(states) else 0]


def _numpy_state() -> Sequence[Any]:
    state = np.random.get_state(legacy=True)
    if isinstance(state, Mapping):
        raise ConfigError(
            f"rng=True works with numpy's own global generator, MT19937, and not with {state.get('bit_generator')}"
        )
    return state


def _text(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).decode()


def _array(text: str, dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
