"""Detours as this host's kernel has them: routes through a third host, forwarding for others, and the direct way.

IPv4 only. Routes are set by ``ip`` of iproute2 and marked with a protocol number; no other route is touched. What
was changed is put back by :meth:`Forwarding.stop` and :func:`remove`, not by the end of a process that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import shutil
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from chaos_mpi.agent.contacts import Interface

#: Marks the routes of this package (``proto`` of ``ip route``); none that is registered in iproute2's rt_protos.
PROTOCOL = "203"
#: One run of ``ip``.
COMMAND_LIMIT_S = 5.0
_SETTINGS = Path("/proc/sys/net/ipv4")
_PROGRAM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


class Route(NamedTuple):
    """To one address, through another one."""

    destination: str
    gateway: str


def routes_through(own: Sequence[Interface], target: Iterable[str], via: Iterable[str]) -> list[Route]:
    """The routes from this host to another through a third; empty where there can be none.

    Args:
        own: this host's addresses, with their networks.
        target: addresses of the other host.
        via: addresses of the third one. It has to be in a network of this host, in that of the target if possible.
    """
    networks = [interface.network for interface in own if interface.version == 4]
    here = {interface.ip for interface in own}
    targets, gateways = ([ipaddress.ip_address(a) for a in addresses] for addresses in (target, via))
    routes = []
    for address in targets:
        if address.version != 4 or address in here:
            continue
        near = [network for network in networks if address in network] or networks
        usable = [
            g for g in gateways if g not in here and g not in targets and any(g in network for network in near)
        ]  # fmt: skip
        if usable:
            routes.append(Route(str(address), str(usable[0])))
    return routes


async def replace(route: Route) -> None:
    """Set a route, in the place of the one through another host that there may be.

    Raises:
        OSError: it cannot be set; says why.
    """
    there = (await _ip("show", "exact", f"{route.destination}/32")).splitlines()
    if foreign := [line for line in there if f"proto {PROTOCOL}" not in line]:
        raise OSError(errno.EEXIST, f"there is a route already that is not of chaos_mpi: {foreign[0].strip()}")
    await _ip("replace", f"{route.destination}/32", "via", route.gateway, "proto", PROTOCOL)


async def remove(route: Route) -> None:
    """Take a route away again; nothing happens if it is not there."""
    with contextlib.suppress(OSError):
        await _ip("del", f"{route.destination}/32", "via", route.gateway, "proto", PROTOCOL)


async def remove_left_over() -> None:
    """Take all routes of this package away: those of a job that was killed. A job that needs one sets it again."""
    with contextlib.suppress(OSError):
        await _ip("flush", "proto", PROTOCOL)


async def _ip(*arguments: str) -> str:
    """What ``ip route`` prints.

    Raises:
        OSError: it failed; says why.
    """
    program = shutil.which("ip") or shutil.which("ip", path=_PROGRAM_PATH)
    if program is None:
        raise FileNotFoundError(errno.ENOENT, "there is no program 'ip' on this host: install iproute2")
    process = await asyncio.create_subprocess_exec(
        program, "-4", "route", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = await asyncio.wait_for(process.communicate(), COMMAND_LIMIT_S)
    except TimeoutError:
        process.kill()
        raise OSError(
            errno.ETIMEDOUT, f"'ip route {' '.join(arguments)}' did not end within {COMMAND_LIMIT_S:g} s"
        ) from None
    if process.returncode != 0:
        text = errors.decode().strip()
        number = errno.EPERM if "Operation not permitted" in text else errno.EINVAL
        raise OSError(number, f"'ip route {' '.join(arguments)}': {text}")
    return out.decode()


class Forwarding:
    """Whether this host passes packets on to others: off at first, unless it was on already.

    Args:
        settings: directory of the kernel's settings.

    Attributes:
        started: whether this host forwards for this agent.
    """

    def __init__(self, settings: Path = _SETTINGS) -> None:
        self._forward, self._conf = settings / "ip_forward", settings / "conf"
        self._before: dict[Path, str] = {}
        self.started = False

    def start(self) -> None:
        """Forward; also to be called again, in case that another agent of this host has put it back.

        Raises:
            OSError: this process may not set it.
        """
        self.started = True
        accept = self._conf / "all/accept_redirects"
        try:
            accepted = accept.read_text().strip()
            if self._change(self._forward, "1"):
                self._before[accept] = accepted  # the kernel sets it anew whenever forwarding is changed
            # Who forwards within one network tells the sender of a shorter way, which is the one that is cut.
            for path in sorted(self._conf.glob("*/send_redirects")):
                self._change(path, "0")
        except OSError:
            self.stop()
            raise

    def stop(self) -> None:
        """Put back what was changed."""
        before, self._before = self._before, {}
        self.started = False
        for path, value in before.items():
            with contextlib.suppress(OSError):
                path.write_text(value)

    def _change(self, path: Path, value: str) -> bool:
        """Set something; whether it was otherwise."""
        before = path.read_text().strip()
        if before == value:
            return False
        path.write_text(value)
        self._before[path] = before
        return True


async def can_connect(address: str, port: int, limit_s: float, *, around_routes: bool = False) -> bool:
    """Whether a host answers to an attempt to connect.

    Args:
        address: of the host.
        port: that something listens at.
        limit_s: how long to wait.
        around_routes: send without a detour, through no gateway (``SO_DONTROUTE``); the answer may take one. A host in
            another network is never reached so.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as attempt:
        attempt.setblocking(False)
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, around_routes)
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.get_running_loop().sock_connect(attempt, (address, port))
        except TimeoutError:
            return _is_connected(attempt)  # this process may have had no processor for all that time
        except OSError:
            return False
    return True


def _is_connected(attempt: socket.socket) -> bool:
    try:
        attempt.getpeername()
    except OSError:
        return False
    return True
