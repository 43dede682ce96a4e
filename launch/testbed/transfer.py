"""One TCP transfer, timed at the receiver; :meth:`testbed.TestBed.measure` runs both ends, each in its host.

``transfer.py receive ADDRESS SECONDS`` prints the port, then bytes and seconds received;
``transfer.py send ADDRESS PORT`` sends zeros until the receiver hangs up.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time

#: Left out of the measurement, seconds: the tokens that the shaper had saved up, and TCP's slow start.
WARM_UP_S = 0.2
#: A transfer over a cut link ends after this time without progress, seconds.
SILENCE_S = 3.0
CHUNK = 1 << 17


def receive(address: str, seconds: float) -> None:
    """Take bytes for ``seconds`` after the warm-up; print how many came, and in what time."""
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        server.settimeout(SILENCE_S)
        taken, start, now = 0, 0.0, 0.0
        with contextlib.suppress(TimeoutError):
            connection, _ = server.accept()
            with connection:
                connection.settimeout(SILENCE_S)
                buffer = bytearray(CHUNK)
                warm_at = time.monotonic() + WARM_UP_S
                while n := connection.recv_into(buffer):
                    now = time.monotonic()
                    if start:
                        taken += n
                        if now - start >= seconds:
                            break
                    elif now >= warm_at:
                        start = now
        print(taken, now - start if taken else seconds, flush=True)


def send(address: str, port: int) -> None:
    """Send until the other end closes, or nothing moves any more."""
    zeros = bytes(CHUNK)
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=SILENCE_S) as connection:
        while True:
            connection.sendall(zeros)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2], float(sys.argv[3]))
    else:
        send(sys.argv[2], int(sys.argv[3]))
