"""How the agents of a job reach each other: addresses, ports and public keys. Pure, but for :func:`own_interfaces`."""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import psutil

from chaos_mpi.errors import ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

#: The digits of Z85 (ZeroMQ RFC 32), in which five of them are four bytes.
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_MEMBER = re.compile(r"[^\s:]+:[0-9]{1,10}")
#: Longer names are no names.
_MOST_CHARACTERS = 255
#: More are not told.
MOST_ADDRESSES = 256


class Placed(NamedTuple):
    """An address of this machine, and the interface that has it."""

    interface: str
    address: Interface


@dataclass(frozen=True, slots=True)
class Contact:
    """How to reach the agent beside one rank, and how to know it.

    Attributes:
        member: its rank, ``host:pid``.
        host: the machine as ssh knows it; empty for the launch host.
        addresses: of the machine.
        port: where the agent listens.
        key: its public CURVE key, in Z85.
    """

    member: str
    host: str
    addresses: tuple[str, ...]
    port: int
    key: str

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return {
            "member": self.member, "host": self.host, "addresses": list(self.addresses), "port": self.port,
            "key": self.key,
        }  # fmt: skip

    @classmethod
    def from_json(cls, fields: Any) -> Self:
        """The reverse of :meth:`to_json`.

        Raises:
            ConfigError: it is no contact; says why.
        """
        if not isinstance(fields, Mapping):
            raise ConfigError(f"a contact is an object with fields, not {_short(fields)}")
        missing = {"member", "host", "addresses", "port", "key"} - set(fields)
        if missing:
            raise ConfigError(f"a contact lacks {', '.join(sorted(missing))}: {_short(dict(fields))}")
        member, host, port, key = fields["member"], fields["host"], fields["port"], fields["key"]
        if not isinstance(member, str) or len(member) > _MOST_CHARACTERS or not _MEMBER.fullmatch(member):
            raise ConfigError(f"{_short(member)} is not the name of a member, HOST:PID")
        if not isinstance(host, str) or len(host) > _MOST_CHARACTERS:
            raise ConfigError(f"{member}: {_short(host)} is not the name of a host")
        if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
            raise ConfigError(f"{member}: {_short(port)} is not a port; it is a number from 1 to 65535")
        if not isinstance(key, str) or not _is_key(key):
            raise ConfigError(f"{member}: {_short(key)} is not a CURVE key of 40 characters")
        return cls(member, host, _addresses(member, fields["addresses"]), port, key)


def own_interfaces() -> list[Placed]:
    """The addresses of this machine with their networks, in the order of the system; none that is link-local."""
    found = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6) or "%" in entry.address:
                continue
            address = _with_network(entry.address, entry.netmask)
            if not address.is_link_local:
                found.append(Placed(name, address))
    return found


def select(interfaces: Sequence[Placed], network: str | None = None) -> tuple[Interface, ...]:
    """The addresses to be reached at: all but loopback, and loopback where there is no other.

    Args:
        interfaces: those of this machine.
        network: interfaces or networks to keep to, separated by commas, as in Open MPI's ``btl_tcp_if_include``:
            ``eth0,10.1.0.0/16``; None: any.

    Raises:
        ConfigError: none is left, or a network cannot be understood.
    """
    if network is None:
        outside = tuple(placed.address for placed in interfaces if not placed.address.is_loopback)
        return outside or tuple(placed.address for placed in interfaces)
    kept: list[Interface] = []
    for entry in (part.strip() for part in network.split(",")):
        wanted = _network(entry)
        kept += [
            placed.address
            for placed in interfaces
            if (placed.interface == entry if wanted is None else placed.address.ip in wanted)
            and placed.address not in kept
        ]
    if not kept:
        there = ", ".join(f"{placed.interface} {placed.address}" for placed in interfaces) or "no address"
        raise ConfigError(
            f"no address of {socket.gethostname()} is in the network {network!r}; it has {there}. "
            "Name an interface or a network that all hosts have, such as eth0 or 10.1.0.0/16"
        )
    return tuple(kept)


def nearest(addresses: Sequence[str], own: Iterable[Interface], same_machine: bool) -> str:
    """Where to reach a machine: an address in a network of this one, else the first.

    Networks within one machine, such as that of a container engine, have the same addresses on many machines: an
    address that this machine has itself is not that of another.

    Args:
        addresses: of the other machine; at least one.
        own: the addresses of this one, with their networks.
        same_machine: whether the other one is this one.
    """
    own = list(own)
    mine = {interface.ip for interface in own}
    parsed = [ipaddress.ip_address(address) for address in addresses]
    usable = [address for address in parsed if same_machine or address not in mine] or parsed
    for address in usable:
        if any(address in interface.network for interface in own):
            return str(address)
    return str(usable[0])


def _addresses(member: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_ADDRESSES:
        raise ConfigError(f"{member}: {_short(value)} is not a list of 1 to {MOST_ADDRESSES} addresses")
    for address in value:
        try:
            if not isinstance(address, str) or "%" in address:
                raise ValueError
            ipaddress.ip_address(address)
        except ValueError as error:
            raise ConfigError(f"{member}: {_short(address)} is not an IP address") from error
    return tuple(value)


def _is_key(text: str) -> bool:
    """Whether this is a CURVE key, 32 bytes in Z85."""
    if len(text) != 40 or not set(_Z85).issuperset(text):
        return False
    words = (text[at : at + 5] for at in range(0, 40, 5))
    return all(functools.reduce(lambda value, digit: 85 * value + _Z85.index(digit), word, 0) < 2**32 for word in words)


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """A network; None where the entry is the name of an interface."""
    if not entry:
        raise ConfigError("an empty entry in the list of networks; it is like eth0,10.1.0.0/16")
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError as error:
        if "/" in entry:
            raise ConfigError(f"{entry!r} is not a network, such as 10.1.0.0/16: {error}") from error
        return None


def _with_network(address: str, netmask: str | None) -> Interface:
    """With the mask as the system gives it; for IPv6 that is an address as well."""
    parsed = ipaddress.ip_address(address)
    if netmask is None:
        return ipaddress.ip_interface(address)
    ones = int(ipaddress.ip_address(netmask)).bit_count()
    return ipaddress.ip_interface(f"{parsed}/{ones}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
