#!/usr/bin/env python3
"""Becomes a rank in a host of a test bed; ``mpirun`` and ``Spawn`` start it in the place of the rank.

    rank_host.py BED [--host HOST] -- COMMAND ...

Without ``--host``, rank r goes to host number r modulo the number of hosts. The process that MPI started becomes the
rank (``exec`` all the way), so signals and exit codes are the rank's own.
"""

from __future__ import annotations

import argparse
import os
import sys

from testbed import TestBed, TestBedError


def main() -> None:
    """Find the host and become the command."""
    parser = argparse.ArgumentParser(description="Runs a rank in a host of a test bed.")
    parser.add_argument("bed")
    parser.add_argument("--host", help="default: the rank's number modulo the number of hosts")
    parser.add_argument("argv", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMIX_RANK") or "0"
    try:
        bed = TestBed.attach(options.bed)
        argv = bed.command(options.host or bed.hosts[int(rank) % len(bed.hosts)], options.argv)
    except TestBedError as error:
        sys.exit(f"rank_host: {error}")
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main()
