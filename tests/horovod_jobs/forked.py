"""Runs scripts that import the same packages, each in a process of its own: ``forked.py PACKAGE ... < SCRIPTS.json``.

The packages, which take seconds to import, are imported once, and a process is forked from that for each script; what
a script starts (MPI, Horovod, threads), it starts itself. ``SCRIPTS.json`` has scripts by name. Prints, as JSON, the
exit status and the standard error of each by its name.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile

LIMIT_S = 120


def main() -> None:
    """Run them one after the other. In a forked process this returns, or raises, as the script does."""
    scripts: dict[str, str] = json.load(sys.stdin)
    for package in sys.argv[1:]:
        importlib.import_module(package)
    outcomes = {}
    for name, script in scripts.items():
        with tempfile.TemporaryFile() as errors:
            pid = os.fork()
            if pid == 0:
                signal.alarm(LIMIT_S)  # which kills, unless the script says otherwise
                os.dup2(errors.fileno(), sys.stdout.fileno())
                os.dup2(errors.fileno(), sys.stderr.fileno())
                exec(compile(script, name, "exec"), {"__name__": "__main__"})
                return
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            errors.seek(0)
            outcomes[name] = (status, errors.read().decode(errors="replace"))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
