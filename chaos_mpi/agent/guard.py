"""What a supervisor does to have its rank watched: the watch over the other nodes, and the rank's link to it.

What happens when a node is lost: the agents that are left agree on a view without it. Each has its proxy fence the
lost host off (:mod:`chaos_mpi.agent.registry`), and then tells its rank to sever the connections with it. An agent that
finds out that the others have gone on without it, or that it is cut off from the majority, ends its rank. Where two
hosts cannot reach each other but others can, their routes are led over one of these (:mod:`chaos_mpi.agent.detouring`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaos_mpi.agent import probing
from chaos_mpi.agent.contacts import MOST_ADDRESSES, Contact, Interface, own_interfaces, select
from chaos_mpi.agent.detouring import KINDS, Detouring
from chaos_mpi.agent.frames import Frame, Kind, encode_json
from chaos_mpi.agent.link_server import LinkServer
from chaos_mpi.agent.losses import Removal
from chaos_mpi.agent.ordering import Ordering
from chaos_mpi.agent.probing import Probing
from chaos_mpi.agent.talk import DISOWNED
from chaos_mpi.agent.voice import Voice
from chaos_mpi.agent.watch import Watch
from chaos_mpi.errors import ConfigError
from chaos_mpi.monitor.cluster import Timing

if TYPE_CHECKING:
    from chaos_mpi.agent.mesh import Mesh

log = logging.getLogger("chaos_mpi.agent")

#: A launcher that is gone fences nobody off, and need not be waited for.
FENCE_LIMIT_S = 0.2
#: A rank that has been told to stop is killed after so long, unless it says that it saves its state.
STOP_LIMIT_S = 15.0
#: How long the others are told that the rank has ended, at most.
ANNOUNCE_LIMIT_S = 0.3


@dataclass(frozen=True, slots=True)
class Settings:
    """How a job is watched; the same for all its ranks, but for the host and whether it is a newcomer.

    Attributes:
        host: of the rank, as ssh knows it; empty for the launch host.
        newcomer: whether the rank joins a job that runs already.
        timing: limits.
        network: interfaces or networks that the agents keep to; None: any.
        detours: whether cut links may be healed by routes over other hosts.
        witness: the member without a rank that the job begins with, if there is one.
    """

    host: str
    newcomer: bool
    timing: Timing
    network: str | None = None
    detours: bool = True
    witness: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return {
            "host": self.host, "newcomer": self.newcomer, "network": self.network, "limit_s": self.timing.limit_s,
            "heal_s": self.timing.heal_s, "give_up_s": self.timing.give_up_s, "even_split": self.timing.even_split,
            "detours": self.detours, "witness": self.witness,
        }  # fmt: skip

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Settings:
        """The reverse of :meth:`to_json`.

        Raises:
            ConfigError: a limit is wrong.
        """
        try:
            timing = Timing(
                limit_s=float(fields["limit_s"]), heal_s=float(fields["heal_s"]),
                give_up_s=float(fields["give_up_s"]), even_split=fields["even_split"],
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"the watch over the nodes cannot be set up: {error}") from error
        return cls(
            str(fields["host"]), bool(fields["newcomer"]), timing, fields["network"], bool(fields["detours"]),
            fields["witness"],
        )  # fmt: skip


class Guard:
    """Watches over the other nodes for one rank.

    Args:
        settings: how.
        directory: of the job on this host, for the rank's link; None where it has none.
        write: takes frames for the proxy.
        say: prints a line where the rank's output goes.
        kill: ends the rank.
    """

    def __init__(
        self,
        settings: Settings,
        directory: Path | None,
        write: Callable[[bytes], None],
        say: Callable[[str], None],
        kill: Callable[[], None],
    ) -> None:
        self._settings, self._write, self._say, self._kill = settings, write, say, kill
        self._link = LinkServer(
            self._may_go_on_without, directory, self._about_links, self._may_go_on_with, self._heed_traffic,
            self._heed_saving,
        )  # fmt: skip
        self._mesh: Mesh | None = None
        self._watch: Watch | None = None
        self._detouring: Detouring | None = None
        self._ordering: Ordering | None = None
        self._probing: Probing | None = None
        self._voice: Voice | None = None
        self._own: tuple[Interface, ...] = ()
        self._begun = self._alone = self._rank_over = False
        self._fenced: dict[str, asyncio.Event] = {}
        self._ended_joins: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._killing: asyncio.TimerHandle | None = None
        self._saving_s = 0.0

    async def open(self) -> dict[str, str]:
        """Get ready; returns the variables that the rank is to have.

        Raises:
            ConfigError: a library is missing, or this host is not in the network to use.
            EngineError: this agent cannot listen.
            OSError: the socket for the rank cannot be made.
        """
        try:
            self._own = select(own_interfaces(), self._settings.network)
            self._mesh = _mesh(self._own, self._receive)
            await self._link.listen()
        except BaseException:
            await self.close()
            raise
        return self._link.variables()

    def started(self, name: str) -> None:
        """The rank of this name runs: tell the proxy how this agent is reached."""
        assert self._mesh is not None
        mesh = self._mesh
        me = Contact(name, self._settings.host, mesh.addresses[:MOST_ADDRESSES], mesh.port, mesh.key)
        timing = self._settings.timing
        self._watch = Watch(me, mesh, timing, self._removed, self._stopped, self._link.crashed)
        self._detouring = Detouring(
            name, self._own, mesh, self._watch, timing, self._settings.detours, self._link.tell_links
        )
        self._ordering = Ordering(name, self._link, self._detouring, self._watch.addresses)
        self._spawn(self._ordering.run())
        self._probing = Probing(name, mesh, self._detouring)
        self._spawn(self._probing.run())
        self._voice = Voice(self._watch, timing, self._link.tell_witness)
        self._link.name(name)
        self._write(encode_json(Kind.CONTACT, me.to_json()))

    def heed(self, frame: Frame) -> None:
        """Take a ``CONTACTS`` or ``FENCED`` frame of the proxy.

        Raises:
            ChaosError: it cannot be understood.
        """
        if frame.kind is Kind.FENCED:
            self._fenced.setdefault(str(frame.json()), asyncio.Event()).set()
        elif self._watch is not None and self._detouring is not None and self._voice is not None:
            news = frame.json()
            contacts, first = [Contact.from_json(entry) for entry in news["contacts"]], news["first"]
            for join in news["ended"].keys() - self._ended_joins:
                self._ended_joins.add(join)
                self._link.join_ended(join, news["ended"][join])
            self._watch.disown(str(name) for name in news["disowned"])
            if self._begun:
                self._watch.know(contacts)
            elif self._settings.newcomer:
                self._watch.join(contacts)
                self._detouring.start(alone=False)
                self._spawn(self._voice.follow())
                self._begun = True
            elif first is not None:
                ranks = [str(name) for name in first]
                self._watch.begin(ranks, contacts, up=False, witness=self._settings.witness)
                self._spawn(self._tell_that_it_is_up(self._watch))
                self._detouring.start(alone=True)
                self._spawn(self._voice.follow())
                self._begun = True  # not before: where a connection could not be made, the next news begin
            else:
                self._watch.know(contacts)

    def launcher_lost(self) -> None:
        """Nobody can fence hosts off any more, and there is nothing left to fence them off from."""
        self._alone = True

    def rank_ended(self, crash: str = "") -> asyncio.Task[None]:
        """Tell the others at once; the task ends when they have confirmed it, or after a limit.

        Args:
            crash: how it crashed; empty if it did not.
        """
        self._rank_over = True
        if self._killing is not None:
            self._killing.cancel()
        return asyncio.get_running_loop().create_task(self._announce(crash))

    async def linger(self) -> None:
        """After :meth:`rank_ended`: help the others to agree on a view without this node."""
        if self._watch is not None and self._begun:
            await self._watch.linger(4 * self._settings.timing.limit_s)

    async def close(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        if self._detouring is not None:
            await self._detouring.close()
        if self._watch is not None:
            self._watch.close()
        self._link.close()
        if self._mesh is not None:
            await self._mesh.close()

    async def _announce(self, crash: str) -> None:
        if self._watch is not None:
            await self._watch.announce_end(ANNOUNCE_LIMIT_S, crash)

    # -- what the watch tells ------------------------------------------------------------------------------------

    def _receive(self, sender: str, message: dict[str, Any]) -> None:
        if self._detouring is not None and message.get("kind") in KINDS:
            self._detouring.receive(sender, message)
        elif self._probing is not None and message.get("kind") in probing.KINDS:
            self._probing.receive(sender, message)
        elif message.get("kind") == DISOWNED:
            self._disowned()
        elif self._watch is not None:
            self._watch.receive(sender, message)

    async def _may_go_on_without(self, members: list[str]) -> str:
        assert self._watch is not None  # it is there before the rank can ask
        return await self._watch.may_go_on_without(members)

    async def _may_go_on_with(self, members: list[str]) -> str:
        assert self._watch is not None  # as above
        return await self._watch.may_go_on_with(members)

    def _about_links(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._detouring is not None  # as above
        if "order" in request:
            one, other, down = request["order"]
            return {"reason": self._detouring.order(str(one), str(other), down=down is True)}
        return {"table": self._detouring.table(), "machines": self._detouring.machines()}

    def _heed_traffic(self, told: dict[str, Any]) -> None:
        assert self._ordering is not None  # as above
        self._ordering.receive(told)

    def _heed_saving(self, limit_s: float) -> None:
        """The rank saves its state for up to so many seconds, or it has done so (0)."""
        self._saving_s = limit_s
        if self._killing is not None:
            self._kill_later()

    def _kill_later(self) -> None:
        """Kill the rank if it has not ended by then."""
        if self._killing is not None:
            self._killing.cancel()
        if not self._rank_over:
            self._killing = asyncio.get_running_loop().call_later(max(STOP_LIMIT_S, self._saving_s), self._kill)

    def _removed(self, removal: Removal) -> None:
        self._spawn(self._cut_off(removal))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a part of the watch over the other hosts has ended: %r", error)

    async def _tell_that_it_is_up(self, watch: Watch) -> None:
        await self._link.connected.wait()
        watch.rank_is_up()

    async def _cut_off(self, removal: Removal) -> None:
        """Fence first: what the ranks of a lost host say, should they wake, is not to reach anybody."""
        answers = []
        for host in () if self._alone else removal.hosts:
            answers.append(self._fenced.setdefault(host, asyncio.Event()))
            answers[-1].clear()
            self._write(encode_json(Kind.FENCE, host))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FENCE_LIMIT_S):
                for answer in answers:
                    await answer.wait()
        self._link.sever(removal.addresses, removal.members)

    def _disowned(self) -> None:
        """The others wait for this rank to be out: at once, for it cannot take part any more."""
        if not self._rank_over:
            self._rank_over = True
            self._say(
                f"chaos_mpi: {self._settings.host or socket.gethostname()}: the connection with the launch host was "
                "lost, and to MPI this rank is dead; it ends, and the others train on"
            )
            self._kill()

    def _stopped(self, reason: str) -> None:
        self._kill_later()
        self._link.stop(reason)
        if self._watch is not None:  # it may be waiting for others, in MPI
            self._link.sever(self._watch.elsewhere, ())
        self._say(
            f"chaos_mpi: {self._settings.host or socket.gethostname()}: {reason}; this rank ends, and whoever has the "
            "majority trains on without it"
        )


def _mesh(addresses: Sequence[Interface], receive: Callable[[str, dict[str, Any]], None]) -> Mesh:
    """The network of the agents; a job that has none needs no ZeroMQ."""
    from chaos_mpi.agent.mesh import Mesh

    return Mesh(addresses, receive)
