"""One session for all tests of a rank: MPI starts and ends once in a process.

Run with ``mpirun --with-ft ulfm -n 4 python -m pytest --with-mpi tests/collective``; plain pytest skips these tests.
"""

from __future__ import annotations

import os

import pytest

import chaos_mpi

TIMEOUT_S = 30.0


def pytest_sessionstart(session: pytest.Session) -> None:
    """Open the session before pytest-mpi asks MPI for the number of ranks, since that would start MPI."""
    if session.config.getoption("--with-mpi") and "OMPI_COMM_WORLD_SIZE" in os.environ:
        chaos_mpi.init(timeout_s=TIMEOUT_S)


def pytest_unconfigure() -> None:
    """Close it when pytest-mpi has printed what it says about MPI."""
    from chaos_mpi.elastic.current import current_session_or_none

    if current_session_or_none() is not None:
        chaos_mpi.finalize()


@pytest.fixture
def session() -> chaos_mpi.Session:
    """The session of this rank."""
    return chaos_mpi.current_session()
