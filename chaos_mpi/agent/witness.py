"""The launch host's voice among the agents of a job that has no rank there: ``python -m chaos_mpi.agent.witness``.

Of two hosts that lose each other neither can tell whether the other lives, and at most one may go on: a third voice
says which. It takes part in the watch as the agent beside a rank does (:mod:`chaos_mpi.agent.guard`), but severs
nothing and stops nobody. See :meth:`chaos_mpi.monitor.cluster.ClusterView.is_quorum` for what its vote counts.

It belongs to the ``chaosrun`` that has started it: the end of its standard input, which ``chaosrun`` holds, is
its end, however that came about. It says no farewell: to be voted out would take as long as to be found silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from chaos_mpi.agent import tasks
from chaos_mpi.agent.contacts import Contact, own_interfaces, select
from chaos_mpi.agent.detouring import KINDS, Detouring
from chaos_mpi.agent.exchange import Exchange
from chaos_mpi.agent.guard import Settings
from chaos_mpi.agent.streams import pipe_reader
from chaos_mpi.agent.watch import Watch
from chaos_mpi.errors import ChaosError, EngineError

log = logging.getLogger("chaos_mpi.agent")

MODULE = "chaos_mpi.agent.witness"
#: How often it is looked whether the launch host has got a rank after all.
_PERIOD_S = 1.0


def name_of(pid: int) -> str:
    """How the agents call the witness that is this process."""
    return f"{socket.gethostname()}:{pid}"


class Witness:
    """One witness. To be made and used in a running event loop.

    Args:
        directory: the job's private directory on this host.
        settings: how the job is watched.

    Raises:
        ChaosError: it cannot take part; says why.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        from chaos_mpi.agent.mesh import Mesh

        self._settings = settings
        own = select(own_interfaces(), settings.network)
        self._mesh = Mesh(own, self._receive)
        self._me = Contact(name_of(os.getpid()), "", self._mesh.addresses, self._mesh.port, self._mesh.key)
        self._watch = Watch(
            self._me, self._mesh, settings.timing, lambda removal: None, self._stopped, lambda crash: None
        )  # fmt: skip
        self._detouring = Detouring(
            self._me.member, own, self._mesh, self._watch, settings.timing, settings.detours, lambda links: None
        )
        self._exchange = Exchange(directory, None, 0, None, self._heed)
        self._begun = False
        self._over = asyncio.Event()

    async def run(self, until: asyncio.Event) -> None:
        """Take part until then, or until the others do without it."""
        try:
            self._exchange.post(self._me)
        except OSError as error:
            raise EngineError(f"{error.filename}: {error.strerror}") from error
        work = [asyncio.create_task(part) for part in (self._exchange.follow(), self._give_way())]
        ends = [asyncio.create_task(event.wait()) for event in (until, self._over)]
        try:
            await asyncio.wait([*work, *ends], return_when=asyncio.FIRST_COMPLETED)
            for task in work:
                if task.done():
                    task.result()
        finally:
            await tasks.cancel([*work, *ends])

    async def close(self) -> None:
        """End all connections, and put routes back."""
        await self._detouring.close()
        self._watch.close()
        await self._mesh.close()

    def _receive(self, sender: str, message: dict[str, Any]) -> None:
        if message.get("kind") in KINDS:
            self._detouring.receive(sender, message)
        else:
            self._watch.receive(sender, message)

    def _heed(self, news: dict[str, Any]) -> None:
        contacts, first = [Contact.from_json(entry) for entry in news["contacts"]], news["first"]
        if self._begun or first is None:
            self._watch.know(contacts)
            return
        self._begun = True
        self._watch.begin(first, contacts, witness=self._me.member)
        self._detouring.start(alone=True)

    async def _give_way(self) -> None:
        """Return when a rank has joined on this host, and with that an agent that has a vote already."""
        while not any(self._is_here(node.name) for node in (self._watch.view.members if self._watch.view else ())):
            await asyncio.sleep(_PERIOD_S)

    def _is_here(self, member: str) -> bool:
        contact = self._watch.contact(member)
        here = set(self._me.addresses)
        return contact is not None and contact is not self._me and set(contact.addresses) == here

    def _stopped(self, reason: str) -> None:
        log.warning("this host has no vote in the job any more: %s", reason)
        self._over.set()


async def _main() -> None:
    orders = await pipe_reader(os.dup(0))
    told = json.loads(await orders.readline() or "null")
    if told is None:  # chaosrun has ended at once
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    witness = Witness(Path(told["directory"]), Settings.from_json(told["settings"]))
    watching = asyncio.create_task(_wait_for_end(orders, ended))
    try:
        await witness.run(ended)
    finally:
        await tasks.cancel([watching])
        await witness.close()


async def _wait_for_end(orders: asyncio.StreamReader, ended: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while await orders.read(1 << 10):
            pass
    ended.set()


def main() -> None:
    """Be the witness of the job that a line on standard input tells of."""
    logging.basicConfig(format="chaosrun: %(message)s")
    try:
        asyncio.run(_main())
    except ChaosError as error:
        log.warning("this host has no vote in the job: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
