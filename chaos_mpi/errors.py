"""The named errors of chaos_mpi: every failure a user can meet is one of these.

Each message says what happened, where (host, rank, step) and what to do about it.
"""

from __future__ import annotations


class ChaosError(RuntimeError):
    """Base of every error this package raises on purpose."""


class ConfigError(ChaosError, ValueError):
    """A setting, an argument or an environment variable has a value that cannot be used."""


class EngineError(ChaosError):
    """MPI is missing, was started without fault tolerance, or broke in a way that is not a member's death."""


class NoSessionError(ChaosError):
    """Something needs the elastic session, and :func:`chaos_mpi.init` has not been called (or it was closed)."""


class MismatchError(ChaosError):
    """The model, the optimizer or another part of the training state differs between ranks."""


class TooFewRanksError(ChaosError):
    """Fewer members are left than ``min_ranks`` allows; the job stops after saving its state."""


class CutOffError(ChaosError):
    """This rank cannot reach the majority of the job, which goes on without it; so it stops.

    Attributes:
        lowest: whether it is the lowest rank of those that are cut off together.
    """

    def __init__(self, message: str, *, lowest: bool = False) -> None:
        super().__init__(message)
        self.lowest = lowest


class StopRequestedError(ChaosError):
    """The job was told to end, or this rank was and too few would be left without it: it stops, with its state saved.

    Attributes:
        by_all: whether all members stop, as they have agreed on.
    """

    def __init__(self, message: str, *, by_all: bool = False) -> None:
        super().__init__(message)
        self.by_all = by_all


class WaitTimeoutError(ChaosError):
    """A wait for other members reached its limit (``timeout_s``)."""


class CheckpointError(ChaosError):
    """A checkpoint cannot be written or read, or does not fit the model it is loaded into."""


class RecoveryError(ChaosError):
    """Recovery from a failure did not converge; the cause of the last attempt is chained to it."""


class GroupBrokenError(ChaosError):
    """A member of a group of some ranks has died, and the group with it; the job as a whole goes on."""


class ViewChangedError(ChaosError):
    """A member died in a call that was made for just so many ranks, as an all-to-all with splits; nothing was done."""


class PeerFailedError(Exception):
    """A communicator is broken: a member died, or another member revoked it. Never leaves the package.

    Attributes:
        met: whether the survivors have met in an agreement already, which is how a recovery begins.
    """

    def __init__(self, message: str, *, met: bool = False) -> None:
        super().__init__(message)
        self.met = met


class JoinError(ChaosError):
    """This process was started to join a running job, and cannot: it does not fit, or the job has no use for it."""
