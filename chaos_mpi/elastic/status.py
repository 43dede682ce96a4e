"""What a member says of itself and of the job when it is asked. Nothing of it touches the path of a step."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from chaos_mpi.agent.machine import Machine
from chaos_mpi.elastic.transfer import transfers
from chaos_mpi.elastic.usage import StepRate, Usage

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session


class MemberStatus:
    """Looks at one session, from threads that are not its own.

    Args:
        session: this member's part in the job.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rate = StepRate()
        self._machine = Machine()
        self._usage: Usage | None = None

    def look(self) -> dict[str, Any]:
        """Note where the step is, so that its speed is known, and what the machine does; about once a second.

        Returns:
            What it does: see :meth:`chaos_mpi.agent.machine.Machine.look`.
        """
        self._rate.look(time.monotonic(), self._session.step)
        return self._machine.look()

    def answer(self) -> dict[str, Any]:
        """All that this member knows, in JSON values:

        * ``member``, ``rank``, ``host``, ``pid``: who it is; ``phase``: what it is doing;
        * ``members``: ids in rank order; ``epoch``: number of this view; ``min_ranks``, ``max_ranks`` (None: no limit);
        * ``step``: steps finished; ``steps_per_s``: over the last seconds, None if not known yet; ``data_epochs``: the
          epoch of each sampler;
        * ``joins``: newcomers on their way: ``id``, ``sponsor``, ``attempt``, ``stage``, ``newcomer`` (its member id,
          once known), ``asked_at`` (Unix seconds), ...;
        * ``transfers``: see :class:`chaos_mpi.elastic.transfer.Transfer`; those on this machine;
        * ``changes``: see :class:`chaos_mpi.membership.Changes`;
        * ``links``: between hosts, as :meth:`chaos_mpi.monitor.linktable.LinkTable.rows`; empty without an agent;
        * ``witness``: the last news of it, see :mod:`chaos_mpi.agent.voice`: ``witness``, ``host`` and ``state``; None
          if there was none;
        * ``stalled_s``: seconds that this member has stood still, by cause;
        * ``events``: its last events, as in the event log, steps left out;
        * ``process``: see :class:`chaos_mpi.elastic.usage.Usage`; ``machine``: see
          :meth:`chaos_mpi.agent.machine.Machine.look`; ``machines``: by host, what the agents say of theirs.
        """
        session = self._session
        if self._usage is None:
            self._usage = Usage()
        machine = self.look()
        links, machines = session.agent.about_hosts() if session.agent is not None else ([], {})
        return {
            "member": session.member,
            "rank": session.rank,
            "host": session.host,
            "pid": os.getpid(),
            "phase": session.phase,
            "members": list(session.members),
            "epoch": session.epoch,
            "min_ranks": session.settings.min_ranks,
            "max_ranks": session.settings.max_ranks,
            "step": session.step,
            "steps_per_s": self._rate.per_s(time.monotonic()),
            "data_epochs": [sampler.epoch for sampler in session.samplers],
            "joins": session.pending_joins(),
            "transfers": transfers(session.settings.run_dir, session.members, time.time()),
            "changes": session.changes.to_json(),
            "links": links,
            "witness": session.agent.witness if session.agent is not None else None,
            "stalled_s": dict(session.recent.stalled_s),
            "events": session.recent.events(),
            "process": self._usage.process(),
            "machine": machine,
            "machines": machines,
        }
