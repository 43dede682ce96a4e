"""How much this process has sent to other machines over TCP, and how long that took: by the kernel's own count.

MPI's messages go where training sends them anyway, so the bandwidth of links is learnt from them without a probe. (The
kernel also estimates a rate, from the last acknowledgements: for messages of less than a second, those of training, it
is off by orders of magnitude, in both directions.)
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from chaos_mpi.mpi.sever import DESCRIPTORS, plain

#: Where ``struct tcp_info`` has what is of interest here (include/uapi/linux/tcp.h, Linux 4.10 and later).
_ACKED_AT, _BUSY_AT, _LENGTH = 120, 168, 176


class Sent(NamedTuple):
    """What was sent to one address, over all connections that are still there.

    Attributes:
        nbytes: that were acknowledged.
        busy_s: how long there was something that was not acknowledged yet, summed over the connections. The kernel
            counts it in ticks of 1 to 10 ms, so that of few short messages is nothing much.
    """

    nbytes: int
    busy_s: float


def sent_by_address() -> dict[str, Sent]:
    """What this process has sent to each address that it is connected with. Linux's; empty where nothing is told."""
    found: dict[str, Sent] = {}
    for address, sent in _connections():
        so_far = found.get(address, Sent(0, 0.0))
        found[address] = Sent(so_far.nbytes + sent.nbytes, so_far.busy_s + sent.busy_s)
    return found


def _connections() -> Iterator[tuple[str, Sent]]:
    seen: set[int] = set()
    for entry in os.listdir(DESCRIPTORS):
        # Other threads may close it at any time: the duplicate stays what it is.
        with contextlib.suppress(OSError), contextlib.ExitStack() as closing:
            duplicate = os.dup(int(entry))
            closing.callback(os.close, duplicate)
            status = os.fstat(duplicate)
            if not stat.S_ISSOCK(status.st_mode) or status.st_ino in seen:
                continue
            seen.add(status.st_ino)
            with socket.socket(fileno=os.dup(duplicate)) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                peer = str(plain(connection.getpeername()[0]))
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LENGTH)
            if len(info) >= _LENGTH:
                (acked,), (busy_us,) = struct.unpack_from("Q", info, _ACKED_AT), struct.unpack_from("Q", info, _BUSY_AT)
                yield peer, Sent(acked, busy_us / 1e6)
