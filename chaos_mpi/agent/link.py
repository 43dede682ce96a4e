"""The connection between a rank and the agent beside it: a UNIX socket, and a JSON object on each line.

The agent begins with ``{"member": name}``, by which the other agents know this rank, and says
``{"sever": [addresses], "members": [names]}``, ``{"crashed": name, "host": where, "how": text}`` of another rank,
``{"links": [{"a": host, "b": host, "state": s, "via": host, "no_detour": why}]}`` of links that have changed,
``{"witness": {"witness": name, "host": host, "state": s}}`` of the agent without a rank, ``{"join_ended": which,
"how": text}`` of a newcomer's process that has ended, ``{"stop": reason}``, and ``{"arrange": [names]}``, an order in
which the members would do better. It asks ``{"traffic": true}``, and the rank says ``{"traffic": {...}}``, see
:mod:`chaos_mpi.agent.ordering`. The rank says ``{"saving": seconds}`` while it saves its state before it ends. It asks
``{"may_go_on_without": [names], "id": n}`` and gets ``{"id": n, "reason": ""}``, where an empty reason is a yes;
``{"may_go_on_with": [names], "id": n}``, and gets the same; ``{"links": true, "id": n}``, and gets
``{"id": n, "table": [...], "machines": {...}}``; and ``{"links": true, "order": [host, host, down], "id": n}``, and
gets a reason why not, or an empty one. Here is the rank's side; the agent's is :mod:`chaos_mpi.agent.link_server`.
Without torch and without MPI.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from chaos_mpi.agent import sockets
from chaos_mpi.agent.crashes import Crash

log = logging.getLogger("chaos_mpi.agent")

#: Tells a rank where its agent listens.
VARIABLE = "CHAOS_AGENT_SOCKET"
#: How long a rank waits for its agent to take the connection.
CONNECT_LIMIT_S = 10.0
#: The agent is beside the rank, and says at once what it knows of hosts; or never, because it is stopped.
ABOUT_HOSTS_LIMIT_S = 0.3


class AgentLink:
    """The rank's side; its callbacks are called from its thread.

    Args:
        connection: to the agent.
        on_sever: is called with the addresses of machines that are given up.
        on_stop: is called with the reason, when the rank must not go on.

    Attributes:
        member: the name by which the agents know this rank.
        witness: the last news of the witness, see :mod:`chaos_mpi.agent.voice`; None: there was none.
        given_up: members that were given up with their machines.

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
        self._on_join_ended: Callable[[str, str], object] = lambda join, how: None
        self._on_arrange: Callable[[tuple[str, ...]], object] = lambda order: None
        self._traffic: Callable[[], dict[str, Any]] | None = None
        self._on_links: Callable[[list[dict[str, str]]], object] | None = None
        self._links: dict[tuple[str, str], dict[str, str]] = {}
        self._on_witness: Callable[[dict[str, str]], object] = lambda fields: None
        self.witness: dict[str, str] | None = None
        self.given_up: set[str] = set()
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

    def may_go_on_with(self, members: Iterable[str], limit_s: float) -> str:
        """As :meth:`may_go_on_without`, by those that are left; for a rank that has not learned the others' names.

        Args:
            members: that are alive, this rank among them.
            limit_s: how long to wait, in seconds.
        """
        wanted = sorted(members)
        what = f"whether all but {', '.join(wanted)} are out"
        return str(self._ask({"may_go_on_with": wanted}, what, limit_s)["reason"])

    def about_hosts(self) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """All links between the hosts of the job, and these hosts by name; empty where the agent does not say.

        Returns:
            See :meth:`chaos_mpi.monitor.linktable.LinkTable.rows`, and :meth:`chaos_mpi.agent.machine.Machine.look`.
        """
        answer = self._ask({"links": True}, "which links there are", ABOUT_HOSTS_LIMIT_S)
        return answer.get("table", []), answer.get("machines", {})

    def order_link(self, one: str, other: str, *, down: bool, limit_s: float) -> str:
        """Have the link between two hosts not be used any more, or used again.

        Returns:
            Why that cannot be; empty if it is done.
        """
        what = f"what becomes of the link between {one} and {other}"
        return str(self._ask({"links": True, "order": [one, other, down]}, what, limit_s)["reason"])

    def saving(self, limit_s: float) -> None:
        """Tell the agent that this rank saves its state, and should not be killed before that is done.

        Args:
            limit_s: how long that may take, in seconds; 0: it is done.
        """
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps({"saving": limit_s}).encode() + b"\n")

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
        """The links between hosts that there was news of, as :func:`links_to_json` has them."""
        with self._lock:
            return list(self._links.values())

    def follow_links(self, on_links: Callable[[list[dict[str, str]]], object]) -> None:
        """Have news of links told, from another thread, and first those that there was already."""
        with self._lock:
            self._on_links, known = on_links, list(self._links.values())
        if known:
            on_links(known)

    def follow_witness(self, on_witness: Callable[[dict[str, str]], object]) -> None:
        """Have news of the witness told, from another thread, and first the last there was already."""
        with self._lock:
            self._on_witness, known = on_witness, self.witness
        if known is not None:
            on_witness(known)

    def follow_crashes(self, on_crash: Callable[[Crash], object]) -> None:
        """Have the crashes of other ranks told from now on, from another thread."""
        self._on_crash = on_crash

    def follow_joins(self, on_ended: Callable[[str, str], object]) -> None:
        """Have it told from now on, from another thread, which joins' processes have ended, and how."""
        self._on_join_ended = on_ended

    def follow_order(
        self, traffic: Callable[[], dict[str, Any]], on_arrange: Callable[[tuple[str, ...]], object]
    ) -> None:
        """Answer the agent's questions from now on, from another thread, and have its wishes told.

        Args:
            traffic: the answer, see :mod:`chaos_mpi.agent.ordering`.
            on_arrange: is called with an order in which the members would do better.
        """
        self._traffic, self._on_arrange = traffic, on_arrange

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._stream:
            while line := self._stream.readline():
                message = json.loads(line)
                try:
                    self._heed(message)
                except Exception:  # what comes next may be that a host is lost
                    log.exception("a message of this node's agent could not be heeded: %s", message)
        self._end("the agent of this node is gone")
        self._connection.close()

    def _heed(self, message: dict[str, Any]) -> None:
        if "sever" in message:
            log.info("%s given up; closing connections to %s", message.get("members"), message["sever"])
            if message["sever"]:
                self.given_up.update(message["members"])
            self._on_sever(message["sever"])
        elif "crashed" in message:
            self._on_crash(Crash(str(message["crashed"]), str(message["host"]), str(message["how"])))
        elif "join_ended" in message:
            self._on_join_ended(str(message["join_ended"]), str(message["how"]))
        elif "links" in message:
            self._heed_links(message["links"])
        elif "traffic" in message and self._traffic is not None:
            told = {"traffic": self._traffic()}
            with self._lock, contextlib.suppress(OSError):
                self._connection.sendall(json.dumps(told).encode() + b"\n")
        elif "arrange" in message:
            self._on_arrange(tuple(str(name) for name in message["arrange"]))
        elif "witness" in message:
            with self._lock:
                self.witness, tell = message["witness"], self._on_witness
            tell(message["witness"])
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
