"""What a proxy does for the watch over the nodes: it passes contacts on, and fences lost hosts off."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.exchange import Exchange, is_taken
from chaos_mpi.agent.frames import Frame, Kind, encode_json
from chaos_mpi.agent.registry import fence
from chaos_mpi.errors import ChaosError

log = logging.getLogger("chaos_mpi.agent")

#: How long a directory that cannot be used is left alone.
RETRY_S = 1.0


class Liaison:
    """One proxy's part.

    Args:
        directory: of the job's registry.
        host: where the rank is, as ssh knows it; empty for the launch host.
        job: the PMIx namespace of the rank.
        rank: its number in that.
        first_size: how many ranks the job has begun with, if this rank is one of them; None for a newcomer.
    """

    def __init__(self, directory: Path, host: str, job: str, rank: int, first_size: int | None) -> None:
        self._directory, self._host = directory, host
        self._place = (job, rank, first_size)
        self._launcher = os.getppid()
        self._following: asyncio.Task[None] | None = None

    def heed(self, frame: Frame, write: Callable[[bytes], None]) -> None:
        """Take a ``CONTACT`` or ``FENCE`` frame of the agent.

        Args:
            frame: that has come.
            write: takes frames for the agent.

        Raises:
            ChaosError: it cannot be understood.
        """
        if frame.kind is Kind.CONTACT:
            if self._following is None:
                contact = Contact.from_json(frame.json())
                self._following = asyncio.get_running_loop().create_task(self._follow(contact, write))
        elif (host := str(frame.json())) != self._host:
            fence(self._directory, host)
            write(encode_json(Kind.FENCED, host))

    async def _follow(self, contact: Contact, write: Callable[[bytes], None]) -> None:
        def send(news: dict[str, Any]) -> None:
            write(encode_json(Kind.CONTACTS, news))

        exchange = Exchange(self._directory, *self._place, send, self._launcher)
        complaint = "%s is not watched: the contacts in %s cannot be exchanged: %s"
        complained = False
        while True:
            try:
                if is_taken(self._directory, contact):
                    log.error("%s ends: the job has had a rank of this name, process id and all", contact.member)
                    write(encode_json(Kind.SIGNAL, signal.SIGKILL))
                    return
                exchange.post(contact)
                await exchange.follow()
            except OSError as error:  # it may be full for a while, or there are too many open files
                if not complained:
                    log.error(f"{complaint}; it is tried again", contact.member, self._directory, error)
                complained = True
                await asyncio.sleep(RETRY_S)
            except (ChaosError, ValueError) as error:  # the second one: it is more than fits into a frame
                log.error(complaint, contact.member, self._directory, error)
                return
