"""A barrier that tells who did not come to it. Its errors name it as torch's do, which scripts look for."""

from __future__ import annotations

import time

import torch

from chaos_mpi.errors import ChaosError, GroupBrokenError, WaitTimeoutError
from chaos_mpi.mpi.point_to_point import MAX_TAG, Message
from chaos_mpi.torch.carriers import Carrier

#: Above the users' tags.
_ARRIVED, _RELEASED = MAX_TAG, MAX_TAG + 1


def monitored_barrier(carrier: Carrier, limit_s: float, wait_all: bool) -> None:
    """Return when all ranks have called it; rank 0 asks each of them, and answers when all are there.

    Raises:
        WaitTimeoutError: at rank 0: ranks that did not call it within ``limit_s``: the first, or all of them; at the
            others: rank 0 did not answer.
        GroupBrokenError: a rank has died meanwhile.
        ConfigError: a rank has joined since the group was made; at all of them.
    """
    if carrier.view.size == 1:
        return
    for rank in range(carrier.view.size):
        carrier.line(rank)  # where one cannot be reached, all are to know, and none to wait
    if carrier.rank == 0:
        _lead(carrier, limit_s, wait_all)
    else:
        _follow(carrier, limit_s)


def _follow(carrier: Carrier, limit_s: float) -> None:
    lines, zero = carrier.messages(), carrier.line(0)
    limit = time.monotonic() + limit_s
    try:
        lines.send(_word(), zero, _ARRIVED).wait(limit_s)
        # Rank 0 may have come last, and then has as long again to wait for others.
        lines.receive(_word(), zero, _RELEASED).wait(max(limit - time.monotonic(), 0.0) + limit_s)
    except (WaitTimeoutError, GroupBrokenError) as error:
        raise type(error)(
            f"Rank {carrier.rank} successfully reached monitoredBarrier, but received errors while waiting for "
            f"send/recv from rank 0 ({carrier.view.members[0]}), which has died or misses other ranks: {error}"
        ) from error


def _lead(carrier: Carrier, limit_s: float, wait_all: bool) -> None:
    lines, members = carrier.messages(), carrier.view.members
    limit = time.monotonic() + limit_s
    others = range(1, len(members))
    arrivals = {other: lines.receive(_word(), carrier.line(other), _ARRIVED) for other in others}
    missing: dict[int, ChaosError] = {}
    for other, arrival in arrivals.items():
        error = _awaited(arrival, limit)
        if error is not None:
            missing[other] = error
            if not wait_all:
                break
    if missing:
        for arrival in arrivals.values():
            arrival.give_up()
        _tell(missing, members, limit_s, wait_all)
    for other in others:
        lines.send(_word(), carrier.line(other), _RELEASED).wait(limit_s)


def _tell(missing: dict[int, ChaosError], members: tuple[str, ...], limit_s: float, wait_all: bool) -> None:
    dead = all(isinstance(error, GroupBrokenError) for error in missing.values())
    ranks = f"Rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    text = f"{ranks} failed to pass monitoredBarrier" + ("" if dead else f" within {limit_s:g} s")
    text += f" ({', '.join(members[other] for other in missing)}{'; died' if dead else ''})"
    if limit_s <= 0.0:
        text = f"Rank 0 timed out in monitoredBarrier: {text}"
    if not wait_all:
        text += "; the ranks after it were not asked, which wait_all_ranks=True does"
    raise (GroupBrokenError if dead else WaitTimeoutError)(text)


def _awaited(arrival: Message, limit: float) -> ChaosError | None:
    try:
        arrival.wait(max(limit - time.monotonic(), 0.0))
    except (WaitTimeoutError, GroupBrokenError) as error:
        return error
    return None


def _word() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8, device="cpu")
