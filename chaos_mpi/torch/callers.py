"""Which of torch's calls a backend is in, where torch does not tell it what it has to know."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

_C10D = "torch.distributed.distributed_c10d"
#: Between a call of torch's and what it calls of a backend there are at most so many others.
_FRAMES = 10
_HANDING_OUT_OBJECTS = ("broadcast_object_list", "scatter_object_list")


def carries_objects() -> bool:
    """Whether the call is one of ``broadcast_object_list`` or ``scatter_object_list``.

    Ranks other than the root come to it with memory that nobody has written to yet, and read sizes and objects from
    what they get: in the place of a root that has died nobody has anything to hand out.
    """
    return _call_of_torch(_HANDING_OUT_OBJECTS) is not None


def asks_for(backend: str) -> bool:
    """Whether ``init_process_group`` wants a store for a group of this backend."""
    call = _call_of_torch(("init_process_group",))
    return call is not None and backend in str(call.f_locals.get("backend")).lower()


def _call_of_torch(names: Sequence[str]) -> FrameType | None:
    """The call of one of these functions of torch's that the present one is a part of."""
    frame, looks = sys._getframe(2), 0
    while frame.f_back is not None and looks < _FRAMES:
        frame, looks = frame.f_back, looks + 1
        if frame.f_code.co_name in names and frame.f_globals.get("__name__") == _C10D:
            return frame
    return None
