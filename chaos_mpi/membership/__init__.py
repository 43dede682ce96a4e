"""Who takes part, and how members decide what happens next. Pure: no I/O, no clock, no MPI."""

from chaos_mpi.membership.changes import Changes
from chaos_mpi.membership.hosts import HostList, HostSlots, host_of, on_host
from chaos_mpi.membership.negotiation import (
    MOVES,
    Agenda,
    Join,
    Limits,
    Outcome,
    Proposal,
    cut_is_due,
    negotiate,
    orphaned,
    restart,
    those_that_go,
    with_stayers,
)
from chaos_mpi.membership.progress import Decision, Report, decide
from chaos_mpi.membership.restarts import Crash, Restart
from chaos_mpi.membership.view import View

__all__ = [
    "MOVES",
    "Agenda",
    "Changes",
    "Crash",
    "Decision",
    "HostList",
    "HostSlots",
    "Join",
    "Limits",
    "Outcome",
    "Proposal",
    "Report",
    "Restart",
    "View",
    "cut_is_due",
    "decide",
    "host_of",
    "negotiate",
    "on_host",
    "orphaned",
    "restart",
    "those_that_go",
    "with_stayers",
]
