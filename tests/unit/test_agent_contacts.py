"""How agents reach each other: what is taken for a contact, and which address is the right one."""

from __future__ import annotations

import ipaddress
import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.agent.contacts import Contact, Placed, nearest, own_interfaces, select
from chaos_mpi.errors import ConfigError

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
contacts = st.builds(
    Contact,
    member=st.builds(
        "{}:{}".format, st.text(string.ascii_letters + ".-", min_size=1, max_size=20), st.integers(1, 10**7)
    ),
    host=st.text(max_size=20),
    addresses=st.lists(st.ip_addresses().map(str), min_size=1, max_size=4).map(tuple),
    port=st.integers(1, 65535),
    key=st.just(KEY),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


def contact(member: str, host: str, *addresses: str) -> Contact:
    return Contact(member, host, addresses, 1, KEY)


def placed(interface: str, address: str) -> Placed:
    return Placed(interface, ipaddress.ip_interface(address))


MACHINE = [
    placed("lo", "127.0.0.1/8"),
    placed("eth0", "10.1.0.5/16"),
    placed("docker0", "172.17.0.1/16"),
    placed("eth1", "fd00::5/64"),
]


@given(contacts)
def test_a_contact_comes_back_as_it_was(one: Contact) -> None:
    assert Contact.from_json(json.loads(json.dumps(one.to_json()))) == one


@given(st.sampled_from(["member", "host", "addresses", "port", "key"]), anything)
def test_a_contact_with_a_wrong_field_is_refused_or_as_good(name: str, value: Any) -> None:
    fields = {**contact("a:1", "a", "10.0.0.1").to_json(), name: value}
    try:
        read = Contact.from_json(fields)
    except ConfigError:
        return
    assert read.to_json() == fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member": "a"}, "HOST:PID"),
        ({"port": 0}, "from 1 to 65535"),
        ({"port": True}, "not a port"),
        ({"key": KEY[1:]}, "40 characters"),
        ({"key": KEY[1:] + "é"}, "40 characters"),
        ({"key": "#####" + KEY[5:]}, "40 characters"),
        ({"addresses": []}, "a list of 1 to"),
        ({"addresses": ["example.org"]}, "'example.org' is not an IP address"),
        ({"addresses": ["fe80::1%eth0"]}, "not an IP address"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Contact.from_json({**contact("a:1", "a", "10.0.0.1").to_json(), **change})


@pytest.mark.parametrize("value", [None, [], "x", {}])
def test_what_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="contact"):
        Contact.from_json(value)


def test_the_addresses_of_this_machine() -> None:
    own = own_interfaces()
    assert any(entry.address.ip == ipaddress.ip_address("127.0.0.1") for entry in own)
    assert not any(entry.address.is_link_local for entry in own)


@pytest.mark.parametrize(
    ("network", "chosen"),
    [
        (None, ["10.1.0.5", "172.17.0.1", "fd00::5"]),
        ("eth0", ["10.1.0.5"]),
        ("10.0.0.0/8, eth1", ["10.1.0.5", "fd00::5"]),
        ("eth0,10.0.0.0/8", ["10.1.0.5"]),
        ("lo", ["127.0.0.1"]),
    ],
)
def test_addresses_to_be_reached_at(network: str | None, chosen: list[str]) -> None:
    assert [str(address.ip) for address in select(MACHINE, network)] == chosen


def test_a_machine_with_loopback_only() -> None:
    assert [str(address.ip) for address in select(MACHINE[:1])] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("eth7", "no address of .* is in the network 'eth7'; it has lo 127"),
        ("10.1.0.0/99", "'10.1.0.0/99' is not a network"),
        ("eth0,,eth1", "empty entry"),
    ],
)
def test_networks_that_are_refused(network: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(MACHINE, network)


def test_the_address_in_a_common_network_is_the_nearest() -> None:
    own = select(MACHINE)
    assert nearest(["192.168.0.9", "10.1.0.9"], own, False) == "10.1.0.9"
    assert nearest(["192.168.0.9", "192.168.1.9"], own, False) == "192.168.0.9"
    assert nearest(["172.17.0.1", "10.1.0.9"], own, False) == "10.1.0.9", "the container network of another machine"
    assert nearest(["10.1.0.5", "172.17.0.1"], own, True) == "10.1.0.5"
    assert nearest(["172.17.0.1"], own, False) == "172.17.0.1"
