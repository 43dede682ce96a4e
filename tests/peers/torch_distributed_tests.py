"""Runs torch's own tests of ``torch.distributed``, which come with torch, on the backend ``chaos``.

    python tests/peers/torch_distributed_tests.py --ranks 4

The tests are those that torch runs for Gloo and MPI, its backends for CPU tensors. Each is torch's method, unchanged;
what torch does in processes of its own, the ranks of one MPI job do here (``pip install expecttest`` first). When a
test fails, or does not end, the job is given up, and another one goes on with the next test. The exit status is 0 if at
least 95 % of the tests that apply have passed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import unittest
from datetime import timedelta
from pathlib import Path
from typing import Any

REQUIRED = 0.95
HERE = Path(__file__).resolve()
#: A pattern of names, and why these do not apply.
NOT_APPLICABLE: dict[str, str] = {
    ".*_(cuda|nccl)(_.*)?": "for CUDA tensors, or NCCL",
    "test_nccl_.*": "for CUDA tensors, or NCCL",
    "test_SyncBatchNorm_process_group": "needs torchvision",
    "test_sparse_all_reduce_sum": "for sparse tensors, which of torch's backends Gloo alone takes",
    "test_barrier_timeout_global": "a rank that lives and does not come to a call of the default group ends the job",
}
#: Tests for CPU tensors that torch runs for its MPI backend alone.
ALSO_OF_MPI = "test_all_to_all.*"
#: Tests that look at the name of their backend, to choose between CPU and CUDA tensors.
BY_NAME = "test_accumulate_gradients_.*"
#: As torch gives for tests that take longer than others, seconds.
SLOW_S = {"test_ddp_uneven_inputs": 300.0}


def main() -> int:
    """Run the tests; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--match", default="", help="only tests whose names contain this regular expression")
    parser.add_argument("--limit-s", type=float, default=60.0, help="longest time for one test")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(args.worker)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the job
    with tempfile.TemporaryDirectory(prefix="chaos-torch-tests-") as folder:
        return drive(Path(folder), args.ranks, args.match, args.limit_s)


# -- the job that runs tests, seen from outside ----------------------------------------------------------


def drive(folder: Path, ranks: int, match: str, limit_s: float) -> int:
    """Start jobs until all tests have been run, and tell what came of them."""
    prepare(folder, ranks)
    tests = sorted(name for name in dir(torch_tests().DistributedTest._DistTestBase) if name.startswith("test_"))
    tests = [name for name in tests if re.search(match, name)]
    outcomes: dict[str, tuple[str, str]] = {}
    for name in tests:
        for pattern, reason in NOT_APPLICABLE.items():
            if re.fullmatch(pattern, name):
                outcomes[name] = ("does not apply", reason)
    while waiting := [name for name in tests if name not in outcomes]:
        run_job(folder, ranks, waiting, limit_s, outcomes)
    return report(outcomes)


def run_job(folder: Path, ranks: int, tests: list[str], limit_s: float, outcomes: dict[str, tuple[str, str]]) -> None:
    """Run tests in one job until one of them breaks it."""
    (folder / "tests.json").write_text(json.dumps({"tests": tests, "limit_s": limit_s}))
    shutil.rmtree(folder / "results", ignore_errors=True)
    (folder / "results").mkdir()
    command = [sys.executable, "-m", "chaos_mpi.cli.chaosrun", "-n", str(ranks), str(HERE), "--worker", str(folder)]
    with open(folder / "output.txt", "wb") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        for name in tests:
            allowed = time.monotonic() + SLOW_S.get(name, limit_s) + (120.0 if name == tests[0] else 0.0)
            paths = [folder / "results" / f"{name}.{rank}" for rank in range(ranks)]
            while not all(path.exists() for path in paths):
                if any(told(path).get("outcome") == "failed" for path in paths):
                    break
                if job.poll() is not None or time.monotonic() > allowed:
                    break
                time.sleep(0.02)
            outcomes[name] = judged([told(path) for path in paths], job.poll(), folder)
            print(f"{outcomes[name][0]:>14}  {name}  {outcomes[name][1]}", flush=True)
            if outcomes[name][0] == "failed":
                if job.poll() is None and not any(told(path) for path in paths):
                    print((folder / "output.txt").read_text(errors="replace")[-20_000:])  # where each rank hangs
                return
    finally:
        end(job)


def told(path: Path) -> dict[str, Any]:
    """What a rank has reported of a test, if it has."""
    return json.loads(path.read_text()) if path.exists() else {}


def judged(reports: list[dict[str, Any]], status: int | None, folder: Path) -> tuple[str, str]:
    """What came of a test, and why."""
    failed = [(rank, r["why"]) for rank, r in enumerate(reports) if r.get("outcome") == "failed"]
    if failed:
        return "failed", f"rank {failed[0][0]}: {failed[0][1]}"
    silent = [rank for rank, r in enumerate(reports) if not r]
    if silent and status is not None:
        text = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
        return "failed", f"the job ended with status {status}: {text[-1] if text else ''}"
    if silent:
        return "failed", f"ranks {silent} did not come to its end in time"
    skipped = [r["why"] for r in reports if r["outcome"] == "skipped"]
    return ("does not apply", skipped[0]) if skipped else ("passed", "")


