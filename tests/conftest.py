"""Options of the test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the churn test is, and what it draws."""
    group = parser.getgroup("churn")
    group.addoption("--churn-events", type=int, default=20, help="joins, leaves and deaths in each run (default: 20)")
    group.addoption("--churn-seed", type=int, default=None, help="what they are drawn from (default: a fixed one)")
