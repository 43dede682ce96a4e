"""Who takes part, and how survivors decide where to go on. Pure: no I/O, no clock, no MPI."""

from chaos_mpi.membership.progress import Decision, Report, decide
from chaos_mpi.membership.view import View

__all__ = ["Decision", "Report", "View", "decide"]
