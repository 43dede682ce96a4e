"""Which routes make a detour, and forwarding that is put back as it was. With a kernel: see tests/testbed."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from pathlib import Path

import pytest

from chaos_mpi.agent.contacts import Interface
from chaos_mpi.agent.routes import Forwarding, Route, can_connect, replace, routes_through


def own(*addresses: str) -> tuple[Interface, ...]:
    return tuple(ipaddress.ip_interface(address) for address in addresses)


def test_a_route_for_each_address_that_is_in_a_network_of_this_host() -> None:
    here = own("10.1.0.1/24", "10.2.0.1/24")
    routes = routes_through(here, ["10.1.0.2", "10.2.0.2"], ["10.1.0.3", "10.2.0.3"])
    assert routes == [Route("10.1.0.2", "10.1.0.3"), Route("10.2.0.2", "10.2.0.3")]


def test_a_host_behind_a_router_is_reached_through_one_that_is_near() -> None:
    assert routes_through(own("10.1.0.1/24"), ["10.9.0.2"], ["10.1.0.3"]) == [Route("10.9.0.2", "10.1.0.3")]


@pytest.mark.parametrize(
    ("target", "via"),
    [
        (["10.1.0.2"], ["10.9.0.3"]),  # the third host is in no network of this one
        (["10.1.0.1"], ["10.1.0.3"]),  # an address that this host has itself: one of a container engine, for example
        (["10.1.0.2"], ["10.1.0.2"]),
        (["10.1.0.2"], ["10.1.0.1"]),
        (["fd00::2"], ["fd00::3"]),
    ],
)
def test_where_there_is_no_detour(target: list[str], via: list[str]) -> None:
    assert routes_through(own("10.1.0.1/24", "fd00::1/64"), target, via) == []


class Kernel:
    """A directory with settings, as below /proc/sys/net/ipv4."""

    def __init__(self, path: Path, forward: str, redirects: str) -> None:
        self.path = path
        for interface in ("all", "eth0"):
            (path / "conf" / interface).mkdir(parents=True)
            (path / "conf" / interface / "send_redirects").write_text(f"{redirects}\n")
        (path / "conf" / "all" / "accept_redirects").write_text("1\n")
        (path / "ip_forward").write_text(f"{forward}\n")

    def all(self) -> dict[str, str]:
        files = [path for path in self.path.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.path)): path.read_text().strip() for path in files}


@pytest.mark.parametrize(("forward", "redirects"), [("0", "1"), ("0", "0"), ("1", "1")])
def test_forwarding_is_put_back_as_it_was(tmp_path: Path, forward: str, redirects: str) -> None:
    kernel = Kernel(tmp_path, forward, redirects)
    before = kernel.all()
    forwarding = Forwarding(tmp_path)
    forwarding.start()
    assert forwarding.started
    during = kernel.all()
    assert (during["ip_forward"], during["conf/eth0/send_redirects"], during["conf/all/send_redirects"]) == tuple("100")
    (tmp_path / "conf/all/accept_redirects").write_text("0")  # as the kernel does
    forwarding.stop()
    assert not forwarding.started
    assert kernel.all() == (before if forward == "0" else before | {"conf/all/accept_redirects": "0"})


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_agents_of_a_host_forward(tmp_path: Path, first_ends_first: bool) -> None:
    kernel = Kernel(tmp_path, "0", "1")
    before = kernel.all()
    one, other = Forwarding(tmp_path), Forwarding(tmp_path)
    one.start()
    other.start()
    if first_ends_first:
        one.stop()
        other.start()  # the other agent looks after it
        assert kernel.all()["ip_forward"] == "1"
        other.stop()
    else:
        other.stop()
        assert kernel.all()["ip_forward"] == "1"
        one.stop()
    assert kernel.all() == before


def test_nothing_is_half_changed_where_it_may_not_be_set(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "0", "1")
    (tmp_path / "conf" / "eth0" / "send_redirects").unlink()
    (tmp_path / "conf" / "eth0" / "send_redirects").mkdir()
    before = kernel.all()
    forwarding = Forwarding(tmp_path)
    with pytest.raises(OSError, match="send_redirects"):
        forwarding.start()
    assert kernel.all() == before
    assert not forwarding.started


def test_a_route_that_cannot_be_set_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ip"
    program.write_text(
        '#!/bin/sh\n[ "$3" = show ] || { echo "RTNETLINK answers: Operation not permitted" >&2; exit 2; }\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(PermissionError, match="Operation not permitted"):
        asyncio.run(replace(Route("10.1.0.2", "10.1.0.3")))


def test_a_route_of_somebody_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ip"
    program.write_text("#!/bin/sh\necho 10.1.0.2 via 10.1.0.9 dev eth0 proto static\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(FileExistsError, match=r"10\.1\.0\.9"):
        asyncio.run(replace(Route("10.1.0.2", "10.1.0.3")))


def test_who_can_be_connected_with() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert asyncio.run(can_connect("127.0.0.1", port, 5.0))
        assert asyncio.run(can_connect("127.0.0.1", port, 5.0, around_routes=True))
    assert not asyncio.run(can_connect("127.0.0.1", port, 5.0))
    assert not asyncio.run(can_connect("203.0.113.1", port, 5.0, around_routes=True))  # no network of this host
