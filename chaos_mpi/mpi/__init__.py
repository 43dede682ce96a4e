"""The engine: the only package that imports mpi4py.

:mod:`.runtime` starts and ends MPI, :mod:`.world` is one communicator and what may be asked of it
(reduce, revoke, shrink, agree), :mod:`.launch` holds the launch settings and needs no MPI.
"""

import contextlib

# Before the first import of mpi4py.MPI anywhere in the package: initialising and finalizing are runtime's business.
with contextlib.suppress(ImportError):
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
