"""The arithmetic behind the scale-out benchmark, what it compares, and its shared storage."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("report", "scale_out_cells", "scale_out_table", "scale_out_times", "synthetic", "baselines")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules; they are scripts, not a package."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in NAMES]

    others = {name: sys.modules.pop(name) for name in ours()}
    path = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    names = (
        "scale_out_cells",
        "scale_out_table",
        "scale_out_times",
        "synthetic",
        "baselines.storage",
        "baselines.strategies",
    )
    yield SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in names})
    sys.path[:] = path
    for name in ours():
        del sys.modules[name]
    sys.modules.update(others)


def steps(start: float, n: int, step_s: float = 0.03, pause_s: float = 0.001) -> list[tuple[float, float]]:
    return [(start + i * (step_s + pause_s), start + i * (step_s + pause_s) + step_s) for i in range(n)]


# -- what an event cost ------------------------------------------------------------------------------------


def test_a_long_pause_is_idle_time_less_what_is_usual(bench: SimpleNamespace) -> None:
    before = steps(0.0, 50)
    until = before[-1][1]
    made = [*before, *steps(until + 0.5, 5)]
    cost = bench.scale_out_times.cost(made, requested=until - 0.2, ready=until - 0.1, ended=made[-1][1])
    assert cost.idle_s == pytest.approx(0.499, rel=0.01)
    assert cost.slowed_s == pytest.approx(0.0, abs=1e-9)


def test_pauses_outside_of_the_event_do_not_count(bench: SimpleNamespace) -> None:
    before = steps(0.0, 200)
    early = [*steps(-10.0, 3), *before]
    late = [*early, *steps(before[-1][1] + 0.001, 5), *steps(19.0, 3)]
    cost = bench.scale_out_times.cost(late, requested=6.1, ready=6.15, ended=late[-4][1])
    assert cost.idle_s == pytest.approx(0.0, abs=1e-9)


def test_before_the_newcomer_is_ready_only_the_longest_pause_counts(bench: SimpleNamespace) -> None:
    before = steps(0.0, 50)
    starting = [*before, *steps(before[-1][1] + 0.1, 1), *steps(before[-1][1] + 0.14, 100, pause_s=0.004)]
    after = [*starting, *steps(starting[-1][1] + 0.004, 5, pause_s=0.004)]
    cost = bench.scale_out_times.cost(after, before[-1][1], starting[-1][1], after[-1][1])
    assert 0.09 < cost.idle_s < 0.1 + 5 * 0.004


def test_slower_steps_count_from_when_the_newcomer_is_ready(bench: SimpleNamespace) -> None:
    before = steps(0.0, 50)
    begun = before[-1][1] + 0.001
    slow = steps(begun, 10, step_s=0.05)
    cost = bench.scale_out_times.cost([*before, *slow], requested=begun - 0.04, ready=begun, ended=slow[-1][1])
    assert cost.slowed_s == pytest.approx(10 * 0.02)
    assert cost.idle_s == pytest.approx(0.0, abs=1e-9)
    assert cost.steps == 11  # one was before the newcomer was ready


def test_the_parts_of_a_delay_add_up(bench: SimpleNamespace) -> None:
    parts = bench.scale_out_times.joined_parts(5.0, {"launch_s": 3.0, "waited_s": 0.1, "transfer_s": 1.5, "x": 9.0})
    assert tuple(sorted(parts)) == tuple(sorted(bench.scale_out_times.PARTS))
    assert sum(parts.values()) == pytest.approx(5.0)
    assert parts["rest_s"] == pytest.approx(0.4)


def test_a_restart_waits_for_the_slowest_reader(bench: SimpleNamespace) -> None:
    def line(event: str, at: float) -> dict[str, object]:
        return {"event": event, "at": at}

    first = [line("started", 1.0), line("stopped", 10.5), line("saved", 12.0)]
    second = {
        "rank0": [line("reading", 15.0), line("read", 18.0)],
        "newcomer": [line("reading", 16.0), line("read", 17.0), line("contributed", 18.5)],
    }
    parts = bench.scale_out_times.restarted_parts(10.0, first, second)
    assert parts == {"wait_s": 0.5, "launch_s": 4.0, "transfer_s": 1.5 + 2.0, "rest_s": 0.5}
    with pytest.raises(LookupError, match="no 'read'"):
        bench.scale_out_times.restarted_parts(10.0, first, {"newcomer": [line("reading", 16.0)]})


# -- what is compared --------------------------------------------------------------------------------------


@given(
    state_mb=st.sampled_from([10, 100, 300, 1000]),
    sources=st.sampled_from([2, 4, 6]),
    links=st.sampled_from(["equal", "unequal"]),
)
def test_uplinks_add_up_to_the_same_whatever_their_shares(
    bench: SimpleNamespace, state_mb: int, sources: int, links: str
) -> None:
    cell = bench.scale_out_cells.Cell(state_mb, sources, links)
    assert sum(cell.rates_mbit) == pytest.approx(sources * cell.mean_mbit)
    assert cell.bound_s == pytest.approx(cell.state_bytes / (sum(cell.rates_mbit) * 125_000))
    assert cell.bound_s <= min(cell.state_bytes / (rate * 125_000) for rate in cell.rates_mbit)
    assert cell.random_s >= cell.bound_s
    assert (len(set(cell.rates_mbit)) == 1) == (links == "equal")


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=60), workers=st.integers(1, 8))
def test_slices_of_a_variable_list_are_all_of_it(bench: SimpleNamespace, sizes: list[int], workers: int) -> None:
    slices = bench.strategies.slices(sizes, workers)
    assert len(slices) == workers
    assert sum(slices) == sum(sizes)


def test_targets_name_the_cells_that_miss_them(bench: SimpleNamespace) -> None:
    def found(delay_s: float, ratio: float, idle_s: float) -> dict[str, object]:
        return {"delay_s": delay_s, "ratio": ratio, "idle_max_s": idle_s, "parts": {"launch_s": 2.0}}

    row = {"state_mb": 10, "sources": 4, "links": "equal"}
    good = {**row, "systems": {"chaos_overlap": found(3.0, 1.1, 0.05), "nearest": found(4.0, 4.0, 1.0)}}
    assert list(bench.scale_out_table.targets([good]).values()) == [[]] * 4
    alone = {**row, "systems": {"chaos_blocking": found(3.0, 1.1, 0.05)}}
    compared_with_nothing = {"idle": None, "delay": None, "after_start": None}
    assert bench.scale_out_table.targets([alone]) == {"transfer": [], **compared_with_nothing}
    bad = {**row, "systems": {"chaos_overlap": found(5.0, 1.2, 0.15), "nearest": found(4.0, 4.0, 1.0)}}
    assert all(len(missed) == 1 for missed in bench.scale_out_table.targets([bad]).values())


@pytest.mark.parametrize("blank", [True, False])
def test_the_state_is_as_large_as_asked_for_and_in_one_piece(bench: SimpleNamespace, blank: bool) -> None:
    model = bench.synthetic.SyntheticModel(1_000_000, blank=blank)
    variables = bench.strategies.variables(model)
    assert sum(tensor.nbytes for tensor in variables.values()) == model.flat.nbytes == 1_000_000
    start = model.flat.data_ptr()
    assert all(start <= tensor.data_ptr() < start + 1_000_000 for tensor in variables.values())
    assert model.frozen_as_it_should_be() != blank


def test_what_is_stored_is_read_again(bench: SimpleNamespace) -> None:
    storage = bench.storage
    command = [sys.executable, "-S", str(BENCHMARKS / "baselines" / "storage.py"), "127.0.0.1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        data = bytes(range(256)) * 20_000
        storage.put("127.0.0.1", port, memoryview(data))
        into = bytearray(len(data))
        storage.get("127.0.0.1", port, memoryview(into))
        assert into == data
        with pytest.raises(OSError, match="holds 5120000 bytes, not 3"):
            storage.get("127.0.0.1", port, memoryview(bytearray(3)))
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(5) == 0
