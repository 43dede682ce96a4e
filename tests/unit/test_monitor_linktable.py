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
    a.sent({"b": 9000.0, "c": 8000.0})
    a.sent({"c": 7000.0})  # what was measured last counts
    b.sent({"a": 4000.0})  # of two directions the slower one
    orders = {("a", "c"): Order(5.0, "b:7", down=True)}
    told = a.receive("b:7", json.loads(json.dumps(b.message(orders))))
    assert told == orders
    links = {("a", "b"): LinkStatus(("a", "b"), DETOUR, "c"), ("a", "c"): LinkStatus(("a", "c"), DOWN, "", "x")}
    assert a.rows({"c", "b", "a"}, links) == [
        {"a": "a", "b": "b", "rtt_ms": 0.3, "bytes_per_s": 4000, "state": DETOUR, "via": "c", "no_detour": ""},
        {"a": "a", "b": "c", "rtt_ms": None, "bytes_per_s": 7000, "state": DOWN, "via": "", "no_detour": "x"},
        {"a": "b", "b": "c", "rtt_ms": 2.0, "bytes_per_s": None, "state": UP, "via": "", "no_detour": ""},
    ]
    assert a.rows({"a"}, {}) == []


@pytest.mark.parametrize(
    "fields",
    [{}, {"rtt_ms": 3}, {"rtt_ms": {"a": "x"}}, {"orders": [["a", "b"]]}, {"orders": 3}, {"bytes_per_s": {"a": None}}],
)
def test_what_cannot_be_read(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="b:1"):
        LinkTable("a:1").receive("b:1", {"rtt_ms": {}, "bytes_per_s": {}, "orders": [], **fields} if fields else {})
