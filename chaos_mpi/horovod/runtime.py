"""Horovod's own runtime in this process: started on the session's communicator, and started anew in every view.

Horovod works in a thread of its own on duplicates of the communicator that it is given. So it is stopped and started
by calls that may not return when a member dies meanwhile; both are made in a helper thread, while this one looks
whether the communicator is broken, and then makes Horovod's fail, too.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from chaos_mpi.errors import ConfigError, EngineError, PeerFailedError
from chaos_mpi.mpi.foreign import ForeignCommunicators
from chaos_mpi.mpi.runtime import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos_mpi.mpi.world import World

log = logging.getLogger("chaos_mpi.horovod")

#: A start or stop takes a few milliseconds; from then on look for a failure as often.
_LOOK_PERIOD_S = 0.02
#: After a failure Horovod gets an error from MPI by itself, as a rule; only if it takes longer is it made to.
_BY_ITSELF_S = 0.1
#: In the version of a Horovod that launch/install_horovod.sh has built.
_BUILT_FOR_ELASTIC = "elastic1"
_GIVEN_BY_HOROVODRUN = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")


def load_horovod() -> Any:
    """The module ``horovod.torch``.

    Raises:
        ConfigError: it is not installed, cannot be loaded, cannot use MPI, or was started by its own launcher.
    """
    try:
        import horovod.torch as hvd
        from horovod.common.util import extension_available
    except ImportError as error:
        raise ConfigError(
            f"Horovod cannot be loaded ({error}). Build it for this environment with 'bash launch/install_horovod.sh'."
        ) from error
    if not hasattr(hvd, "DistributedOptimizer"):
        raise ConfigError(
            "this Horovod was built without PyTorch, or for another version of it. Build it for this environment with "
            f"'bash launch/install_horovod.sh --rebuild' (extension there: {extension_available('torch')})."
        )
    if not hvd.mpi_built():
        raise ConfigError(
            "this Horovod was built without MPI, and only over MPI can it survive a failure here. Build it with "
            "'bash launch/install_horovod.sh --rebuild'."
        )
    if _BUILT_FOR_ELASTIC not in (version := importlib.metadata.version("horovod")):
        raise ConfigError(
            f"this Horovod ({version}) is as it was published: it crashes when a rank dies while it starts, and hangs "
            "when one joins. Build it with 'bash launch/install_horovod.sh', which makes the few changes needed."
        )
    if given := [name for name in _GIVEN_BY_HOROVODRUN if name in os.environ]:
        raise ConfigError(
            f"this script was started by horovodrun with Gloo ({given[0]} is set): start it with 'chaosrun -n N "
            "script.py' or 'mpirun --with-ft ulfm -n N python script.py'."
        )
    for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"):
        if os.environ.setdefault(name, "mpi").lower() != "mpi":
            raise ConfigError(f"{name} is {os.environ[name]!r}; elastic training with Horovod needs it to be 'mpi'.")
    return hvd


class HorovodRuntime:
    """Starts and stops Horovod, so that it always runs on the communicator of the present view.

    Args:
        limit_s: longest time that a start or a stop may take; the process is ended if it takes longer.

    Attributes:
        hvd: the module ``horovod.torch``.
        starts: how often Horovod was started. What was submitted to it before the last start is lost.

    Raises:
        ConfigError: see :func:`load_horovod`, or the script has started Horovod itself.
    """

    def __init__(self, limit_s: float) -> None:
        self.hvd = load_horovod()
        if self.hvd.is_initialized():
            raise ConfigError(
                "the script has called hvd.init(): leave that to chaos_mpi.horovod, which has to do it again "
                "whenever the members change."
            )
        self.starts = 0
        self._limit_s = limit_s
        self._world: World | None = None
        self._duplicates: ForeignCommunicators | None = None

    def runs_on(self, world: World) -> bool:
        """Whether Horovod was started on this communicator, and not stopped since."""
        return self._world is world

    # -- what the session tells ------------------------------------------------------------------------

    def enter_view(self, world: World) -> None:
        """Run on this communicator from now on. Called by all members of a new view, before anything else in it.

        If a member dies meanwhile Horovod does not run, which the next operation on ``world`` finds out as well.
        """
        if self._world is world:
            return
        self.stop(spared=world)
        try:
            self.start(world)
        except PeerFailedError as error:
            log.debug("Horovod was not started: %s", error)

    def end(self, world: World) -> None:
        """The session is over: stop, while all the others do."""
        self.stop(spared=world)

    # -- start and stop --------------------------------------------------------------------------------

    def start(self, world: World) -> None:
        """Start Horovod on ``world``; all members call it.

        Raises:
            PeerFailedError: a member died meanwhile.
            EngineError: Horovod does not start, although all members live.
        """
        self.starts += 1
        self._duplicates = ForeignCommunicators(world)
        self._world = world
        errors: list[Exception] = []

        def init() -> None:
            try:
                self.hvd.init(comm=world.comm)
            except Exception as error:  # told to the main thread
                errors.append(error)

        self._finish(init, world, world, "Horovod's start")
        # It would stop Horovod when the interpreter ends, also at the other members, who may be training on.
        atexit.unregister(self.hvd.mpi_ops._basics.shutdown)
        broken = world.is_broken()
        if errors and not broken and self._comes_up():
            return  # it reports an earlier failure once more
        if errors or broken:
            self.stop(spared=world)
            if broken:
                raise PeerFailedError("a member died while Horovod was started")
            raise EngineError(f"Horovod does not start: {errors[0]}")

    def stop(self, spared: World) -> None:
        """Stop Horovod if it runs; what it has not finished is lost.

        In good order when all members do it; after a failure, whatever the others do.

        Args:
            spared: the session's present communicator.
        """
        world, self._world = self._world, None
        if world is not None:
            self._finish(self.hvd.shutdown, world, spared, "Horovod's end")

    def _comes_up(self) -> bool:
        limit = time.monotonic() + self._limit_s
        while not self.hvd.is_initialized():
            if time.monotonic() > limit:
                return False
            time.sleep(_LOOK_PERIOD_S)
        return True

    def _finish(self, call: Callable[[], None], world: World, spared: World, what: str) -> None:
        """Have a helper thread make the call, and Horovod fail in it if ``world`` is broken."""
        helper = threading.Thread(target=call, name="chaos_mpi-horovod", daemon=True)
        broken_since: float | None = None
        with Watchdog(what, self._limit_s):
            helper.start()
            helper.join(_LOOK_PERIOD_S)
            while helper.is_alive():
                now = time.monotonic()
                if world.is_broken():
                    broken_since = broken_since if broken_since is not None else now
                    world.revoke()  # some may be making a duplicate of it
                    if now - broken_since > _BY_ITSELF_S and self._duplicates is not None:
                        count = self._duplicates.revoke(spared)
                        log.debug("%s: %d communicators of Horovod revoked", what, count)
                helper.join(_LOOK_PERIOD_S)
