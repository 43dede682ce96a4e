"""What this rank does at the word of the agent beside it, in a job on several hosts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from chaos_mpi.agent.link import AgentLink
from chaos_mpi.errors import EngineError
from chaos_mpi.membership import host_of
from chaos_mpi.monitor.hostlinks import UP
from chaos_mpi.mpi.sever import sever
from chaos_mpi.mpi.traffic import sent_by_address

if TYPE_CHECKING:
    from chaos_mpi.elastic.negotiator import Negotiator
    from chaos_mpi.elastic.session import Session

log = logging.getLogger("chaos_mpi.elastic")

#: How often it is tried to end connections, and the time between, seconds.
_SEVER_TRIES, _SEVER_PERIOD_S = 50, 0.1


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


def follow(session: Session, negotiator: Negotiator) -> None:
    """Take the agent's news from now on, in another thread: of links and the witness, those there was already included,
    and of others.

    Args:
        session: this rank's, with the connection to the agent, if there is one.
        negotiator: is told what the members might do about the news.
    """
    shown: dict[tuple[str, str], dict[str, str]] = {}

    def changed(links: list[dict[str, str]]) -> None:
        for news in links:
            where = {"a": news["a"], "b": news["b"]}
            how, no_detour = {"state": news["state"], "via": news["via"]}, news["no_detour"]
            before = shown.get((news["a"], news["b"]), {"state": UP, "via": "", "no_detour": ""})
            shown[news["a"], news["b"]] = news
            if not before.items() >= how.items():
                session.emit("link_changed", **where, **how)
            if no_detour and no_detour != before["no_detour"]:
                session.emit("detour_failed", **where, reason=no_detour)

    def traffic() -> dict[str, Any]:
        return {"sent": sent_by_address(), "members": session.members, "step": session.step}

    if (link := session.agent) is not None:
        link.follow_links(changed)
        link.follow_witness(lambda fields: session.emit("witness_changed", **fields))
        link.follow_crashes(negotiator.requests.restart)
        link.follow_joins(negotiator.launch_ended)
        link.follow_order(traffic, negotiator.requests.order)


def links_between(members: Collection[str], link: AgentLink | None) -> list[dict[str, str]]:
    """The links between hosts of these members that are cut, down or on a detour, as ``link_changed`` has them.

    Args:
        members: their ids.
        link: the connection with the agent, which knows; None: there is none, and no such link.
    """
    hosts = {host_of(member) for member in members}
    known = [] if link is None else link.links
    return [
        {name: news[name] for name in ("a", "b", "state", "via")}
        for news in known
        if news["state"] != UP and {news["a"], news["b"]} <= hosts
    ]


def fate_of(lost: Collection[str], link: AgentLink | None) -> str:
    """What has become of members that are lost, for people."""
    given_up = link.given_up.intersection(lost) if link is not None else set[str]()
    died = ", ".join(member for member in lost if member not in given_up)
    silent = ", ".join(member for member in lost if member in given_up)
    told = [f"{died} died"] if died else []
    if silent:
        told.append(f"{silent} lost, as nothing was heard from there ('chaosctl add --host' brings a machine back)")
    return "; ".join(told)


def _sever(addresses: Collection[str]) -> None:
    for _ in range(_SEVER_TRIES):
        try:
            count = sever(addresses)
            break
        except OSError as error:  # too many open files: /proc cannot be looked at
            log.warning("the connections with %s cannot be ended yet: %s", ", ".join(addresses), error)
            time.sleep(_SEVER_PERIOD_S)
    else:
        return
    log.info("ended %d connections with %s, which the job has given up", count, ", ".join(addresses))


def _stop(reason: str) -> None:
    # The agent has said it where people see it, and ends this process if it does not end by itself.
    log.info("this rank is to stop: %s", reason)