def end(job: subprocess.Popen[bytes]) -> None:
    """Make sure that nothing of a job is left."""
    if job.poll() is None:
        job.send_signal(signal.SIGTERM)
        try:
            job.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def report(outcomes: dict[str, tuple[str, str]]) -> int:
    """Print the result; the exit status."""
    by_kind: dict[str, list[str]] = {"passed": [], "failed": [], "does not apply": []}
    for name, (kind, _) in outcomes.items():
        by_kind[kind].append(name)
    print("\nDo not apply:")
    reasons: dict[str, list[str]] = {}
    for name in by_kind["does not apply"]:
        reasons.setdefault(outcomes[name][1], []).append(name)
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names):4d}  {reason}: {', '.join(names)}")
    print("\nFailed:")
    for name in by_kind["failed"]:
        print(f"  {name}: {outcomes[name][1]}")
    passed, applicable = len(by_kind["passed"]), len(by_kind["passed"]) + len(by_kind["failed"])
    share = passed / applicable if applicable else 1.0
    print(f"\n{passed} of {applicable} tests that apply have passed ({100 * share:.1f} %), {len(outcomes)} in all")
    return 0 if share >= REQUIRED else 1


# -- one rank --------------------------------------------------------------------------------------------


def prepare(folder: Path, ranks: int) -> None:
    """Set what torch's tests read from the environment when they are imported."""
    os.environ.update(
        BACKEND="gloo",  # which tests there are
        WORLD_SIZE=str(ranks),
        TEMP_DIR=str(folder),
        INIT_METHOD=f"file://{folder}/init",
        MASTER_ADDR="localhost",
    )


def torch_tests() -> types.ModuleType:
    """Torch's module."""
    from torch.testing._internal.distributed import distributed_test

    return distributed_test


def work(folder: Path) -> int:
    """Run the tests as one rank; ends with the first that fails."""
    import chaos_mpi
    import chaos_mpi.torch

    session = chaos_mpi.init(timeout_s=3600.0)  # the limits of the tests are the driver's
    import torch.distributed as dist

    prepare(folder, session.size)
    module = torch_tests()
    if session.size > 2:
        os.environ["BACKEND"] = "mpi"  # for tests with the group of ranks 1 and 2, torch asks Gloo for eight ranks
    dist.monitored_barrier = chaos_mpi.torch.monitored_barrier  # torch's takes Gloo alone, by name
    case = type("TestDistBackendWithMpi", (module.TestDistBackend, module.DistributedTest._DistTestBase), {})
    told_to = json.loads((folder / "tests.json").read_text())
    for name in told_to["tests"]:
        begun = time.monotonic()
        faulthandler.dump_traceback_later(0.9 * SLOW_S.get(name, told_to["limit_s"]))
        outcome, why = run_test(module, case, name, folder, session)
        faulthandler.cancel_dump_traceback_later()
        path = folder / "results" / f"{name}.{session.rank}"
        seconds = round(time.monotonic() - begun, 3)
        new = folder / f"new.{session.rank}"
        new.write_text(json.dumps({"outcome": outcome, "why": why, "seconds": seconds}))
        new.rename(path)
        if outcome == "failed":
            os._exit(1)
    chaos_mpi.finalize()
    return 0


def run_test(module: types.ModuleType, case: Any, name: str, folder: Path, session: Any) -> tuple[str, str]:
    """One test, as torch's ``TestDistBackend._run`` does it."""
    import torch.distributed as dist
    from torch.testing._internal import common_distributed, common_utils

    method = getattr(case, name)
    if getattr(method, "__unittest_skip__", False) and not re.fullmatch(ALSO_OF_MPI, name):
        return "skipped", str(method.__unittest_skip_why__)
    temporary = folder / f"of-{name}"
    if session.rank == 0:
        for part in ("barrier", "test_dir", "init_dir"):
            (temporary / part).mkdir(parents=True, exist_ok=True)
    os.environ["TEMP_DIR"] = str(temporary)
    module.Barrier.barrier_id = 0
    module.BACKEND = "mpi" if re.fullmatch(BY_NAME, name) else "chaos"
    session.barrier()
    test = case(name)
    test.rank, test.file_name = session.rank, str(temporary / "init_file")
    common_utils.set_rng_seed()
    try:
        limit = module.CUSTOM_PG_TIMEOUT.get(name, module.default_pg_timeout)
        dist.init_process_group(
            "chaos", init_method=test.init_method, world_size=session.size, rank=session.rank,
            timeout=timedelta(seconds=limit),
        )  # fmt: skip
        getattr(test, name)()
        if dist.is_initialized():
            dist.destroy_process_group()
    except unittest.SkipTest as skip:
        if dist.is_initialized():
            dist.destroy_process_group()
        return "skipped", str(skip)
    except SystemExit as exit_:
        if dist.is_initialized():
            dist.destroy_process_group()
        reasons = {skip.exit_code: skip.message for skip in common_distributed.TEST_SKIPS.values()}
        if exit_.code in reasons:
            return "skipped", reasons[exit_.code]
        return "failed", f"exit with {exit_.code}"
    except BaseException as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "passed", ""


if __name__ == "__main__":
    sys.exit(main())
