#!/usr/bin/env bash
# Everything that has to hold: style, types, unit tests, collective tests on 4 ranks, real jobs with real kills.
# usage: test.sh [--all]   (also the tests in tests/variants.txt, which are nearly the same as others: about 45 minutes more)
set -euo pipefail
if [ "$*" != "" ] && [ "$*" != --all ]; then
    echo "test.sh takes nothing but --all, not: $*" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
. launch/setup.sh
set_up "[test,dev]"
export OMP_NUM_THREADS=1
# Below, timeout leaves commands in this process group ("--foreground"), so that Ctrl-C reaches them.
unset PYTHONDONTWRITEBYTECODE # or each of the hundreds of ranks compiles the package anew

echo "== ruff"
ruff check .
echo "== mypy --strict"
mypy --strict chaos_mpi
(cd benchmarks && MYPYPATH=.:.. mypy --config-file ../pyproject.toml --explicit-package-bases ./*.py baselines/*.py)
echo "== unit tests"
# Here and below several tests at a time: much of each is waiting. A failure is shown when it happens, not at the end.
many=(python -m pytest -q -n 3 --dist worksteal --instafail --durations 8)
[ "$*" = --all ] || many+=(--without-variants)
timeout --foreground 900 "${many[@]}" tests/unit
echo "== collective tests on 4 ranks"
root=()
[ "$(id -u)" -ne 0 ] || root=(--allow-run-as-root)
timeout --foreground 300 mpirun --with-ft ulfm --oversubscribe "${root[@]}" -n 4 python -m pytest -q --with-mpi tests/collective
echo "== fault tests: real jobs, real kills (10 to 15 minutes on two cores)"
timeout --foreground 2400 "${many[@]}" tests/faults
echo "== network test bed (skipped without root)"
timeout --foreground 1200 "${many[@]}" tests/testbed
echo "== the demonstration"
timeout --foreground 240 python launch/demo.py --kill-at-step 100
echo "== Horovod, Lightning and transformers (skipped where they are not installed; Horovod is with CHAOS_TEST_HOROVOD=1)"
if [ -n "${CHAOS_TEST_HOROVOD:-}" ]; then
    timeout --foreground 1800 bash launch/install_horovod.sh || echo "Horovod could not be installed (see above), so its tests are skipped" >&2
fi
timeout --foreground 900 "${many[@]}" tests/horovod_jobs
