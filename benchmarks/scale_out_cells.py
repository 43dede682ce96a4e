"""The settings of the scale-out benchmark, and the systems that are compared in them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from chaos_mpi.sharding import Neighbour, fluid_bound_s

SYSTEMS = {
    "chaos_overlap": "chaos_mpi overlap",
    "chaos_blocking": "chaos_mpi blocking",
    "random": "EDL",
    "nearest": "Elan",
    "all_gather": "Autoscaling",
    "checkpoint": "Pollux/AdaptDL",
}
#: Uplinks of the sources relative to their mean.
UNEQUAL = {2: (1.5, 0.5), 4: (1.8, 1.2, 0.6, 0.4), 6: (1.9, 1.5, 1.0, 0.8, 0.4, 0.4)}
#: Mean uplink at which four sources need a second for a state, but not more than this machine can move for six.
MEAN_MBIT_PER_MB, MOST_MBIT = 2.0, 400.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting in which all systems are compared.

    Attributes:
        state_mb: size of the training state, millions of bytes.
        sources: members before the join.
        links: ``equal`` or ``unequal``.
    """

    state_mb: int
    sources: int
    links: str

    @property
    def state_bytes(self) -> int:
        """Size of the training state."""
        return self.state_mb * 1_000_000

    @property
    def mean_mbit(self) -> float:
        """Mean uplink of the sources."""
        return min(MEAN_MBIT_PER_MB * self.state_mb, MOST_MBIT)

    @property
    def rates_mbit(self) -> list[float]:
        """Uplinks of the sources, in rank order; the fastest is not rank 0, which starts the newcomer."""
        shares = UNEQUAL[self.sources] if self.links == "unequal" else (1.0,) * self.sources
        rates = [round(self.mean_mbit * share, 3) for share in shares]
        return rates[1:] + rates[:1]

    @property
    def bound_s(self) -> float:
        """The time in which no schedule can move the state over these uplinks."""
        links = [Neighbour(f"h{i}", rate * 125_000) for i, rate in enumerate(self.rates_mbit)]
        return fluid_bound_s(self.state_bytes, links)

    @property
    def random_s(self) -> float:
        """How long one link takes for the state, on average over all links."""
        return statistics.mean([self.state_bytes / (rate * 125_000) for rate in self.rates_mbit])

    @property
    def title(self) -> str:
        """For people."""
        rates = ", ".join(f"{rate:g}" for rate in self.rates_mbit)
        return f"{self.state_mb} MB from {self.sources} sources, uplinks {rates} Mbit/s"
