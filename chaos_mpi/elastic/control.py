"""How a running job is told what to do: a control socket at each member, and SIGTERM.

The socket is in the job's private directory, which only its owner can enter, and has mode 0600. A client is told the
member's name first, so that it knows that somebody is there. It sends one JSON line, and gets JSON lines back until the
last one, which has ``"last": true``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from chaos_mpi.agent import sockets
from chaos_mpi.elastic import launching
from chaos_mpi.elastic.lifecycle import write_record
from chaos_mpi.elastic.sponsor import START_DIRECTORY
from chaos_mpi.elastic.status import MemberStatus
from chaos_mpi.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos_mpi.elastic.session import Session

log = logging.getLogger("chaos_mpi.elastic")

#: A rank that was told to leave by SIGTERM is ended if it has not left by then, seconds.
LEAVE_DEADLINE_S = 30.0
#: Held while a deadline is set: by the handler of SIGTERM in the main thread, or by a thread that talks with a client.
_deadlines = threading.Lock()
#: How long a member that ends waits for its last answers to be written, seconds.
_LAST_ANSWERS_S = 2.0
#: Longest request, bytes.
_REQUEST_BYTES = 65536
#: How often the step is looked at, so that its speed is known when somebody asks, seconds.
_LOOK_PERIOD_S = 1.0
#: How often the next request is tried to be taken when one could not be, seconds.
_SHORTAGE_PERIOD_S = 0.1
#: How long the agent has to take an order, seconds.
_AGENT_LIMIT_S = 5.0
#: Who follows hears something so often, and is given up when it takes nothing for so long, seconds.
_FOLLOW_PERIOD_S, _FOLLOW_LIMIT_S = 3.0, 1.0
#: What ends a conversation.
_FINAL = frozenset({"active", "left", "moved", "refused"})


class ControlSocket:
    """Answers ``chaosctl``, in a thread.

    Requests: ``{"do": "status"}``, answered by :meth:`chaos_mpi.elastic.status.MemberStatus.answer`; ``{"do":
    "follow"}``, answered by one ``{"event": {...}}`` for each event, up to the end of the session, and by ``{}`` now
    and then;
    ``{"do": "add", "n": 1, "host": ""}``; ``{"do": "remove", "member": id}``; ``{"do": "link", "a": host, "b": host,
    "down": true}``; ``{"do": "end", "signal": "SIGTERM", "limit_s": 10.0}``, after which the job stops: its launcher
    got this signal, and waits for so long; ``{"do": "relaunch"}``, what another launcher has to know to start the job
    anew; ``{"do": "hand_over", "name": "chaos-state-..."}``, for it to go on under that one; ``{"do": "state_kept",
    "problem": ""}``, to ranks that wait for what is handed over.

    Args:
        session: this member's part in the job.
        path: of the socket.
    """

    def __init__(self, session: Session, path: Path) -> None:
        self._session, self._path = session, path
        self._status = MemberStatus(session)
        self._answered: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._socket = sockets.listen(path)
        self._socket.settimeout(_LOOK_PERIOD_S)
        threading.Thread(target=self._serve, name="chaos_mpi-control", daemon=True).start()

    def close(self) -> None:
        """Take no more requests; what has become of those that were made is still said, and what has happened."""
        self._session.recent.end()
        limit = time.monotonic() + _LAST_ANSWERS_S
        with self._lock:
            answered = list(self._answered)
        for thread in answered:
            thread.join(max(0.0, limit - time.monotonic()))
        self._path.unlink(missing_ok=True)
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            # Descriptors, threads and memory may be short for a while: whoever asks now is not answered, others are.
            try:
                self._status.look()
                connection, _ = self._socket.accept()
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()
            except TimeoutError:
                continue
            except (OSError, RuntimeError) as error:
                if not self._closed.is_set():
                    log.debug("a request could not be taken: %s", error)
                self._closed.wait(_SHORTAGE_PERIOD_S)

    def _converse(self, connection: socket.socket) -> None:
        # An OSError says that the client is gone; what it asked for goes on.
        with contextlib.suppress(OSError), connection, connection.makefile("rwb") as stream:
            try:
                with contextlib.suppress(OSError):  # whoever tells this rank to end may not have waited for this
                    stream.write(json.dumps({"member": self._session.member}).encode() + b"\n")
                    stream.flush()
                request = json.loads(stream.readline(_REQUEST_BYTES))
                if request["do"] == "follow":
                    connection.settimeout(_FOLLOW_LIMIT_S)  # what it does not take would be kept for it
                for answer in self._answers(request):
                    stream.write(json.dumps(answer).encode() + b"\n")
                    stream.flush()
            except (ChaosError, ValueError, KeyError, TypeError) as error:
                stream.write(json.dumps({"error": str(error), "last": True}).encode() + b"\n")

    def _await(self, thread: threading.Thread) -> None:
        """A thread whose last answers have to be written before the member ends."""
        with self._lock:
            self._answered = [other for other in self._answered if other.is_alive()] + [thread]

    def _order_link(self, request: dict[str, Any]) -> str:
        agent = self._session.agent
        if agent is None:
            return "the job has no agents that could set routes: it was not started with --hosts"
        one, other, down = str(request["a"]), str(request["b"]), request["down"] is True
        return agent.order_link(one, other, down=down, limit_s=_AGENT_LIMIT_S)

    def _answers(self, request: dict[str, Any]) -> Any:
        session, told = self._session, queue.SimpleQueue[dict[str, Any]]()
        thread = threading.current_thread()

        def answer(what: str, fields: dict[str, Any]) -> None:
            if what in _FINAL:
                self._await(thread)
            told.put({"what": what, **fields, "last": what in _FINAL})

        if request["do"] == "status":
            yield {**self._status.answer(), "last": True}
            return
        if request["do"] == "follow":
            self._await(thread)
            for line in session.recent.follow(_FOLLOW_PERIOD_S):
                yield {"event": json.loads(line)} if line else {}
            yield {"last": True}
            return
        if request["do"] == "relaunch":
            facts = launching.facts(os.environ, launching.arguments(), START_DIRECTORY)
            where = {"members": list(session.members), "host": session.host}
            yield {**where, **facts, "has_state": session.has_state, "last": True}
            return
        if request["do"] == "state_kept":
            session.state_kept(str(request["problem"]))
            yield {"last": True}
            return
        if request["do"] == "link":
            yield {"reason": self._order_link(request), "last": True}
            return
        if request["do"] == "end":
            # Who asks for it does not wait for an answer.
            stop_soon(session, str(request["signal"]), float(request["limit_s"]))
            return
        if request["do"] == "add":
            session.request_join(1, str(request.get("host", "")), answer)
        elif request["do"] == "remove":
            session.request_leave(str(request["member"]), answer)
        elif request["do"] == "hand_over":
            session.request_move(str(request["name"]), answer)
        else:
            raise ValueError(f"there is no request {request['do']!r}")
        while True:
            message = told.get()
            yield message
            if message["last"]:
                return


def open_control(session: Session, run_dir: Path | None) -> ControlSocket | None:
    """The control socket of this member, if the job has a private directory to put it in."""
    if run_dir is None:
        return None
    try:
        return ControlSocket(session, run_dir / f"control-{os.getpid()}.sock")
    except OSError as error:
        log.warning("there is no control socket, so chaosctl cannot reach %s: %s", session.member, error)
        return None


def leave_on_sigterm(session: Session) -> None:
    """Let SIGTERM mean :func:`end_soon`.

    Only where the script has not set a handler of its own, and only in the main thread.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        _leave(session, number, frame)

    signal.signal(signal.SIGTERM, on_sigterm)
    _keep_from_children(on_sigterm)


