"""Whether ``mpirun`` still serves this rank: without it no rank can be spawned, and a spawn waits for ever.

The supervisor holds the other end of a pipe and closes it when ``mpirun`` has gone; so what a rank sees needs no
file and cannot be out of date.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping

#: Tells a rank its end of the pipe: descriptor and inode, which tells it from a later file with that number.
VARIABLE = "CHAOS_LAUNCHER_PIPE"


class LauncherPipe:
    """The supervisor's side.

    Attributes:
        descriptor: the end for the rank, to be passed on to it and then closed here with :meth:`passed_on`.
    """

    def __init__(self) -> None:
        self.descriptor, self._ours = os.pipe()
        self._open = True

    def variables(self) -> dict[str, str]:
        """What the rank is to have in its environment."""
        return {VARIABLE: f"{self.descriptor}:{os.fstat(self.descriptor).st_ino}"}

    def passed_on(self) -> None:
        """The rank has its end."""
        os.close(self.descriptor)

    def close(self) -> None:
        """Tell the rank that ``mpirun`` has gone."""
        if self._open:
            self._open = False
            os.close(self._ours)


def is_lost(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank that has outlived its ``mpirun``; False also where nobody would tell it."""
    number, _, inode = environ.get(VARIABLE, "").partition(":")
    if not number:
        return False
    try:
        if os.fstat(int(number)).st_ino != int(inode):
            return False
        readable, _, _ = select.select([int(number)], [], [], 0)
    except (OSError, ValueError):
        return False
    return bool(readable)
