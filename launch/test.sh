#!/usr/bin/env bash
# Everything that has to hold: style, types, unit tests, collective tests on 4 ranks, real jobs with real kills.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
set_up "[test,dev]"
export OMP_NUM_THREADS=1

echo "== ruff"
ruff check .
echo "== mypy --strict"
mypy --strict chaos_mpi
(cd benchmarks && MYPYPATH=.:.. mypy --config-file ../pyproject.toml --explicit-package-bases ./*.py baselines/*.py)
echo "== unit tests"
timeout 900 python -m pytest tests/unit
echo "== collective tests on 4 ranks"
root=()
[ "$(id -u)" -ne 0 ] || root=(--allow-run-as-root)
timeout 300 mpirun --with-ft ulfm --oversubscribe "${root[@]}" -n 4 python -m pytest --with-mpi tests/collective
echo "== fault tests: real jobs, real kills (about twelve minutes on two cores)"
timeout 2400 python -m pytest tests/faults
echo "== network test bed (skipped without root)"
timeout 1200 python -m pytest tests/testbed
echo "== the demonstration"
timeout 240 python launch/demo.py --kill-at-step 100
