"""Messages between the agents of a job: authenticated, encrypted, and lost when they cannot go out at once.

Each agent makes a CURVE key pair (CurveZMQ, ZeroMQ RFC 26) in memory, listens at its own addresses, and takes
connections of the public keys that it was told of. Who has sent a message is told from the key of its connection, never
from what is in it. Each direction between two agents is a connection of its own, made by the sender. Whoever uses
this repeats what matters: a message to an agent that cannot be reached, or does not read, is dropped.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from chaos_mpi.agent import tasks
from chaos_mpi.agent.contacts import Contact, Interface, nearest
from chaos_mpi.errors import ConfigError, EngineError

try:
    import zmq
    import zmq.asyncio
    from zmq.utils import z85
except ImportError as missing:
    raise ConfigError(
        "node agents talk over ZeroMQ, and pyzmq is not installed on this host: pip install pyzmq"
    ) from missing

log = logging.getLogger("chaos_mpi.agent")

#: When an agent ends, how long what it has said to a peer that takes nothing is kept for it.
_LAST_WORDS_MS = 100

#: Larger messages are not sent, and who sends one is disconnected.
MAX_MESSAGE_BYTES = 1 << 18
#: Messages that wait for one peer, at most, here and there; more are dropped.
_WAITING = 64
#: What the kernel may hold of a connection: a peer that was stopped is to find little that is old when it wakes.
_KERNEL_BYTES = 1 << 16
#: A handshake that takes longer is begun again; so is one with a peer that does not know this agent yet.
_HANDSHAKE_MS = 1000
#: A connection of which nothing is acknowledged for so long is made anew. TCP alone would wait longer and longer
#: between attempts, so that a link that was down for a minute would be of use again another minute later.
_UNACKNOWLEDGED_MS = 1500
_CONNECT_MS = 1000
_RECONNECT_MS, _RECONNECT_MAX_MS = 50, 1000
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 10, 5, 3
#: Attempts to find a port that is free at all addresses.
_PORT_ATTEMPTS = 20
#: After so many messages in a row others get a turn.
_BATCH = 64

Receive = Callable[[str, dict[str, Any]], None]


class Mesh:
    """One agent's end of all connections with the others. To be made and used in a running event loop.

    Args:
        addresses: of this machine, to listen at, with their networks.
        receive: is called with the member that sent a message, and the message.

    Attributes:
        key: the public key.
        port: where this agent listens.

    Raises:
        EngineError: it cannot listen.
    """

    def __init__(self, addresses: Sequence[Interface], receive: Receive) -> None:
        self._own, self._receive = tuple(addresses), receive
        self._contacts: dict[str, Contact] = {}
        self._members: dict[str, str] = {}  # by key
        self._senders: dict[str, zmq.Socket[bytes]] = {}
        self._complained: set[str] = set()
        public, self._secret = zmq.curve_keypair()
        self.key = public.decode()
        self._context = zmq.asyncio.Context()
        try:
            self._gate = self._context.socket(zmq.REP)
            self._gate.bind("inproc://zeromq.zap.01")
            self._inbox, self.port = self._listen()
        except (zmq.ZMQError, EngineError):
            self._context.destroy(linger=0)
            raise
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._admit()), loop.create_task(self._read())]
        for task in self._tasks:
            task.add_done_callback(_report)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this agent listens."""
        return tuple(str(address.ip) for address in self._own)

    def know(self, contact: Contact) -> None:
        """Take messages of this peer from now on, and connect with it.

        Raises:
            zmq.ZMQError: there can be no more connections; the peer stays unknown.
        """
        if self._contacts.get(contact.member) == contact or contact.key == self.key:
            return
        self.forget(contact.member)
        if contact.key in self._members:
            self._complain(contact.member, f"{contact.member} has the key of {self._members[contact.key]}: ignored")
            return
        sender = self._connect(contact, self._address(contact))
        self._contacts[contact.member] = contact
        self._members[contact.key] = contact.member
        self._senders[contact.member] = sender

    def forget(self, member: str, linger_ms: int = 0) -> None:
        """Send nothing to this peer and take nothing from it.

        Args:
            member: its name.
            linger_ms: how long what was said last may take to be sent.
        """
        contact = self._contacts.pop(member, None)
        if contact is not None:
            del self._members[contact.key]
            self._senders.pop(member).close(linger=linger_ms)

    def reconnect(self, member: str) -> None:
        """Connect with this peer anew; what has not been sent to it yet is dropped."""
        contact = self._contacts.get(member)
        if contact is not None:
            sender = self._connect(contact, self._address(contact))
            self._senders.pop(member).close(linger=0)
            self._senders[member] = sender

    def send(self, member: str, message: dict[str, Any]) -> bool:
        """Send; does not wait.

        Returns:
            Whether it is on its way; False where the peer is not known, not connected, or does not keep up.
        """
        sender = self._senders.get(member)
        if sender is None:
            return False
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            self._complain(member, f"a message of {len(data)} bytes to {member} is too long ({MAX_MESSAGE_BYTES})")
            return False
        try:
            sender.send(data, zmq.DONTWAIT)
        except zmq.ZMQError:  # Again: not connected, or full
            return False
        return True

    async def close(self) -> None:
        """End all connections; what was said last has a moment to be sent."""
        await tasks.cancel(self._tasks)
        for member in list(self._contacts):
            self.forget(member, linger_ms=_LAST_WORDS_MS)
        self._context.destroy(linger=_LAST_WORDS_MS)

    # -- connections ---------------------------------------------------------------------------------------------

    def _listen(self) -> tuple[zmq.asyncio.Socket, int]:
        """A socket that is bound at the same port of all addresses."""
        problem: zmq.ZMQError | None = None
        for _ in range(_PORT_ATTEMPTS):
            inbox = self._context.socket(zmq.PULL)
            _limit(inbox)
            inbox.setsockopt(zmq.IPV6, int(any(address.version == 6 for address in self._own)))
            inbox.setsockopt(zmq.CURVE_SERVER, 1)
            inbox.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
            inbox.setsockopt(zmq.ZAP_DOMAIN, b"chaos_mpi")
            try:
                return inbox, _bind(inbox, self.addresses)
            except zmq.ZMQError as error:
                inbox.close(linger=0)
                problem = error
                if error.errno != zmq.EADDRINUSE:
                    break
        raise EngineError(
            f"the node agent cannot listen at {', '.join(self.addresses) or 'no address'}: {problem}; "
            "--network names the interfaces or networks to use"
        )

    def _address(self, contact: Contact) -> str:
        same_machine = set(contact.addresses) == set(self.addresses)
        return nearest(contact.addresses, self._own, same_machine)

    def _connect(self, contact: Contact, address: str) -> zmq.Socket[bytes]:
        public = self.key.encode()
        sender: zmq.Socket[bytes] = zmq.Socket(self._context, zmq.PUSH)
        _limit(sender)
        sender.setsockopt(zmq.IPV6, int(ipaddress.ip_address(address).version == 6))
        sender.setsockopt(zmq.IMMEDIATE, 1)  # nothing is kept for a peer that cannot be reached
        sender.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        sender.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        sender.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        sender.setsockopt(zmq.CURVE_SERVERKEY, contact.key.encode())
        sender.setsockopt(zmq.CURVE_PUBLICKEY, public)
        sender.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        sender.connect(_endpoint(address, contact.port))
        return sender

    async def _admit(self) -> None:
        """Answer whether a key may connect (ZAP, ZeroMQ RFC 27).

        A key that is not known may be in a moment. So the answer is "not now" (300), and the peer tries again; after a
        definite no (400) it never would.
        """
        while True:
            _, request, _, _, _, mechanism, *credentials = await self._gate.recv_multipart()
            key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
            known = key in self._members
            verdict = [b"200", b"OK", key.encode()] if known else [b"300", b"this key is not known", b""]
            await self._gate.send_multipart([b"1.0", request, *verdict, b""])

    async def _read(self) -> None:
        count = 0
        while True:
            frames = await self._inbox.recv_multipart(copy=False)
            self._deliver(frames)
            count += 1
            if count % _BATCH == 0:
                await asyncio.sleep(0)

    def _deliver(self, frames: Sequence[zmq.Frame]) -> None:
        # A peer that was forgotten may still be connected.
        member = self._members.get(str(frames[0].get("User-Id")))
        if member is None:
            return
        try:
            message = json.loads(frames[0].bytes)
            if len(frames) != 1 or not isinstance(message, dict):
                raise ValueError("it is not one JSON object")
            self._receive(member, message)
        except (ValueError, OverflowError, RecursionError, zmq.ZMQError) as error:
            self._complain(member, f"a message of {member} is ignored: {error}")

    def _complain(self, member: str, text: str) -> None:
        if member not in self._complained:
            self._complained.add(member)
            log.warning("%s", text)


