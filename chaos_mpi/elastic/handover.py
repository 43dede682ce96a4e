"""What a newcomer is told of the samples of the epoch under way: the plan with all its changes, as a plain tree.

A tree has numbers, text, lists, dicts and int64 tensors only, so it travels with the training state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from chaos_mpi.elastic.partition import Change, EpochPlan, Segment, permutation


def plan_to_tree(plan: EpochPlan) -> dict[str, Any]:
    """The plan as a tree; the samples of a segment only where they are not the end of the epoch's permutation."""
    segments = [
        {
            "first_round": segment.first_round,
            "members": list(segment.members),
            "sizes": list(segment.sizes),
            "origin": segment.origin,
            "gone": sorted(segment.gone),
            "pool": torch.tensor(segment.pool, dtype=torch.int64, device="cpu") if segment.origin is None else None,
        }
        for segment in plan.segments
    ]
    kept = {name: getattr(plan, name) for name in ("epoch", "seed", "length", "shuffle", "drop_last")}
    return {**kept, "segments": segments}


def plan_from_tree(tree: Mapping[str, Any]) -> EpochPlan:
    """The reverse of :func:`plan_to_tree`."""
    epoch, seed, length = (int(tree[name]) for name in ("epoch", "seed", "length"))
    shuffle, drop_last = bool(tree["shuffle"]), bool(tree["drop_last"])
    order = permutation(length, seed, epoch, shuffle)
    segments = []
    for part in tree["segments"]:
        pool = order[part["origin"] :] if part["origin"] is not None else part["pool"].numpy().copy()
        pool.setflags(write=False)
        segments.append(
            Segment(
                part["first_round"], tuple(part["members"]), tuple(part["sizes"]), pool, drop_last,
                part["origin"], frozenset(part["gone"]),
            )
        )  # fmt: skip
    return EpochPlan(epoch, seed, length, shuffle, drop_last, tuple(segments))


def change_to_tree(change: Change) -> dict[str, Any]:
    """A change of membership as a tree."""
    return {**dataclasses.asdict(change), "old": list(change.old), "new": list(change.new)}


def change_from_tree(tree: Mapping[str, Any]) -> Change:
    """The reverse of :func:`change_to_tree`."""
    return Change(**{**tree, "old": tuple(tree["old"]), "new": tuple(tree["new"])})
