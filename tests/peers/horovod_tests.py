"""Runs Horovod's own tests for torch, unchanged, against ``chaos_mpi.horovod.torch``.

    python tests/peers/horovod_tests.py PATH_OF_A_HOROVOD_CHECKOUT [--ranks 2 --ranks 4]

The checkout is one of v0.28.1 (https://github.com/horovod/horovod); its package need not be built, and is not imported:
the names ``horovod.torch`` and so on stand for the modules of this package. A test has passed if it has on every rank.
The exit status is 0 if at least 95 % of the tests that apply pass, on every number of ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import pytest

REQUIRED_SHARE = 0.95
RUN_LIMIT_S = 500
TEST_LIMIT_S = 90
#: What is imported under Horovod's names.
MODULES = (
    "common", "common.exceptions", "torch", "torch.compression", "torch.elastic", "torch.elastic.sampler",
    "torch.elastic.state", "torch.functions", "torch.mpi_ops", "torch.optimizer", "torch.sync_batch_norm",
)  # fmt: skip
#: Test files, and the numbers of ranks that they are for (all if there are none).
FILES: dict[str, tuple[int, ...]] = {
    "test/parallel/test_torch.py": (),
    "test/parallel/test_adasum_pytorch.py": (),
    "test/single/test_torch_elastic.py": (1,),
}
#: Tests that do not apply, and why.
NOT_APPLICABLE = {
    "test_timeline_api": "looks for events inside Horovod's coordinator; start_timeline says to use the event log",
    "test_broadcast_state_gpu": "Horovod skips it always",
}
_RACE = "passes mostly: demands that each rank waits for 5 s on its own clock, which it may begin to read late"
#: Tests that do not pass, and why.
NOT_PASSED = {
    "test_broadcast_state_no_grad": "expects gradients of zeros, which Horovod's broadcast of an empty optimizer state "
    "leaves behind because it takes a step with them; no step is taken here",
    "test_global_barrier_op": _RACE,
    "test_process_set_barrier_op": _RACE,
}
#: Tests of GPUs skip themselves; by these words their skips are told from others that would hide something.
SKIPS_OF_OTHERS = ("No GPUs available", "Gloo is not available", "GPU", "CCL", "NCCL", "Number of ranks is 1")


@dataclasses.dataclass
class Outcome:
    """What became of one test."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: str = ""
    text: str = ""


class Recorder:
    """A plugin of pytest that writes down what became of each test."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def pytest_runtest_setup(self) -> None:
        """The ranks begin each test together, also if one of them has failed in the one before it."""
        hvd = sys.modules["horovod.torch"]
        if hvd.is_initialized():
            hvd.join()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test is over."""
        if report.when == "call" or report.outcome != "passed":
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext[-3000:]
            line = {"name": report.nodeid.rpartition("::")[2], "outcome": report.outcome, "reason": reason}
            self._file.write(json.dumps(line) + "\n")


def alias() -> None:
    """Let ``import horovod.torch`` find this package."""
    import torch

    sys.modules["horovod"] = importlib.import_module("chaos_mpi.horovod")
    for name in MODULES:
        sys.modules[f"horovod.{name}"] = importlib.import_module(f"chaos_mpi.horovod.{name}")
    # What the tests' own helpers import, and do not need for these tests.
    sys.modules.setdefault("mock", importlib.import_module("unittest.mock"))
    sys.modules.setdefault("cloudpickle", importlib.import_module("pickle"))
    for name in ("runner", "runner.util", "runner.util.threads"):
        sys.modules[f"horovod.{name}"] = types.ModuleType(f"horovod.{name}")
    sys.modules["horovod.runner.util.threads"].in_thread = None  # type: ignore[attr-defined]
    # A name that the tests use, which torch had until 2.0.
    if not hasattr(torch, "FatalError"):
        torch.FatalError = RuntimeError  # type: ignore[attr-defined]
    # The tests try all of torch's optimizers on a model with biases, and this one, which is newer, refuses them.
    if hasattr(torch.optim, "Muon"):
        torch.optim.Muon.__module__ = "torch_optimizers_of_matrices"


def run_here(test: Path, results: Path) -> int:
    """One rank's part."""
    alias()
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    options = [
        "-q", "-p", "no:cacheprovider", "--rootdir", str(test.parent), f"--timeout={TEST_LIMIT_S}",
        "--timeout-method=thread", "--disable-warnings",
    ]  # fmt: skip
    for name in NOT_APPLICABLE:
        options += ["--deselect", f"{test.name}::TorchTests::{name}"]
    if only := os.environ.get("ONLY"):
        options += ["-k", only]
    status = int(pytest.main([*options, str(test)], plugins=[Recorder(results / f"rank-{rank}.jsonl")]))
    # Failed tests are no failure of the rank, of which the others would be told.
    return 0 if status in (0, 1, 5) else status


