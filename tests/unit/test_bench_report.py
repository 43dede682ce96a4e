"""The arithmetic behind the benchmarks' numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """Loads a module of ``benchmarks/`` by name; they are scripts, not a package."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    names = ("report", "models", "jobs", "overhead", "recovery", "events")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    loaded = ModuleType("bench")
    for name in names:
        setattr(loaded, name, load(name))
    yield loaded
    for name in names:
        del sys.modules[name]
    sys.modules.update(others)


def test_quantiles_are_interpolated(bench: ModuleType) -> None:
    assert bench.report.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert bench.report.quantile([1.0, 2.0], 0.25) == 1.25
    assert bench.report.quantile([5.0], 0.9) == 5.0
    assert math.isnan(bench.report.quantile([], 0.5))


def test_the_interval_of_a_median_holds_it_and_is_the_same_each_time(bench: ModuleType) -> None:
    rng = random.Random(1)
    values = [rng.gauss(1.0, 0.1) for _ in range(40)]
    low, high = bench.report.median_interval(values)
    assert low <= bench.report.quantile(values, 0.5) <= high
    assert high - low < 0.2
    assert (low, high) == bench.report.median_interval(values)


def test_what_was_measured_before_an_interruption_is_kept(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(by: BaseException) -> Iterator[dict[str, int]]:
        yield {"size": 1}
        raise by

    for by, status in ((KeyboardInterrupt(), 130), (SystemExit(143), 143), (ValueError("unexpected"), 1)):
        part = bench.report.collected(interrupted(by))
        assert part == [{"size": 1}]
        assert part.status == status
    assert "ValueError: unexpected" in capsys.readouterr().err

    shown: list[object] = []
    result = {"benchmark": "some", "rows": [{"ms": 1.0}]}
    whole = bench.report.collected([{"size": 1}])
    bench.report.publish(tmp_path, result, shown.append, lambda _, path: path.write_bytes(b"picture"), whole)
    assert shown == [result]
    assert json.loads((tmp_path / "some.json").read_text()) == result
    assert (tmp_path / "some.png").read_bytes() == b"picture"
    with pytest.raises(SystemExit, match="nothing was measured"):
        bench.report.publish(tmp_path, {"benchmark": "none", "rows": []}, shown.append, lambda *_: None, whole)
    assert len(shown) == 1

    before = (tmp_path / "some.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        bench.report.publish(tmp_path, result | {"rows": [{}]}, shown.append, lambda *_: None, part)
    assert end.value.code == 1
    assert (tmp_path / "some.json").read_bytes() == before, "a part took the place of the whole"
    assert json.loads((tmp_path / "some-part.json").read_text())["rows"] == [{}]


def test_a_directory_that_cannot_be_written_to_is_refused_before_anything_is_measured(
    bench: ModuleType, tmp_path: Path
) -> None:
    bench.report.refuse_unusable(tmp_path / "new" / "directory")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="choose another directory with --out"):
        bench.report.refuse_unusable(tmp_path / "file")


def test_systems_that_train_differently_are_not_compared(bench: ModuleType) -> None:
    bench.overhead.refuse_different({"chaos": [2.0, 2.0], "mpi_flat": [2.0, 2.00001]})
    with pytest.raises(bench.jobs.JobError, match="chaos trained to other parameters"):
        bench.overhead.refuse_different({"chaos": [2.0, 2.1], "mpi_flat": [2.0, 2.0]})


def test_ratios_are_taken_within_a_round(bench: ModuleType) -> None:
    # The machine was ten times slower in the second round, for both.
    assert bench.report.paired_ratios([1.0, 10.0], [2.0, 20.0]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ({"median": 0.9, "ci_low": 0.8, "ci_high": 0.95}, "met"),
        ({"median": 0.99, "ci_low": 0.9, "ci_high": 1.1}, "met?"),
        ({"median": 1.2, "ci_low": 1.1, "ci_high": 1.3}, "missed"),
        ({"median": 1.01, "ci_low": 0.9, "ci_high": 1.1}, "missed?"),
    ],
)
def test_a_verdict_says_when_it_is_in_doubt(bench: ModuleType, ratio: dict[str, float], words: str) -> None:
    assert bench.overhead.verdict(ratio, 1.0) == words


def test_a_result_file_is_strict_json(bench: ModuleType, tmp_path: Path) -> None:
    plotted: list[Path] = []
    files = bench.report.write(
        tmp_path / "new", "x", {"a": math.nan, "b": [1.23456789]}, lambda _, path: plotted.append(path)
    )
    assert json.loads(files[0].read_text()) == {"a": None, "b": [1.23457]}
    assert plotted == [tmp_path / "new" / "x.png"]


