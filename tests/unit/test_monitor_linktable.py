"""What each agent knows of all links."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chaos_mpi.monitor.hostlinks import DETOUR, DOWN, UP, LinkStatus, Order
from chaos_mpi.monitor.linktable import LinkTable


def test_a_row_for_each_pair_of_hosts() -> None:
    a, b = LinkTable("a:1"), LinkTable("b:7")
    a.measured({"a:2": 1e-5, "b:7": 4e-4, "b:8": 3e-4})
    b.measured({"c:1": 2e-3, "a:1": 5e-4})
    orders = {("a", "c"): Order(5.0, "b:7", down=True)}
    told = a.receive("b:7", json.loads(json.dumps(b.message(orders))))
    assert told == orders
    links = {("a", "b"): LinkStatus(("a", "b"), DETOUR, "c"), ("a", "c"): LinkStatus(("a", "c"), DOWN)}
    assert a.rows({"c", "b", "a"}, links) == [
        {"a": "a", "b": "b", "rtt_ms": 0.3, "state": DETOUR, "via": "c"},
        {"a": "a", "b": "c", "rtt_ms": None, "state": DOWN, "via": ""},
        {"a": "b", "b": "c", "rtt_ms": 2.0, "state": UP, "via": ""},
    ]
    assert a.rows({"a"}, {}) == []


@pytest.mark.parametrize(
    "fields",
    [{}, {"rtt_ms": 3, "orders": []}, {"rtt_ms": {"a": "x"}, "orders": []}, {"rtt_ms": {}, "orders": [["a", "b"]]},
     {"rtt_ms": {}, "orders": 3}],
)  # fmt: skip
def test_what_cannot_be_read(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="b:1"):
        LinkTable("a:1").receive("b:1", fields)
