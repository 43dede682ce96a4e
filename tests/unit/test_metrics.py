"""Prometheus metrics of a job: what they say, and that counters never go back."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from job_answers import NOW, answer

from chaos_mpi.cli.chaosrun import main
from chaos_mpi.cli.status import combine

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from chaos_mpi.cli.metrics import CACHE_S, JobCollector, Ledger, MetricsEndpoint, families

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(job: dict[str, Any] | None, ledger: Ledger | None = None) -> Samples:
    """The metrics of a job by name and labels."""
    ledger = ledger or Ledger()
    if job is not None:
        ledger.note(job)
    found = [sample for family in families(job, ledger) for sample in family.samples]
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in found}


def test_a_job_as_metrics() -> None:
    changes = {"recoveries": 1, "deaths": 2, "joins": 3, "leaves": 4}
    job = combine([answer("a:1", epoch=8, changes=changes, stalled_s={"join": 1.5})], None, NOW)
    found = samples(job)
    assert found["chaos_mpi_step", ()] == 100
    assert found["chaos_mpi_epoch", ()] == 8
    assert found["chaos_mpi_members", ()] == 3
    assert found["chaos_mpi_steps_per_second", ()] == 10.0
    assert [found[f"chaos_mpi_{name}_total", ()] for name in changes] == [1, 2, 3, 4]
    assert found["chaos_mpi_stalled_seconds_total", (("cause", "join"),)] == 1.5
    up = {labels: value for (name, labels), value in found.items() if name == "chaos_mpi_member_up"}
    assert up == {
        (("host", "a"), ("member", "a:1"), ("rank", "0")): 1,
        (("host", "a"), ("member", "a:2"), ("rank", "1")): 0,
    }
    everywhere = samples(combine([answer("a:1")], None, NOW, all_asked=True))
    assert everywhere["chaos_mpi_member_up", (("host", "b"), ("member", "b:3"), ("rank", "2"))] == 0
    assert found["chaos_mpi_member_cpu_seconds_total", (("host", "a"), ("member", "a:1"))] == 12.5
    assert found["chaos_mpi_member_resident_memory_bytes", (("host", "a"), ("member", "a:1"))] == 400e6
    assert found["chaos_mpi_host_load1", (("host", "a"),)] == 1.0


def test_a_job_that_does_not_answer_yet_has_no_members() -> None:
    assert samples(None)["chaos_mpi_members", ()] == 0


views = st.builds(
    answer,
    st.sampled_from(["a:1", "a:2", "b:3"]),
    epoch=st.integers(0, 5),
    step=st.integers(0, 50),
    changes=st.fixed_dictionaries({n: st.integers(0, 4) for n in ("recoveries", "deaths", "joins", "leaves")}),
    stalled_s=st.dictionaries(st.sampled_from(["join", "failure"]), st.floats(0, 10)),
)


@given(st.lists(st.lists(views, min_size=1, max_size=3), max_size=6))
def test_counters_never_go_back_whoever_answers(looks: list[list[dict[str, Any]]]) -> None:
    ledger, before = Ledger(), samples(None)
    for answers in looks:
        now = samples(combine(answers, None, NOW), ledger)
        for key, value in before.items():
            if key[0] in ("chaos_mpi_step", "chaos_mpi_epoch") or (
                key[0].endswith("_total") and "member" not in key[0]
            ):
                assert now[key] >= value, key
        before = now


def test_what_a_member_has_stood_still_counts_when_it_is_gone() -> None:
    ledger = Ledger()
    both = [answer("a:1", stalled_s={"join": 1.0}), answer("a:2", stalled_s={"join": 2.0, "failure": 4.0})]
    samples(combine(both, None, NOW), ledger)
    found = samples(combine([answer("a:1", ("a:1",), stalled_s={"join": 1.25})], None, NOW), ledger)
    assert found["chaos_mpi_stalled_seconds_total", (("cause", "join"),)] == 3.25
    assert found["chaos_mpi_stalled_seconds_total", (("cause", "failure"),)] == 4.0


def test_the_members_are_not_asked_for_every_scrape() -> None:
    now, asked = [0.0], []

    def look() -> None:
        asked.append(now[0])

    collector = JobCollector(look, lambda: now[0])
    for when in (0.0, CACHE_S / 2, CACHE_S, CACHE_S * 1.5, CACHE_S * 3):
        now[0] = when
        collector.collect()
    assert asked == [0.0, CACHE_S, CACHE_S * 3]


def test_metrics_come_over_http_and_only_while_served(tmp_path: Path) -> None:
    endpoint = MetricsEndpoint("127.0.0.1", 0, tmp_path)
    try:
        for _ in range(2):
            with endpoint.serving(), urllib.request.urlopen(endpoint.url, timeout=10) as response:
                found = {family.name for family in text_string_to_metric_families(response.read().decode())}
            assert {"chaos_mpi_step", "chaos_mpi_recoveries"} <= found
        with (
            endpoint.serving(),
            urllib.request.urlopen(f"{endpoint.url}?name[]=chaos_mpi_step", timeout=10) as response,
        ):
            (family,) = text_string_to_metric_families(response.read().decode())
        assert family.name == "chaos_mpi_step"
    finally:
        endpoint.close()


def test_a_port_that_is_taken_is_refused_before_the_job_starts(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["--metrics-port", port, str(script)])
    assert result.exit_code == 2
    assert result.output == f"chaosrun: metrics cannot be served at 127.0.0.1, port {port}: Address already in use\n"
    assert not (tmp_path / "started").exists()


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    result = CliRunner().invoke(main, ["--metrics-port", "0", "--metrics-address", "999.1.1.1", str(script)])
    assert result.exit_code == 2
    assert result.output.startswith("chaosrun: metrics cannot be served at 999.1.1.1, port 0: ")
    assert len(result.output.splitlines()) == 1
