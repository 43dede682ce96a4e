"""Which neighbour sends which bytes of the training state to a newcomer, in shards of which size.

Pure: no I/O, no clock, no torch, no MPI. The same arguments give the same plan at every member, in whatever order the
neighbours are named. :mod:`.cost` is the cost model and the lower bound, :mod:`.plan` what a plan is,
:mod:`.scheduler` makes the best one, :mod:`.baselines` are the other systems' ways to do it.
"""

from chaos_mpi.sharding.baselines import bisected, equal_slices, round_robin, single_nearest, single_random
from chaos_mpi.sharding.cost import Neighbour, ShardingError, fluid_bound_s
from chaos_mpi.sharding.plan import Plan, Range
from chaos_mpi.sharding.scheduler import plan, replan

__all__ = [
    "Neighbour",
    "Plan",
    "Range",
    "ShardingError",
    "bisected",
    "equal_slices",
    "fluid_bound_s",
    "plan",
    "replan",
    "round_robin",
    "single_nearest",
    "single_random",
]