def _limit(sender: zmq.Socket[Any]) -> None:
    """Bound what a connection may hold, and how long it may be silent."""
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, _WAITING),
        (zmq.RCVHWM, _WAITING),
        (zmq.SNDBUF, _KERNEL_BYTES),
        (zmq.RCVBUF, _KERNEL_BYTES),
        (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
        (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
        (zmq.TCP_MAXRT, _UNACKNOWLEDGED_MS),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S),
        (zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_INTERVAL_S),
        (zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_PROBES),
    ):
        sender.setsockopt(option, value)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the node agent hears the others no more: %r", error)


def _bind(inbox: zmq.asyncio.Socket, addresses: Sequence[str]) -> int:
    """Listen at the same port of all addresses, which is one that is free.

    An address that cannot be had just now (EADDRNOTAVAIL: IPv6 is still looking for duplicates) is left out, unless
    none is left.
    """
    port = 0
    problem: zmq.ZMQError | None = None
    for address in addresses:
        try:
            inbox.bind(_endpoint(address, port or "*"))
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRNOTAVAIL:
                raise
            problem = error
            continue
        if not port:
            port = int(inbox.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    if not port:
        raise problem or zmq.ZMQError(zmq.EADDRNOTAVAIL)
    return port


def _endpoint(address: str, port: int | str) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
