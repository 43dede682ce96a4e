"""The connection between a rank and the agent beside it: a UNIX socket, and a JSON object on each line.

The agent begins with ``{"member": name}``, by which the other agents know this rank, and says
``{"sever": [addresses], "members": [names]}``, ``{"crashed": name, "host": where, "how": text}`` of another rank,
``{"links": [{"a": host, "b": host, "state": s, "via": host}]}`` of links that have changed, and ``{"stop": reason}``.
The rank asks
``{"may_go_on_without": [names], "id": n}`` and gets ``{"id": n, "reason": ""}``, where an empty reason is a yes;
``{"links": true, "id": n}``, and gets ``{"id": n, "table": [...]}``; and ``{"links": true, "order": [host, host, down],
"id": n}``, and gets a reason why not, or an empty one.
Without torch and without MPI.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from chaos_mpi.agent import sockets
from chaos_mpi.agent.crashes import Crash
from chaos_mpi.monitor.hostlinks import LinkStatus
from chaos_mpi.monitor.hostlinks import to_json as links_to_json

log = logging.getLogger("chaos_mpi.agent")

#: Tells a rank where its agent listens.
VARIABLE = "CHAOS_AGENT_SOCKET"
#: How long a rank waits for its agent to take the connection.
CONNECT_LIMIT_S = 10.0
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
    ) -> None:
        self._ask, self._about_links = may_go_on_without, about_links
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._stop: str | None = None
        self._links: dict[tuple[str, str], LinkStatus] = {}
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

    def tell_links(self, links: Iterable[LinkStatus]) -> None:
        """Tell the rank, also one that connects later, that these links are otherwise than before."""
        for link in links:
            self._links[link.ends] = link
        self._tell_all({"links": links_to_json(links)})

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
        if "links" in request:
            _tell(writer, {"id": request["id"], **self._about_links(request)})
            return
        members, number = [str(name) for name in request["may_go_on_without"]], int(request["id"])
        task = asyncio.get_running_loop().create_task(self._answer(members, number, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, members: list[str], number: int, writer: asyncio.StreamWriter) -> None:
        _tell(writer, {"id": number, "reason": await self._ask(members)})

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


class AgentLink:
    """The rank's side; its callbacks are called from its thread.

    Args:
        connection: to the agent.
        on_sever: is called with the addresses of machines that are given up.
        on_stop: is called with the reason, when the rank must not go on.

    Attributes:
        member: the name by which the agents know this rank.

    Raises:
        OSError: the agent does not speak.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_sever: Callable[[Collection[str]], object],
        on_stop: Callable[[str], object],
    ) -> None:
        self._connection, self._on_sever, self._on_stop = connection, on_sever, on_stop
        self._on_crash: Callable[[Crash], object] = lambda crash: None
        self._on_links: Callable[[list[dict[str, str]]], object] | None = None
        self._links: dict[tuple[str, str], dict[str, str]] = {}
        self._stream = connection.makefile("rb")
        first = self._stream.readline()
        if not first:
            raise ConnectionError("the agent of this node has closed the connection")
        self.member = str(json.loads(first)["member"])
        connection.settimeout(None)
        self._lock = threading.Lock()
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._asked = 0
        self._over = ""
        threading.Thread(target=self._listen, name="chaos_mpi-agent-link", daemon=True).start()

    @classmethod
    def open(
        cls,
        environ: Mapping[str, str],
        on_sever: Callable[[Collection[str]], object],
        on_stop: Callable[[str], object],
    ) -> Self | None:
        """Connect with the agent of this rank.

        Args:
            environ: of the rank.
            on_sever: see the class.
            on_stop: see the class.

        Returns:
            None when there is none.

        Raises:
            OSError: there should be one, but it cannot be reached.
        """
        path = environ.get(VARIABLE)
        return cls(sockets.connect(Path(path), CONNECT_LIMIT_S), on_sever, on_stop) if path else None

    def may_go_on_without(self, members: Iterable[str], limit_s: float) -> str:
        """Wait until the agents have agreed that these members are out, and that this rank may go on.

        Args:
            members: that are dead as far as is known.
            limit_s: how long to wait, in seconds.

        Returns:
            Empty when so, else why not.
        """
        wanted = sorted(members)
        what = f"whether {', '.join(wanted)} are out"
        return str(self._ask({"may_go_on_without": wanted}, what, limit_s)["reason"])

    def link_table(self, limit_s: float) -> list[dict[str, Any]]:
        """All links between the hosts of the job; empty where the agent does not say.

        Returns:
            See :meth:`chaos_mpi.monitor.linktable.LinkTable.rows`.
        """
        table: list[dict[str, Any]] = self._ask({"links": True}, "which links there are", limit_s).get("table", [])
        return table

    def order_link(self, one: str, other: str, *, down: bool, limit_s: float) -> str:
        """Have the link between two hosts not be used any more, or used again.

        Returns:
            Why that cannot be; empty if it is done.
        """
        what = f"what becomes of the link between {one} and {other}"
        return str(self._ask({"links": True, "order": [one, other, down]}, what, limit_s)["reason"])

    def _ask(self, request: dict[str, Any], what: str, limit_s: float) -> dict[str, Any]:
        """The answer; where there is none, one with the reason for that."""
        answer = queue.SimpleQueue[dict[str, Any]]()
        with self._lock:
            if self._over:
                return {"reason": self._over}
            self._asked += 1
            number = self._asked
            self._answers[number] = answer
            # A broken connection is seen by the thread, which answers then.
            with contextlib.suppress(OSError):
                self._connection.sendall(json.dumps({**request, "id": number}).encode() + b"\n")
        try:
            return answer.get(timeout=limit_s)
        except queue.Empty:
            return {"reason": f"the agent of this node did not say within {limit_s:g} s {what}"}
        finally:
            with self._lock:
                self._answers.pop(number, None)

    @property
    def links(self) -> list[dict[str, str]]:
        """The links between hosts that there was news of: ``a``, ``b``, ``state`` and ``via``."""
        with self._lock:
            return list(self._links.values())

    def follow_links(self, on_links: Callable[[list[dict[str, str]]], object]) -> None:
        """Have news of links told, from another thread, and first those that there was already."""
        with self._lock:
            self._on_links, known = on_links, list(self._links.values())
        if known:
            on_links(known)

    def follow_crashes(self, on_crash: Callable[[Crash], object]) -> None:
        """Have the crashes of other ranks told from now on, from another thread."""
        self._on_crash = on_crash

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._stream:
            while line := self._stream.readline():
                self._heed(json.loads(line))
        self._end("the agent of this node is gone")
        self._connection.close()

    def _heed(self, message: dict[str, Any]) -> None:
        if "sever" in message:
            log.info("%s given up; closing connections to %s", message.get("members"), message["sever"])
            self._on_sever(message["sever"])
        elif "crashed" in message:
            self._on_crash(Crash(str(message["crashed"]), str(message["host"]), str(message["how"])))
        elif "links" in message:
            self._heed_links(message["links"])
        elif "stop" in message:
            self._end(str(message["stop"]))
            self._on_stop(str(message["stop"]))
        elif "id" in message:
            with self._lock:
                answer = self._answers.get(int(message["id"]))
            if answer is not None:
                answer.put(message)

    def _heed_links(self, links: list[dict[str, str]]) -> None:
        with self._lock:
            self._links |= {(link["a"], link["b"]): link for link in links}
            follow = self._on_links
        if follow is not None:
            follow(links)

    def _end(self, reason: str) -> None:
        """No question is answered with a yes from here on."""
        with self._lock:
            self._over = self._over or reason
            for answer in self._answers.values():
                answer.put({"reason": self._over})


def is_watched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank with an agent beside it that watches the other nodes."""
    return bool(environ.get(VARIABLE))
