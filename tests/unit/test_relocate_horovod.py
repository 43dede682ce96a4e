"""Horovod's library finds MPI and torch in the environment that it is installed in."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from launch.relocate_horovod import relocated

PLACE = Path(sysconfig.get_path("platlib")) / "horovod" / "torch"
GONE = b"/somewhere/else/that/is/gone/.venv/lib:/somewhere/else/that/is/gone/.venv/lib/python3/site-packages/torch/lib"


def test_the_runpath_is_replaced_and_nothing_moves() -> None:
    library = b"\x7fELF\0libc.so\0" + GONE + b"\0symbol\0" + bytes(range(256))
    new = relocated(library, PLACE)
    assert len(new) == len(library)
    start = library.index(GONE)
    assert (new[:start], new[start + len(GONE) :]) == (library[:start], library[start + len(GONE) :])
    paths = new[start : start + len(GONE)].rstrip(b"\0").decode().split(":")
    found = [Path(path.replace("$ORIGIN", str(PLACE))).resolve() for path in paths]
    wanted = [Path(sys.prefix) / "lib", Path(sysconfig.get_path("platlib")) / "torch" / "lib"]
    assert found == [path.resolve() for path in wanted]
    assert relocated(new, PLACE) == new


@pytest.mark.parametrize("library", [b"\0/a/lib:/a/torch/lib\0", b"\0" + GONE + b"\0" + GONE + b"\0", b"\0/usr/lib\0"])
def test_what_does_not_fit_or_is_not_known_is_left_alone(library: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be changed"):
        relocated(library, PLACE)
