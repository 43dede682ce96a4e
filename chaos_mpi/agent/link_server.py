"""The agent's side of its connection with the rank; what is said is in :mod:`chaos_mpi.agent.link`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from chaos_mpi.agent import sockets
from chaos_mpi.agent.crashes import Crash
from chaos_mpi.agent.link import VARIABLE
from chaos_mpi.monitor.hostlinks import LinkStatus
from chaos_mpi.monitor.hostlinks import to_json as links_to_json

log = logging.getLogger("chaos_mpi.agent")

#: Longest line, bytes.
_LINE_BYTES = 1 << 20
#: What a rank that does not read may leave unread; it is disconnected then.
_UNREAD_BYTES = 1 << 20


class LinkServer:
    """The agent's side.

    Args:
        may_go_on_without: answers a rank's question; see :meth:`chaos_mpi.agent.watch.Watch.may_go_on_without`.
        directory: for the socket, private; None: one that is made for it.
        about_links: answers a request about links.
        may_go_on_with: as the first; see :meth:`chaos_mpi.agent.watch.Watch.may_go_on_with`.
        on_traffic: takes the answers to :meth:`ask_traffic`.
        on_saving: is called with the seconds for which the rank wants to save its state, and with 0 when it has.

    Attributes:
        path: of the socket.
        connected: set once the rank has connected.

    Raises:
        OSError: the socket cannot be made.
    """

    def __init__(
        self,
        may_go_on_without: Callable[[list[str]], Awaitable[str]],
        directory: Path | None = None,
        about_links: Callable[[dict[str, Any]], dict[str, Any]] = lambda request: {},
        may_go_on_with: Callable[[list[str]], Awaitable[str]] | None = None,
        on_traffic: Callable[[dict[str, Any]], None] = lambda told: None,
        on_saving: Callable[[float], None] = lambda limit_s: None,
    ) -> None:
        self._on_traffic, self._on_saving = on_traffic, on_saving
        self._questions = {"may_go_on_without": may_go_on_without}
        if may_go_on_with is not None:
            self._questions["may_go_on_with"] = may_go_on_with
        self._about_links = about_links
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._stop: str | None = None
        self._links: dict[tuple[str, str], LinkStatus] = {}
        self._witness: dict[str, str] | None = None
        self.connected = asyncio.Event()
        self._member: asyncio.Future[str] | None = None
        self._own_directory = Path(tempfile.mkdtemp(prefix="chaos_mpi-")) if directory is None else None  # mode 0700
        self.path = (self._own_directory or directory or Path()) / f"agent-{os.getpid()}.sock"

    async def listen(self) -> None:
        """Begin to take connections."""
        self._member = asyncio.get_running_loop().create_future()
        self._server = await asyncio.start_unix_server(
            self._converse, sock=sockets.listen(self.path), limit=_LINE_BYTES
        )

    def variables(self) -> dict[str, str]:
        """What the rank is to have in its environment."""
        return {VARIABLE: str(self.path)}

    def name(self, member: str) -> None:
        """The rank has this name; connections are served from here on."""
        assert self._member is not None
        self._member.set_result(member)

    def sever(self, addresses: Iterable[str], members: Iterable[str]) -> None:
        """Tell the rank that the machines with these addresses, and so these members, are given up."""
        self._tell_all({"sever": list(addresses), "members": list(members)})

    def crashed(self, crash: Crash) -> None:
        """Tell the rank that another one has crashed."""
        self._tell_all({"crashed": crash.member, "host": crash.host, "how": crash.how})

    def join_ended(self, join: str, how: str) -> None:
        """Tell the rank that the process that was started for a join has ended."""
        self._tell_all({"join_ended": join, "how": how})

    def tell_links(self, links: Iterable[LinkStatus]) -> None:
        """Tell the rank, also one that connects later, that these links are otherwise than before."""
        for link in links:
            self._links[link.ends] = link
        self._tell_all({"links": links_to_json(links)})

    def tell_witness(self, fields: dict[str, str]) -> None:
        """Tell the rank, also one that connects later, how the witness fares."""
        self._witness = fields
        self._tell_all({"witness": fields})

    def ask_traffic(self) -> None:
        """Ask the rank how much it has sent where."""
        self._tell_all({"traffic": True})

    def arrange(self, order: Iterable[str]) -> None:
        """Tell the rank of an order in which the members would do better."""
        self._tell_all({"arrange": list(order)})

    def stop(self, reason: str) -> None:
        """Tell the rank, also one that connects later, that it must not go on."""
        self._stop = reason
        self._tell_all({"stop": reason})

    def close(self) -> None:
        """End all connections and remove the socket."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        self.path.unlink(missing_ok=True)
        if self._own_directory is not None:
            shutil.rmtree(self._own_directory, ignore_errors=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._member is not None
        _tell(writer, {"member": await self._member})
        self.connected.set()
        self._writers.add(writer)
        if self._links:
            _tell(writer, {"links": links_to_json(self._links.values())})
        if self._witness is not None:
            _tell(writer, {"witness": self._witness})
        if self._stop is not None:
            _tell(writer, {"stop": self._stop})
        try:
            while line := await reader.readline():
                self._heed(json.loads(line), writer)
        except OSError:
            pass  # the rank has ended
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the connection with the rank is ended: %s", error)
        finally:
            self._writers.discard(writer)
            writer.close()

    def _heed(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if "traffic" in request:
            self._on_traffic(request["traffic"])
            return
        if "saving" in request:
            self._on_saving(float(request["saving"]))
            return
        if "links" in request:
            _tell(writer, {"id": request["id"], **self._about_links(request)})
            return
        (question,) = request.keys() - {"id"}
        members, number = [str(name) for name in request[question]], int(request["id"])
        answer = self._questions[question](members)
        task = asyncio.get_running_loop().create_task(self._answer(answer, number, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, answer: Awaitable[str], number: int, writer: asyncio.StreamWriter) -> None:
        _tell(writer, {"id": number, "reason": await answer})

    def _tell_all(self, message: dict[str, Any]) -> None:
        for writer in self._writers:
            _tell(writer, message)


def _tell(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    if writer.is_closing():
        return
    if writer.transport.get_write_buffer_size() > _UNREAD_BYTES:
        writer.transport.abort()
        return
    writer.write(json.dumps(message).encode() + b"\n")
