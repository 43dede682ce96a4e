"""Lets the installed Horovod find MPI and torch in its own environment: ``python launch/relocate_horovod.py``.

The linker has written down where they were in the environment in which the package was built (its RUNPATH, ELF gABI
chapter 5), which may be gone. Paths relative to the library itself are put in their place; they have to fit into it.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

#: Two directories, one of them torch's.
_RUNPATH = re.compile(rb"(?<=\0)(/[^\0:]+/lib:/[^\0:]+/torch/lib)\0")


def relocated(library: bytes, directory: Path) -> bytes:
    """The library, which lies in this directory, with a RUNPATH that holds in this environment.

    Raises:
        ValueError: it has none that is known, or there is no room.
    """
    wanted = (Path(sys.prefix) / "lib", Path(sysconfig.get_path("platlib")) / "torch" / "lib")
    new = b":".join(f"$ORIGIN/{os.path.relpath(path, directory)}".encode() for path in wanted)
    if new in library:
        return library
    found = _RUNPATH.findall(library)
    if len(found) != 1 or len(new) > len(found[0]):
        raise ValueError(f"its RUNPATH cannot be changed to {new.decode()}; it has {[old.decode() for old in found]}")
    return library.replace(found[0], new.ljust(len(found[0]), b"\0"))


def main() -> None:
    """Do it, or say in a line why not."""
    try:
        relocate()
    except (PackageNotFoundError, ValueError) as error:
        sys.exit(f"relocate_horovod: {error}")


def relocate() -> None:
    """Change the libraries of the Horovod that is installed here.

    Raises:
        PackageNotFoundError: there is none.
        ValueError: see :func:`relocated`.
    """
    for file in distribution("horovod").files or []:
        path = Path(str(file.locate()))
        if path.name.startswith("mpi_lib_v2") and path.suffix == ".so":
            old = path.read_bytes()
            new = relocated(old, path.parent)
            if new != old:
                changed = path.with_suffix(".new")  # the old one may be in use
                changed.write_bytes(new)
                changed.chmod(path.stat().st_mode)
                changed.replace(path)


if __name__ == "__main__":
    main()
