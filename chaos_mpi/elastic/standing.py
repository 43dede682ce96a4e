"""Where this member stands in its job: its rank, the view, and how far it is with a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos_mpi.elastic.collectives import CollectiveCalls
from chaos_mpi.membership import on_host

if TYPE_CHECKING:
    from chaos_mpi.agent.link import AgentLink
    from chaos_mpi.config import Settings
    from chaos_mpi.elastic.launching import Sizes
    from chaos_mpi.elastic.sequence import OperationSequence
    from chaos_mpi.membership import View
    from chaos_mpi.mpi.growth import Bridge


class StandingSession(CollectiveCalls):
    """What a session knows of its own place. The session itself sets the attributes."""

    settings: Settings
    host: str
    member: str
    step: int
    _agent: AgentLink | None
    _boundary_step: int
    _bridge: Bridge | None
    _has_entered: bool
    _last_contributors: tuple[str, ...]
    _sequence: OperationSequence
    _told_sizes: Sizes | None

    @property
    def agent(self) -> AgentLink | None:
        """The connection with the agent beside this rank, in a job on several hosts."""
        return self._agent

    @property
    def rank(self) -> int:
        """This member's rank in the present view."""
        return self._sequence.world.rank

    @property
    def size(self) -> int:
        """Number of members in the present view."""
        return self._sequence.view.size

    @property
    def members(self) -> tuple[str, ...]:
        """Ids of the members, in rank order."""
        return self._sequence.view.members

    @property
    def view(self) -> View:
        """The present view."""
        return self._sequence.view

    @property
    def local_rank(self) -> int:
        """This member's place among those on its host, from 0; MPI's own is that on the launch host, with ``--hosts``.

        Of a process that is still to join it is 0.
        """
        return on_host(self.members, self.host).index(self.member)

    @property
    def epoch(self) -> int:
        """Number of the present view; one more after every committed change of membership."""
        return self._sequence.view.epoch

    @property
    def phase(self) -> str:
        """What the session is doing: ``compute``, the label of an operation, or a part of a recovery."""
        return self._sequence.phase

    @property
    def last_contributors(self) -> tuple[str, ...]:
        """Members whose gradients are in the last finished step; the same at every member."""
        return self._last_contributors

    @property
    def gradient_contributors(self) -> int:
        """The number of :attr:`last_contributors`; before the first step, the size."""
        return len(self._last_contributors)

    @property
    def is_newcomer(self) -> bool:
        """Whether this process was started to join a running job."""
        return self._bridge is not None

    @property
    def batch_policy(self) -> str:
        """The rule for batch size and learning rate on a change of size."""
        return self.settings.batch_policy

    @property
    def expected_size(self) -> int:
        """The number of ranks; for a process that is to join a job, that of the job when it was started."""
        return self._told_sizes.present if self.awaits_entry and self._told_sizes is not None else self.size

    @property
    def awaits_entry(self) -> bool:
        """Whether this process was started to join a running job, and has not got so far."""
        return self._bridge is not None and not self._has_entered

    @property
    def at_boundary(self) -> bool:
        """Whether no step was finished since the last boundary."""
        return self.step == self._boundary_step

    @property
    def gradient_step_is_open(self) -> bool:
        """Whether a gradient step was begun, and has not come to its end."""
        operation = self._sequence.in_flight
        return operation is not None and operation.is_gradient_step
