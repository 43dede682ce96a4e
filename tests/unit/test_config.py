"""Settings: arguments before environment before defaults; bad values are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos_mpi.config import Settings, load_settings
from chaos_mpi.errors import ConfigError


def test_defaults() -> None:
    assert load_settings(environ={}) == Settings()


def test_environment_and_arguments() -> None:
    environ = {
        "CHAOS_MIN_RANKS": "2",
        "CHAOS_BATCH_POLICY": "linear",
        "CHAOS_TIMEOUT_S": "7.5",
        "CHAOS_CHECKPOINT_DIR": "/some/where",
        "CHAOS_RESUME": "1",
        "CHAOS_HOSTS_FROM": "/some/hosts",
        "CHAOS_DISCOVERY_INTERVAL_S": "0.5",
    }
    settings = load_settings(environ=environ, min_ranks=3)
    assert settings.min_ranks == 3
    assert settings.batch_policy == "linear"
    assert settings.timeout_s == 7.5
    assert settings.checkpoint_dir == Path("/some/where")
    assert settings.resume
    assert settings.hosts_from == Path("/some/hosts")
    assert settings.discovery_interval_s == 0.5


def test_the_scale_policy_follows_from_whether_there_is_a_list_of_hosts() -> None:
    assert load_settings(environ={}).policy_name == "manual"
    assert load_settings(environ={}, hosts_from="hosts").policy_name == "available"
    assert load_settings(environ={"CHAOS_SCALE_POLICY": "manual"}, hosts_from="hosts").policy_name == "manual"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"CHAOS_MIN_RANKS": "two"}, "CHAOS_MIN_RANKS"),
        ({"CHAOS_MIN_RANKS": "0"}, "at least 1"),
        ({"CHAOS_BATCH_POLICY": "quadratic"}, "keep_global_batch, linear, sqrt, none"),
        ({"CHAOS_TIMEOUT_S": "-1"}, "positive"),
        ({"CHAOS_TIMEOUT_S": "inf"}, "positive"),
        ({"CHAOS_CHECKPOINT_EVERY": "0"}, "at least 1 step"),
        ({"CHAOS_LOG_LEVEL": "loud"}, "debug, info, warning, error"),
        ({"CHAOS_RESUME": "maybe"}, "CHAOS_RESUME"),
        ({"CHAOS_SCALE_POLICY": "larger"}, "available, manual"),
        ({"CHAOS_SCALE_POLICY": "available"}, "needs a list of hosts"),
        ({"CHAOS_DISCOVERY_INTERVAL_S": "0"}, "positive"),
        ({"CHAOS_RESUME": "1"}, "checkpoint directory"),
    ],
)
def test_bad_values_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(environ=environ)
