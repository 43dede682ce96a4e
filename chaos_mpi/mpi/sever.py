"""Ends this process's TCP connections with a host that is known to be dead.

A machine that vanishes says nothing, and MPI would wait for it until TCP gives up, minutes later. When its
connections are shut down from this side, Open MPI sees them end, and reports the ranks behind them as failed within
milliseconds.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

DESCRIPTORS = Path("/proc/self/fd")
#: Sockets of the network namespace of the process (proc(5)).
_TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
#: States of a connection that is not over (include/net/tcp_states.h): established, being made, half closed.
_ALIVE = frozenset({"01", "02", "03", "04", "05", "08"})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def sever(addresses: Collection[str]) -> int:
    """Shut down every TCP connection of this process whose peer has one of these IP addresses.

    Connections that are still being made are among them. The descriptors stay open and stay with whoever
    owns them, who sees the end of the connection. Safe while other threads open and close descriptors: a duplicate is
    examined and shut down, so it is always the same connection that is meant.

    Args:
        addresses: all addresses of the dead host, of any interface.

    Returns:
        How many connections were shut down.

    Raises:
        ValueError: an address is not one.
    """
    wanted = {plain(address) for address in addresses}
    candidates = _connections(wanted)
    severed: set[int] = set()
    if not candidates:
        return 0
    for entry in os.listdir(DESCRIPTORS):
        try:
            duplicate = os.dup(int(entry))
        except OSError:  # closed meanwhile
            continue
        try:
            status = os.fstat(duplicate)
            if not stat.S_ISSOCK(status.st_mode) or status.st_ino not in candidates or status.st_ino in severed:
                continue
            if _shut_down(duplicate, wanted):
                severed.add(status.st_ino)
        finally:
            os.close(duplicate)
    return len(severed)


def parse_table(text: str) -> Iterable[tuple[int, Address, str]]:
    """Inode, peer and state of each socket in a table of the kernel's, /proc/net/tcp or tcp6."""
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9:
            yield int(fields[9]), _from_kernel(fields[2].partition(":")[0]), fields[3]


def _connections(wanted: Collection[Address]) -> set[int]:
    """Inodes of the sockets in this namespace that are connected, or being connected, to one of these."""
    found: set[int] = set()
    for table in _TABLES:
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            found |= {
                inode for inode, peer, state in parse_table(table.read_text()) if peer in wanted and state in _ALIVE
            }
    return found


def _shut_down(descriptor: int, wanted: Collection[Address]) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        try:
            peer = plain(connection.getpeername()[0])
        except OSError:
            peer = None  # still being made: the kernel's table has said where to
        if peer is not None and peer not in wanted:
            return False
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False  # has ended meanwhile
    return True


def plain(address: str) -> Address:
    """The address; one of IPv4 that is written as IPv6 as what it is."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped if mapped is not None else parsed


def _from_kernel(digits: str) -> Address:
    """An address from the kernel's form: words of 32 bits in the byte order of the machine."""
    words = [int(digits[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(digits), 8)]
    return plain(str(ipaddress.ip_address(b"".join(words))))
