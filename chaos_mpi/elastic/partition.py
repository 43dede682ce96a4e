"""Which rank trains on which samples in which round of an epoch, through any change of membership.

Pure: every member computes the same plan from the same arguments, so nothing but counters is ever sent.

An epoch is a pool of sample indices in one shuffled order. In each *round* every member gets one batch. A
plan is a chain of *segments*; within a segment membership is constant, and a round takes the next
``sum(sizes)`` samples of the segment's pool, cut into consecutive pieces, one per member in rank order. When
membership changes, the members that stay keep the rounds which were already handed out to them (a prefetching
loader cannot take a batch back), what the departed ones had not finished returns to the front of the pool,
and a new segment starts after the last round that anyone was handed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_NOTHING: Indices = np.empty(0, dtype=np.int64)
_NOTHING.setflags(write=False)


def permutation(length: int, seed: int, epoch: int, shuffle: bool) -> Indices:
    """The order of the samples ``0..length-1`` in an epoch, read-only. ``seed`` and ``epoch`` must not be negative."""
    order = np.arange(length, dtype=np.int64)
    if shuffle:
        np.random.Generator(np.random.PCG64([seed, epoch])).shuffle(order)
    order.setflags(write=False)
    return order


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of rounds with constant membership, over ``pool``.

    ``origin``, where not None, says that ``pool`` is the permutation from that position on. ``gone`` are
    members that departed since: their pieces have been moved to a later segment. The plan ends a segment
    where the next begins.
    """

    first_round: int
    members: tuple[str, ...]
    sizes: tuple[int, ...]
    pool: Indices
    drop_last: bool = False
    origin: int | None = None
    gone: frozenset[str] = frozenset()

    @property
    def batch(self) -> int:
        """Samples in a full round."""
        return sum(self.sizes)

    @property
    def end_round(self) -> int:
        """The first round after this segment, if no other segment cuts it short.

        A remainder too small to give every member two samples (or one, where batches are that small) joins the last
        full round instead of making its own: BatchNorm cannot train on a single sample.
        """
        full, rest = divmod(len(self.pool), self.batch)
        least = min(2, *self.sizes) * len(self.members)
        own_round = rest > 0 and not self.drop_last and (full == 0 or rest >= least)
        return self.first_round + full + int(own_round)

    def bounds(self, round_: int) -> tuple[int, int]:
        """The part of the pool that a round of this segment takes."""
        start = (round_ - self.first_round) * self.batch
        if round_ == self.end_round - 1 and not self.drop_last:
            return start, len(self.pool)
        return start, start + self.batch

    def piece(self, round_: int, rank: int) -> Indices:
        """The samples of the member at position ``rank``: its batch size, or an even share of an irregular round."""
        start, stop = self.bounds(round_)
        if stop - start == self.batch:
            low = start + sum(self.sizes[:rank])
            return self.pool[low : low + self.sizes[rank]]
        base, extra = divmod(stop - start, len(self.members))
        low = start + rank * base + min(rank, extra)
        return self.pool[low : low + base + (1 if rank < extra else 0)]

    def pieces(self, start: int, stop: int, of: frozenset[str]) -> Iterator[Indices]:
        """The pieces of the members ``of`` in rounds ``start..stop-1``, by round, then rank."""
        ranks = [rank for rank, member in enumerate(self.members) if member in of]
        for round_ in range(start, stop):
            for rank in ranks:
                yield self.piece(round_, rank)


