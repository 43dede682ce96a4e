"""The store of torch.distributed where ranks are on several hosts."""

from __future__ import annotations

import socket

import pytest

from chaos_mpi.errors import ConfigError
from chaos_mpi.torch.store import connect, serve

NETWORK = "OMPI_MCA_btl_tcp_if_include"


@pytest.mark.parametrize("network", ["", "lo", "127.0.0.0/8"])
def test_others_reach_it_by_address(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if network:
        monkeypatch.setenv(NETWORK, network)
    else:
        monkeypatch.delenv(NETWORK, raising=False)
    store, where = serve(alone=False)
    assert not network or where["addresses"] == ["127.0.0.1"]
    connect(where).set("step", "7")
    assert store.get("step") == b"7"


def test_on_one_host_it_is_on_loopback() -> None:
    store, where = serve(alone=True)
    assert where["addresses"] == ["127.0.0.1"]
    connect(where).set("step", "8")
    assert store.get("step") == b"8"


def test_an_address_that_does_not_answer_is_passed_over() -> None:
    store, where = serve(alone=True)
    connect({**where, "addresses": ["127.0.0.99", *where["addresses"]]}).set("step", "9")
    assert store.get("step") == b"9"


def test_who_cannot_be_reached_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match=f"no answer from 127.0.0.1, port {port}: Connection refused"):
        connect({"addresses": ["127.0.0.1"], "port": port})


def test_a_network_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NETWORK, "203.0.113.0/24")
    with pytest.raises(ConfigError, match="is in the network"):
        serve(alone=False)
