# Sourced by demo.sh and test.sh: makes .venv in the repository and installs the package into it.
# usage: set_up EXTRAS   (for example: set_up "[demo]"); leaves the environment active.

set_up() {
    local extras="$1" root stamp wanted python=""
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            python="$candidate"
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "Python 3.11 or newer is needed. Install it (on Debian: apt-get install python3 python3-venv), or set PYTHON." >&2
        return 1
    fi
    # An attempt without the package for ensurepip leaves a python behind, and no activate.
    local clear=()
    [ ! -f "$root/.venv/pyvenv.cfg" ] || clear=(--clear)
    if [ ! -f "$root/.venv/bin/activate" ] && ! "$python" -m venv "${clear[@]}" "$root/.venv"; then
        echo "A virtual environment could not be made. On Debian: apt-get install python3-venv" >&2
        return 1
    fi
    # shellcheck disable=SC1091
    . "$root/.venv/bin/activate"
    stamp="$root/.venv/installed-$(printf '%s' "$extras" | tr -c 'a-z' '-')"
    wanted="$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | sha256sum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing into .venv (the first time this takes a few minutes) ..."
        python -m pip install --quiet --disable-pip-version-check \
            --constraint "$root/launch/constraints.txt" --editable "$root$extras" || return 1
        printf '%s' "$wanted" >"$stamp"
    fi
}
