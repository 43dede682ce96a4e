"""What the launcher prints, also when nobody reads it any more: the terminal was closed, or the reader has ended."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, NoReturn

from chaos_mpi.cli.outcome import EXIT_USAGE


def say(text: str) -> None:
    """Print a line of ``chaosrun`` itself on stderr."""
    write(sys.stderr, f"chaosrun: {text}\n".encode(errors="replace"))


def refuse(reason: str) -> NoReturn:
    """End ``chaosrun``, because of its arguments or of what is here to run jobs with."""
    say(reason)
    sys.exit(EXIT_USAGE)


def write(target: IO[str], data: bytes) -> None:
    """Write, and drop what cannot be written: a job is not to end otherwise because nobody sees it."""
    try:
        target.flush()
        target.buffer.write(data)  # type: ignore[attr-defined]
        target.buffer.flush()  # type: ignore[attr-defined]
    except ValueError:
        return  # it is closed
    except OSError:
        # What is left in the buffer would fail again when Python ends, which would change the exit status.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, target.fileno())
            os.close(nowhere)
            target.flush()