@dataclasses.dataclass(frozen=True, eq=False)
class EpochPlan:
    """The assignment of an epoch's samples to rounds and members. Immutable; a change gives a new plan.

    ``drop_last`` leaves out a final round that would be smaller than the global batch.
    """

    epoch: int
    seed: int
    length: int
    shuffle: bool
    drop_last: bool
    segments: tuple[Segment, ...]

    @classmethod
    def fresh(
        cls,
        *,
        epoch: int,
        seed: int,
        length: int,
        members: Sequence[str],
        sizes: Sequence[int],
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> EpochPlan:
        """The plan of a whole epoch; ``sizes`` are the members' batch sizes, each at least 1.

        Raises ``ValueError`` when members and sizes do not fit together.
        """
        _check_members(members, sizes)
        order = permutation(length, seed, epoch, shuffle)
        segment = Segment(0, tuple(members), tuple(sizes), order, drop_last, origin=0)
        return cls(epoch, seed, length, shuffle, drop_last, (segment,))

    @property
    def first_round(self) -> int:
        """The earliest round the plan still knows; those before it are done."""
        return self.segments[0].first_round

    @property
    def rounds(self) -> int:
        """The number of rounds of the epoch, counted from its start."""
        return self.segments[-1].end_round

    def assignment(self, round_: int, member: str) -> Indices:
        """The samples of ``member`` in a round; empty if it has none there (a newcomer, or too few samples for all).

        Raises ``IndexError`` for a round that is not part of the plan, or so long done that it was forgotten.
        """
        if not self.first_round <= round_ < self.rounds:
            raise IndexError(f"round {round_} is not in the plan's rounds {self.first_round}..{self.rounds - 1}")
        segment = next(s for s in reversed(self.segments) if s.first_round <= round_)
        if member in segment.gone or member not in segment.members:
            return _NOTHING
        return segment.piece(round_, segment.members.index(member))

    def unfinished(self, done_round: int, members: Sequence[str]) -> int:
        """How many samples ``members`` have in the rounds from ``done_round`` on."""
        start = max(done_round, self.first_round)
        return sum(len(self.assignment(r, m)) for r in range(start, self.rounds) for m in members)

    def after_change(
        self, done_round: int, horizon: int, survivors: Sequence[str], new_sizes: Sequence[int]
    ) -> EpochPlan:
        """The plan once the members are ``survivors`` (some of whom may be new), with the batch sizes ``new_sizes``.

        Rounds before ``done_round`` are finished, by whoever was a member then. Up to ``horizon``, the end of
        what any survivor was handed, survivors keep their assignments and a new one has none; what the
        departed had there goes to the front of the new pool, before all that was planned from ``horizon`` on.
        Rounds outside the plan are taken as its nearest end. Raises ``ValueError`` when survivors and sizes
        do not fit together.
        """
        _check_members(survivors, new_sizes)
        done = min(max(done_round, self.first_round), self.rounds)
        horizon = min(max(horizon, done), self.rounds)
        staying = frozenset(survivors)
        returned: list[Indices] = []
        kept: list[Segment] = []
        for segment, end in self._active():
            start, stop = max(done, segment.first_round), min(horizon, end)
            if start < stop:
                departed = frozenset(segment.members) - segment.gone - staying
                returned.extend(segment.pieces(start, stop, departed))
                kept.append(dataclasses.replace(segment, gone=segment.gone | departed))
        later, origin = self._remaining(horizon, finished=done >= self.rounds)
        if any(map(len, returned)):
            origin = None
        pool = _join(returned + later)
        last = Segment(horizon, tuple(survivors), tuple(new_sizes), pool, self.drop_last, origin)
        return dataclasses.replace(self, segments=(*kept, last))

    def to_state(self, done_round: int) -> tuple[dict[str, Any], Indices | None]:
        """The position after ``done_round`` finished rounds: JSON values, and the remaining samples in their order.

        The array is None while they are simply the end of the epoch's permutation; then ``offset`` says where
        they begin, and otherwise ``offset`` is None.
        """
        done = min(max(done_round, self.first_round), self.rounds)
        pieces, origin = self._remaining(done, finished=done >= self.rounds)
        values = {
            "epoch": self.epoch,
            "seed": self.seed,
            "length": self.length,
            "shuffle": int(self.shuffle),
            "drop_last": int(self.drop_last),
            "done": done,
            "offset": origin,
        }
        return values, None if origin is not None else _join(pieces)

    @classmethod
    def from_state(
        cls,
        values: Mapping[str, Any],
        remaining: Indices | None,
        members: Sequence[str],
        sizes: Sequence[int],
    ) -> EpochPlan:
        """The plan that goes on from :meth:`to_state`, for any number of members, in one fresh segment.

        Raises ``ValueError`` when the state is incomplete or contradicts itself.
        """
        _check_members(members, sizes)
        numbers = {name: int(values[name]) for name in ("epoch", "seed", "length", "done")}
        shuffle, drop_last = bool(values["shuffle"]), bool(values["drop_last"])
        if min(numbers.values()) < 0:
            raise ValueError(f"a sampler state has no negative numbers: {numbers}")
        epoch, seed, length = numbers["epoch"], numbers["seed"], numbers["length"]
        origin = values["offset"]
        if (origin is None) == (remaining is None):
            raise ValueError("a sampler state holds either an offset or the remaining samples")
        if remaining is None:
            pool = permutation(length, seed, epoch, shuffle)[int(origin) :]
        else:
            pool = np.array(remaining, dtype=np.int64)
            if len(np.unique(pool)) != len(pool) or (len(pool) and not 0 <= pool.min() <= pool.max() < length):
                raise ValueError(f"the remaining samples are not distinct indices below {length}")
            pool.setflags(write=False)
        segment = Segment(numbers["done"], tuple(members), tuple(sizes), pool, drop_last, origin)
        return cls(epoch, seed, length, shuffle, drop_last, (segment,))

    def _active(self) -> Iterator[tuple[Segment, int]]:
        """Each segment with the round where it ends in this plan."""
        for segment, following in zip(self.segments, self.segments[1:], strict=False):
            yield segment, following.first_round
        yield self.segments[-1], self.rounds

    def _remaining(self, round_: int, *, finished: bool) -> tuple[list[Indices], int | None]:
        """All samples of rounds ``round_`` and later, in order, and where they begin in the permutation.

        The second value is None unless they are simply its end. With ``drop_last`` they include what was too
        little for a round, since after a change it may be enough, but not once the epoch is ``finished``.
        """
        front: list[Indices] = []
        for segment, end in list(self._active())[:-1]:
            start = max(round_, segment.first_round)
            if segment.gone:
                front.extend(segment.pieces(start, end, frozenset(segment.members) - segment.gone))
            elif start < end:
                front.append(segment.pool[segment.bounds(start)[0] : segment.bounds(end - 1)[1]])
        last = self.segments[-1]
        low = (max(round_, last.first_round) - last.first_round) * last.batch
        if finished or (round_ >= self.rounds and not self.drop_last):
            low = len(last.pool)
        origin = None if last.origin is None or any(map(len, front)) else last.origin + low
        return [*front, last.pool[low:]], origin


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of membership, in the terms of the newest pass over the data (``lap``) that any survivor is in."""

    lap: int
    epoch: int
    old: tuple[str, ...]
    new: tuple[str, ...]
    done: int
    horizon: int
    seen: int  # the most rounds that a survivor's loop had been given
    over: bool  # some survivor has left the loop over this epoch: it can get no longer

    @classmethod
    def from_reports(
        cls, reports: Sequence[Mapping[str, Any]], old_members: Sequence[str], new_members: Sequence[str]
    ) -> Change:
        """The same change at every survivor, from where each of them is. Survivors of older laps have no say."""
        lap = max(int(report["lap"]) for report in reports)
        front = [report for report in reports if report["lap"] == lap]
        return cls(
            lap=lap,
            epoch=int(front[0]["epoch"]),
            old=tuple(old_members),
            new=tuple(new_members),
            done=max(int(report["done"]) for report in front),
            horizon=max(int(report["issued"]) for report in front),
            seen=max(int(report["taken"]) for report in front),
            over=any(bool(report["ended"]) for report in front),
        )

    @property
    def departed(self) -> list[str]:
        """Who is gone."""
        return sorted(set(self.old) - set(self.new))


def _join(pieces: list[Indices]) -> Indices:
    pieces = [piece for piece in pieces if len(piece)]
    if len(pieces) == 1:
        return pieces[0]
    pool = np.concatenate(pieces) if pieces else _NOTHING
    pool.setflags(write=False)
    return pool


def _check_members(members: Sequence[str], sizes: Sequence[int]) -> None:
    if not members or len(set(members)) != len(members):
        raise ValueError(f"members must be distinct and at least one: {list(members)}")
    if len(sizes) != len(members) or min(sizes) < 1:
        raise ValueError(f"every member needs a batch size of at least 1: {list(sizes)} for {len(members)} members")