def _keep_from_children(handler: Callable[[int, FrameType | None], None]) -> None:
    """Have SIGTERM end the processes that this one forks, as if ``handler`` had not been set for it.

    A handler in Python does not run while a process waits for a lock, as the workers of a pool do: who ends them by
    SIGTERM, and waits for their end, would wait for ever. And Python drops what comes before a child is set up, so
    until then the signal waits.
    """
    forking = threading.local()

    def before() -> None:
        forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # alone, as handlers may raise between the two
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    def after_in_child() -> None:
        if signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


def _leave(session: Session, number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    if not session.ends_well:
        os.kill(os.getpid(), number)  # there is nothing to leave any more
        return
    end_soon(session, signal.Signals(number).name)


def end_soon(session: Session, name: str) -> None:
    """This rank is to end: it leaves after the present step, or the job stops then if too few would be left.

    If neither has happened after :data:`LEAVE_DEADLINE_S`, the rank is ended. Once is enough.

    Args:
        session: this member's part in the job.
        name: of the signal that said so.
    """
    if not _has_to_end(session, name, LEAVE_DEADLINE_S):
        return

    def answer(what: str, fields: dict[str, Any]) -> None:
        if what == "refused":
            session.stop_reason = fields["reason"]

    # In a thread, because a signal handler may have interrupted whoever holds the lock of the inbox.
    threading.Thread(target=session.request_leave, args=(None, answer), daemon=True).start()


def stop_soon(session: Session, name: str, limit_s: float) -> None:
    """All ranks are to end: the job stops after the present step, also where a rank has asked to leave before.

    Args:
        session: this member's part in the job.
        name: of the signal that said so.
        limit_s: whoever said so waits for so long; this rank ends itself then, or after :data:`LEAVE_DEADLINE_S`.
    """
    _has_to_end(session, name, max(limit_s, LEAVE_DEADLINE_S))
    session.request_stop(name)


def _has_to_end(session: Session, name: str, limit_s: float) -> bool:
    """From now on this rank has so long, or longer if it is told so later; whether it had not been told before."""
    with _deadlines:
        first = not session.told_to_end
        if not first and (limit_s <= LEAVE_DEADLINE_S or session.deadline is None):
            return False
        if first:
            session.told_by, session.told_to_end = name, True
        elif session.deadline is not None:
            session.deadline.cancel()
        timer = session.deadline = threading.Timer(limit_s, _end_now, (session,))
        timer.daemon = True
        timer.start()
    return first


def _end_now(session: Session) -> None:
    """It is noted down first, for this is no crash."""
    if not session.ends_well:
        return  # it has come to its end in another way
    record = {"member": session.member, "outcome": "ended", "message": "it was told to end, and could not leave"}
    write_record(session.settings.run_dir, "outcome", record)
    os.kill(os.getpid(), signal.SIGKILL)
