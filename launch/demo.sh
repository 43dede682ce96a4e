#!/usr/bin/env bash
# The main job: trains on 4 ranks, kills one of them with SIGKILL, and shows that nothing was lost.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
. "$here/setup.sh"
set_up "[demo]"
exec python "$here/demo.py" "$@"
