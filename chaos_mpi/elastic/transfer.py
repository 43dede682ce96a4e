"""How far the training state of newcomers has come, for people who look at the job.

A newcomer cannot be asked before it is a member: it writes down how far it is, in the job's private directory.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

#: The kind of record, see :func:`chaos_mpi.elastic.lifecycle.write_record`.
TRANSFER = "transfer"
#: A newcomer that has written nothing for so long is not fetching any more, seconds; it does twice a second.
STALE_S = 5.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """Where one newcomer is with fetching the training state.

    Attributes:
        member: its id.
        got_bytes, wanted_bytes: received so far, and in all.
        rates_bytes_per_s: of each source, by member id.
        left_s: time left at these rates, seconds; None while nothing has come.
        at: when this was so, Unix seconds.
    """

    member: str
    got_bytes: int
    wanted_bytes: int
    rates_bytes_per_s: dict[str, float]
    left_s: float | None
    at: float


def transfers(run_dir: Path | None, members: Collection[str], now: float) -> list[dict[str, Any]]:
    """The transfers under way on this machine, by member id, as JSON-able dicts.

    Args:
        run_dir: the job's private directory, if it has one.
        members: those who are members already have all of it.
        now: Unix seconds.
    """
    found = []
    for path in sorted(run_dir.glob(f"{TRANSFER}-*.json")) if run_dir is not None else ():
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            transfer = Transfer(**{field.name: written[field.name] for field in fields(Transfer)})
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it is gone, or not whole
        if transfer.member not in members and now - transfer.at < STALE_S:
            found.append(asdict(transfer))
    return found
