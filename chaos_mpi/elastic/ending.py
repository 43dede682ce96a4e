"""How a session ends when training does not end it: cut off, stuck, too few, crashed."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from chaos_mpi.agent.launcher import is_lost
from chaos_mpi.elastic.changes import ChangingSession
from chaos_mpi.elastic.lifecycle import say_once, write_record
from chaos_mpi.errors import CutOffError, NoSessionError, TooFewRanksError, WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos_mpi.elastic.control import ControlSocket


class EndingSession(ChangingSession):
    """What a session does when it has to end, and what it leaves behind. The session itself sets the attributes."""

    _control: ControlSocket | None
    _ended: bool
    _rollbacks: list[Callable[[], None]]

    def close_quietly_at_exit(self) -> None:
        """A script that just ends is closed without a word."""
        self._guard.is_quiet = True

    def on_rollback(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` before an emergency save: it takes back what the unfinished step changed."""
        self._rollbacks.append(undo)

    @property
    def ends_well(self) -> bool:
        """Whether the session is open in this process, and no failing exit of it is under way."""
        return not self._ended and self._guard.is_at_home and not self._guard.failing

    def let_error_go_on(self) -> None:
        """Raise the exception under way, if there is one: this rank has failed, or it leaves.

        To be called by whatever ends the session in good order, before anything that all members do together: scripts
        call that in ``finally`` blocks, while the others are at something else, and are to train on.
        """
        if (error := sys.exc_info()[1]) is not None:
            raise error

    def fail(self, error: Exception) -> NoReturn:
        """End this rank by an error that nobody can catch, as those at the end of a script; the others train on."""
        self._guard.fail(error)

    def give_up(self, error: WaitTimeoutError) -> NoReturn:
        """A wait reached its limit: save the state and end the whole job."""
        message = (
            f"{error} (host {self.host}, rank {self.rank} of {self.size}, step {self.step}). A member is stuck or cut "
            f"off, so the whole job ends. {self._save_emergency_state()} If steps can take that long, raise --timeout."
        )
        self._end("failed", message, "")
        say_once(self.settings.run_dir, WaitTimeoutError(message))
        if is_lost():  # MPI would wait for mpirun to do it
            os.kill(os.getpid(), signal.SIGKILL)
        self._sequence.world.abort(1)
        raise WaitTimeoutError(message) from error

    def cut_off(self, error: CutOffError) -> NoReturn:
        """This member must not go on: of those that are cut off together one saves the state, and all end."""
        where = f"host {self.host}, rank {self.rank} of {self.size}, step {self.step}"
        saved = f" {self._save_emergency_state()}" if error.lowest else ""
        message = f"{error} ({where}). It stops, and whoever has the majority trains on without it.{saved}"
        self._end("cut off", message, "")
        raise CutOffError(message) from error

    def _stop_too_few(self, saver: int) -> NoReturn:
        """All survivors agree that the job cannot go on; the most advanced one saves the state and says so."""
        message = ""
        if self.rank == saver:
            message = (
                f"stopped at step {self.step}: {self.size} of {self.started_with} ranks are left, and min_ranks is "
                f"{self.settings.min_ranks} (host {self.host}). {self._save_emergency_state()}"
            )
        self._end("stopped", message, "")
        raise TooFewRanksError(message)

    def _save_emergency_state(self) -> str:
        for undo in self._rollbacks:
            undo()
        return self._persistence.save_emergency()

    def _crashed(self, message: str) -> None:
        if not self._ended:
            self._end("crashed", f"{message} (host {self.host}, rank {self.rank}, step {self.step})", "")

    def _failed_afterwards(self, message: str) -> None:
        where = f"host {self.host}, rank {self.rank}"
        self._record("failed afterwards", f"training finished, but the script failed after it: {message} ({where})", "")

    def _end(self, outcome: str, message: str, digest: str) -> None:
        self._ended = True
        self.emit("session_ended", outcome=outcome, params_digest=digest, message=message)
        if self._control is not None:
            self._control.close()
        self._events.close(5.0)
        self._record(outcome, message, digest)

    def _record(self, outcome: str, message: str, digest: str) -> None:
        record = {
            "member": self.member, "rank": self.rank, "outcome": outcome, "message": message,
            "params_digest": digest, "step": self.step, "size": self.size,
        }  # fmt: skip
        write_record(self.settings.run_dir, "outcome", record)

    def _refuse_if_ended(self) -> None:
        if self._ended:
            raise NoSessionError("the session has ended; nothing can be communicated any more")