def run_ranks(test: Path, ranks: int, show: bool) -> list[Outcome]:
    """Run the tests of one file on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mpirun", "--with-ft", "ulfm", "--oversubscribe", "-n", str(ranks), sys.executable, __file__]
        command += ["--results", folder, str(test)]
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        env = {
            **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CHAOS_TIMEOUT_S": "60",
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }  # fmt: skip
        began = time.monotonic()
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False)
            status, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            said = (part for part in (error.stdout, error.stderr) if part)  # bytes, whatever was asked for
            status, output = 124, "".join(p.decode(errors="replace") if isinstance(p, bytes) else p for p in said)
        print(f"\n{test.name} on {ranks} ranks: mpirun returned {status} after {time.monotonic() - began:.0f} s")
        if show or status:
            print(output[-6000:])
        return collect([read(Path(folder, f"rank-{rank}.jsonl")) for rank in range(ranks)], known_tests(test))


def known_tests(test: Path) -> list[str]:
    """The tests of a file, by name."""
    lines = test.read_text().splitlines()
    return sorted({line.split("def ")[1].split("(")[0] for line in lines if line.strip().startswith("def test_")})


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What one rank has written down, by test."""
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if found.get(entry["name"], {}).get("outcome") != "failed":
            found[entry["name"]] = entry
    return found


def collect(of_ranks: list[dict[str, dict[str, Any]]], names: list[str]) -> list[Outcome]:
    """What became of each test on all ranks together."""
    outcomes = []
    only = os.environ.get("ONLY", "")
    for name in names:
        if only and only not in name:
            continue
        outcome = Outcome(name)
        if name in NOT_APPLICABLE:
            outcome.skipped = NOT_APPLICABLE[name]
            outcomes.append(outcome)
            continue
        for rank, entries in enumerate(of_ranks):
            entry = entries.get(name, {"outcome": "failed", "reason": "the rank did not come so far"})
            if entry["outcome"] == "skipped":
                outcome.skipped = entry["reason"].removeprefix("Skipped: ")
            elif entry["outcome"] == "passed":
                outcome.passed += 1
            else:
                outcome.failed += 1
                outcome.text = outcome.text or f"rank {rank}: {entry['reason']}"
        outcomes.append(outcome)
    return outcomes


def report(title: str, outcomes: list[Outcome]) -> tuple[int, int]:
    """Print what became of the tests; how many apply, and how many of them passed."""
    passed = failed = 0
    for outcome in outcomes:
        if outcome.failed or (outcome.skipped and outcome.passed):
            failed += 1
            print(f"  FAILED  {outcome.name}: {NOT_PASSED.get(outcome.name, 'not known before')}\n{outcome.text}")
        elif outcome.name in NOT_APPLICABLE or any(words in outcome.skipped for words in SKIPS_OF_OTHERS):
            print(f"  n/a     {outcome.name}: {outcome.skipped}")
        elif outcome.skipped:
            failed += 1
            print(f"  FAILED  {outcome.name}: skipped, and it is not known why it may be: {outcome.skipped}")
        else:
            passed += 1
    print(f"{title}: {passed} of {passed + failed} that apply passed, {len(outcomes) - passed - failed} do not apply")
    return passed + failed, passed


def main() -> int:
    """Run all, or one rank's part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--ranks", type=int, action="append", help="may be repeated; default: 2 and 4")
    parser.add_argument("--show", action="store_true", help="show what the ranks have printed")
    parser.add_argument("--file", help="only this test file")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.results is not None:
        return run_here(args.path, args.results)
    good = True
    for ranks in args.ranks or [2, 4]:
        apply = passed = 0
        for file, sizes in FILES.items():
            test = args.path / file
            if args.file not in (None, test.name):
                continue
            if not test.exists():
                raise SystemExit(f"there is no {file} in {args.path}: it has to be a checkout with Horovod's tests")
            outcomes = run_ranks(test, sizes[0] if sizes else ranks, args.show)
            of_file = report(test.name, outcomes)
            apply, passed = apply + of_file[0], passed + of_file[1]
        share = passed / max(apply, 1)
        print(f"\n{ranks} ranks: {passed} of {apply} tests that apply passed ({100 * share:.1f} %)")
        good &= share >= REQUIRED_SHARE
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
