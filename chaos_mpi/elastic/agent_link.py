"""What this rank does at the word of the agent beside it, in a job on several hosts."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection

from chaos_mpi.agent.link import AgentLink
from chaos_mpi.errors import EngineError
from chaos_mpi.mpi.sever import sever

log = logging.getLogger("chaos_mpi.elastic")


def open_link() -> AgentLink | None:
    """The connection with the agent; None where there is none.

    Raises:
        EngineError: there should be one, but it does not answer.
    """
    try:
        return AgentLink.open(os.environ, _sever, _stop)
    except OSError as error:
        raise EngineError(
            f"the agent of this rank cannot be reached, and lost hosts would go unnoticed: {error}"
        ) from error


def _sever(addresses: Collection[str]) -> None:
    count = sever(addresses)
    log.info("ended %d connections with %s, which the job has given up", count, ", ".join(addresses))


def _stop(reason: str) -> None:
    # The agent has said it where people see it, and ends this process if it does not end by itself.
    log.info("this rank is to stop: %s", reason)