def test_a_result_names_no_host_and_no_path(bench: ModuleType) -> None:
    text = json.dumps(bench.report.started())
    assert "/" not in text
    assert set(bench.report.machine()) >= {"cores", "torch", "mpi4py", "openmpi"}


def test_a_recovery_is_split_along_the_survivor_that_came_last(bench: ModuleType) -> None:
    def sight(entered: float, detected: float, finished: float, shrink: float) -> dict[str, float]:
        return {
            "entered": entered, "detected": detected, "finished": finished,
            "revoke": 0.1, "shrink": shrink, "exchange": 2.0, "redo": 3.0,
        }  # fmt: skip

    early = sight(9.990, 10.002, 10.0161, shrink=9.0)  # waited in shrink for the other
    late = sight(10.008, 10.009, 10.0160, shrink=1.9)
    cost = bench.recovery.split(10.0, [early, late])
    assert cost["total"] == pytest.approx(16.1)
    assert cost["compute"] == pytest.approx(8.0)
    assert cost["net"] == pytest.approx(8.1)
    assert cost["without_redo"] == pytest.approx(5.1)
    assert cost["detect"] == pytest.approx(1.0)
    assert (cost["shrink"], cost["exchange"]) == (1.9, 2.0)


def test_no_compute_is_subtracted_when_all_were_waiting_before_the_kill(bench: ModuleType) -> None:
    waiting = {
        "entered": 9.0,
        "detected": 10.005,
        "finished": 10.010,
        "revoke": 0,
        "shrink": 1,
        "exchange": 1,
        "redo": 1,
    }
    cost = bench.recovery.split(10.0, [waiting, waiting])
    assert cost["compute"] == 0.0
    assert cost["net"] == cost["total"] == pytest.approx(10.0)
    assert cost["detect"] == pytest.approx(5.0)


def test_models_have_the_sizes_they_are_named_after(bench: ModuleType) -> None:
    sizes = {key: bench.models.parameters(w.build()) for key, w in bench.models.WORKLOADS.items()}
    assert sizes["digits"] < 100_000
    assert sizes["10m"] == pytest.approx(10e6, rel=0.05)
    assert sizes["50m"] == pytest.approx(50e6, rel=0.05)


def test_the_table_of_recoveries_is_whole_on_eighty_columns(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    kills = [
        {"system": system, "size": size, "total": 12345.6, "net": 1234.5, "without_redo": 1111.1}
        | dict.fromkeys(bench.recovery.PARTS, 987.6)
        for system in bench.recovery.SYSTEMS for size in (2, 16)
    ]  # fmt: skip
    rows = bench.recovery.summarise(kills)
    target = {"median_ms": 1111.1, "with_redo_ms": 1234.5, "met": False}
    bench.recovery.table({"rows": rows, "target": target, "failures": []})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]
    words = ("ranks", "total", "compute", "detect", "shrink", "exchange", "redo", "net", "p90")
    (head,) = [line for line in lines if line.split()[:1] == ["ranks"]]
    assert [word for word in words if word not in head.split()] == []
    assert sum(line.count("12346") for line in lines) == 4
    assert sum(line.count("987.6") for line in lines) == 4 * 5


# -- leaves ---------------------------------------------------------------------------------------------------


def test_a_passage_is_what_the_event_log_tells(bench: ModuleType) -> None:
    parts = {"gather_ms": 4.0, "negotiate_ms": 1.0, "communicator_ms": 2.0, "commit_ms": 3.0, "adopt_ms": 0.5}
    stays = bench.events.passage({"mono": 10.0, "milliseconds": 6.0, **parts})
    assert stays == pytest.approx(
        {"arrived": 9.9895, "known": 9.9935, "decided": 9.9945, "changed": 9.9965, "committed": 9.9995, "adopted": 10.0}
    )
    del parts["adopt_ms"]
    goes = bench.events.passage({"mono": 9.9995, "milliseconds": 6.0, **parts})
    assert goes == pytest.approx({name: at for name, at in stays.items() if name != "adopted"})


def test_parts_lead_from_the_last_at_one_point_to_the_last_at_the_next(bench: ModuleType) -> None:
    quick = {"arrived": 1.0, "known": 3.1, "decided": 3.2, "changed": 3.3, "committed": 3.6, "adopted": 3.7}
    slow = {"arrived": 3.0, "known": 3.2, "decided": 3.3, "changed": 3.5, "committed": 3.9}
    cost = bench.events.split(0.5, [quick, slow])
    assert [cost[part] for part in bench.events.PARTS] == pytest.approx([2500.0, 200.0, 100.0, 200.0, 400.0, 100.0])
    assert cost["handled"] == pytest.approx(700.0)
    assert cost["boundary"] == pytest.approx(900.0)
    assert cost["total"] == pytest.approx(3400.0)
