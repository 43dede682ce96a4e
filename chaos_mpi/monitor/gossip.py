"""Spreading what each node says of itself (resources, links) to all, at a bounded cost for each node.

In each round a node sends to a few others what it has not passed on often enough yet, newest first, and at most a fixed
number of bytes; where that leaves room, also what it has not sent for longest, so that who missed something gets it
later. (Rumour mongering and anti-entropy: Demers et al., "Epidemic Algorithms for Replicated Database Maintenance",
PODC 1987; the piggybacking of SWIM.) Only the origin makes new versions, so the highest version wins, in whatever order
they come.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

OriginT = TypeVar("OriginT", bound=Hashable)
#: How often something counts as passed on that is no news: more often than any news is.
_SETTLED = 1 << 30


class Record(NamedTuple, Generic[OriginT]):
    """What one node says of itself.

    Attributes:
        origin: who.
        version: grows with each.
        payload: what, encoded.
    """

    origin: OriginT
    version: int
    payload: bytes

    @property
    def nbytes(self) -> int:
        """What it takes in a message, about: the payload, and 16 bytes for origin and version."""
        return 16 + len(self.payload)


@dataclass(slots=True)
class Gossip(Generic[OriginT]):
    """What one node knows of all.

    Args:
        me: this node.
        fan_out: how many others it sends to in one round.
        budget_bytes: the most it sends to one of them in one round. A record that is longer is never sent.
    """

    me: OriginT
    fan_out: int = 3
    budget_bytes: int = 1024
    records: dict[OriginT, Record[OriginT]] = field(default_factory=dict)
    _sent: dict[OriginT, int] = field(default_factory=dict)  # how often the present version was passed on
    _round: int = 0
    _sent_in: dict[OriginT, int] = field(default_factory=dict)

    def publish(self, payload: bytes) -> None:
        """Say something new of this node.

        Raises:
            ValueError: it does not fit into a message.
        """
        known = self.records.get(self.me)
        record = Record(self.me, 0 if known is None else known.version + 1, payload)
        if record.nbytes > self.budget_bytes:
            raise ValueError(f"a record of {record.nbytes} bytes does not fit into {self.budget_bytes} bytes")
        self._store(record)

    def receive(self, records: Iterable[Record[OriginT]], *, settled: bool = False) -> None:
        """Take in what another node sent. Nobody else's word on this node itself counts.

        Args:
            records: what came.
            settled: it is no news to others (all that a member knows, told to a newcomer), so it is not spread.
        """
        for record in records:
            known = self.records.get(record.origin)
            if record.origin != self.me and (known is None or record.version > known.version):
                self._store(record)
                if settled:
                    self._sent[record.origin] = _SETTLED

    def _store(self, record: Record[OriginT]) -> None:
        self.records[record.origin] = record
        self._sent[record.origin] = 0

    def forget(self, origins: Iterable[OriginT]) -> None:
        """Drop what nodes that are gone have said."""
        for origin in origins:
            for known in (self.records, self._sent, self._sent_in):
                known.pop(origin, None)

    def next_round(
        self, others: Sequence[OriginT], rng: random.Random
    ) -> list[tuple[OriginT, tuple[Record[OriginT], ...]]]:
        """What to send to whom in this round.

        Args:
            others: the nodes that can be reached.
            rng: chooses among them.
        """
        self._round += 1
        targets = rng.sample(others, min(self.fan_out, len(others)))
        if not targets:
            return []
        # Passed on often enough that, but for a chance that shrinks with the size of the cluster, all have got it.
        enough = 3 * math.ceil(math.log2(len(others) + 2))
        hot = sorted((o for o, n in self._sent.items() if n < enough), key=lambda o: self._sent[o])
        spare = sorted((o for o, n in self._sent.items() if n >= enough), key=lambda o: self._sent_in.get(o, 0))
        chosen, room = [], self.budget_bytes
        for origin in (*hot, *spare):
            record = self.records[origin]
            if record.nbytes > room:
                break
            room -= record.nbytes
            chosen.append(record)
            self._sent[origin] += len(targets)
            self._sent_in[origin] = self._round
        return [(target, tuple(chosen)) for target in targets]
