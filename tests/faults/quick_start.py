"""Importing this makes a process that uses torch start in half the time.

The first optimizer loads torch's compiler, only to say that it is not to compile the optimizer; so do torch.distributed
and its DistributedDataParallel. The processes of a fault test never compile anything, and there are some two hundred
of them in the suite.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch


def _disable(function: Callable[..., Any], recursive: bool = True, **_: Any) -> Callable[..., Any]:
    return function


if "torch._dynamo" not in sys.modules:
    _stand_in = types.ModuleType("torch._dynamo")
    _stand_in.disable = _disable  # type: ignore[attr-defined]
    _stand_in.graph_break = lambda *_, **__: None  # type: ignore[attr-defined]
    _stand_in.OptimizedModule = type("OptimizedModule", (torch.nn.Module,), {})  # type: ignore[attr-defined]
    _stand_in.utils = types.SimpleNamespace(get_optimize_ddp_mode=lambda: "")  # type: ignore[attr-defined]
    _stand_in.trace_rules = types.SimpleNamespace(  # type: ignore[attr-defined]
        LEGACY_MOD_INLINELIST=set(),
        get_legacy_mod_inlinelist=types.SimpleNamespace(cache_clear=lambda: None),
        clear_lru_cache=lambda: None,
    )
    sys.modules["torch._dynamo"] = torch._dynamo = _stand_in  # type: ignore[assignment]
