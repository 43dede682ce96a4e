"""What this rank does at the word of the agent beside it, in a job on several hosts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection

from chaos_mpi.agent.crashes import Crash
from chaos_mpi.agent.link import AgentLink
from chaos_mpi.errors import EngineError
from chaos_mpi.mpi.sever import sever

log = logging.getLogger("chaos_mpi.elastic")


def open_link(member: str) -> AgentLink | None:
    """The connection with the agent; None where there is none.

    Args:
        member: id of this rank.

    Raises:
        EngineError: there should be one, but it does not answer, or it takes another process for the rank.
    """
    try:
        link = AgentLink.open(os.environ, _sever, _stop)
        if link is not None and link.member != member:
            raise EngineError(
                f"this rank is {member}, but the process that was started for it is {link.member}: if a script starts "
                "Python, it has to become it (exec python train.py), or the rank could not be watched"
            )
        return link
    except OSError as error:
        raise EngineError(
            f"the agent of this rank cannot be reached, and lost hosts would go unnoticed: {error}"
        ) from error


def follow(link: AgentLink | None, emit: Callable[..., None], crashed: Callable[[Crash], object]) -> None:
    """Take the agent's news from now on, in another thread: of links, those there was already included, and of crashes.

    Args:
        link: the connection with the agent, if there is one.
        emit: writes to the event log: the name of an event, and its fields.
        crashed: is called when another rank has crashed.
    """

    def changed(links: list[dict[str, str]]) -> None:
        for fields in links:
            emit("link_changed", **fields)

    if link is not None:
        link.follow_links(changed)
        link.follow_crashes(crashed)


def _sever(addresses: Collection[str]) -> None:
    count = sever(addresses)
    log.info("ended %d connections with %s, which the job has given up", count, ", ".join(addresses))


def _stop(reason: str) -> None:
    # The agent has said it where people see it, and ends this process if it does not end by itself.
    log.info("this rank is to stop: %s", reason)
