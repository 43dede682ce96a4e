"""The one session that is open in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos_mpi.errors import NoSessionError

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session

_current: Session | None = None


def current_session() -> Session:
    """The open session.

    Raises:
        NoSessionError: :func:`chaos_mpi.init` has not been called, or the session was closed.
    """
    if _current is None:
        raise NoSessionError("no session is open: call chaos_mpi.init() first")
    return _current


def current_session_or_none() -> Session | None:
    """The open session, or None."""
    return _current


def remember(session: Session) -> None:
    """This one is open from now on."""
    global _current
    _current = session


def forget(session: Session) -> None:
    """This one is not open any more."""
    global _current
    if _current is session:
        _current = None
