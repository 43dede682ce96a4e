"""``python terminal.py FILE COMMAND ...``: runs a command in a terminal of its own, which is closed when FILE is there.

What the command prints until then is printed. Ends as the command does, with 128 and the number of a signal more.
"""

from __future__ import annotations

import os
import pty
import select
import sys
from pathlib import Path


def main() -> None:
    closing, command = Path(sys.argv[1]), sys.argv[2:]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    while not closing.exists():
        if select.select([terminal], [], [], 0.02)[0]:
            try:
                os.write(1, os.read(terminal, 65536))
            except OSError:
                break  # the command has ended
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
