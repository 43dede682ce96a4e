"""Answers of members to the question how a job is, as they could be."""

from __future__ import annotations

from typing import Any

from chaos_mpi.membership import Changes

MEMBERS = ("a:1", "a:2", "b:3")
NOW = 2000.0
MACHINE = {
    "cores": 4, "cpu_percent": 50.0, "load": [1.0, 2.0, 3.0], "memory_total_bytes": 16e9,
    "memory_available_bytes": 12e9, "accelerators": [], "joined_at": 1990.0,
}  # fmt: skip


def event(name: str, member: str, t: float, step: int = 5, epoch: int = 0, **fields: Any) -> dict[str, Any]:
    """One event as a member remembers it."""
    return {
        "t": t, "mono": t - 1000.0, "member": member, "rank": 0, "size": 3, "epoch": epoch, "step": step,
        "event": name, **fields,
    }  # fmt: skip


def answer(member: str, members: tuple[str, ...] = MEMBERS, **known: Any) -> dict[str, Any]:
    """What ``member`` answers, ``known`` in place of the ordinary."""
    host, _, pid = member.rpartition(":")
    ordinary = {
        "member": member, "rank": members.index(member), "host": host, "pid": int(pid), "phase": "compute",
        "members": list(members), "epoch": 0, "min_ranks": 1, "max_ranks": None, "step": 100, "steps_per_s": 10.0,
        "data_epochs": [2], "joins": [], "transfers": [], "changes": Changes().to_json(), "stalled_s": {}, "events": [],
        "links": [], "witness": None,
        "process": {"cpu_percent": 99.0, "cpu_s": 12.5, "rss_bytes": 400e6},
        "machine": MACHINE, "machines": {}, "last": True,
    }  # fmt: skip
    assert known.keys() <= ordinary.keys()
    return {**ordinary, **known}


JOIN = {
    "id": "join-a:1-1", "host": "", "turn": 0, "sponsor": "a:2", "attempt": 2, "newcomer": "b:9", "asked_at": 1990.0,
    "stage": "catching up",
}  # fmt: skip
TRANSFER = {
    "member": "b:9", "got_bytes": 30_000_000, "wanted_bytes": 120_000_000, "left_s": 4.0, "at": 1999.5,
    "rates_bytes_per_s": {"a:1": 12e6, "a:2": 8e6},
}  # fmt: skip
