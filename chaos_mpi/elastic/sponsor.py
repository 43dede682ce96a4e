"""One newcomer being started by the member that sponsors it, in a thread, while training goes on.

Once it is up, the two keep in touch until the newcomer is called in: it may have to wait, and each is to know that the
other one is there. For a newcomer that hangs would hold up all members as soon as they take it in.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from chaos_mpi.elastic import launching
from chaos_mpi.elastic.launching import LaunchWatch
from chaos_mpi.elastic.signature import first_difference, without_rates
from chaos_mpi.errors import ChaosError, PeerFailedError, WaitTimeoutError
from chaos_mpi.membership import Join, Proposal
from chaos_mpi.mpi import growth
from chaos_mpi.mpi.growth import Bridge

#: Relative paths on the command line are meant from here; the script may go elsewhere later.
START_DIRECTORY = os.getcwd()

log = logging.getLogger("chaos_mpi.elastic")

#: A newcomer that waits to be called in is asked so often whether it is there, and has so long to answer, seconds.
ASK_PERIOD_S, ANSWER_LIMIT_S = 1.0, 10.0
_POLL_S = 0.002


class Sponsorship:
    """Starts the process of a join, and proposes what became of it.

    Args:
        join: what was agreed on.
        requirements: what the newcomer has to be like: ``versions``, the ``signature`` of the training state, and the
            ``sizes`` of the job, which it is told.
        limit_s: seconds it has until it is ready to take the state.
        propose: hands a proposal to all members; called from the thread.

    Attributes:
        bridge: the connection to the newcomer, once it is up.
        launch_s: from the start of the process until it was ready, seconds; 0 before.
        ready_at: when that was, on the monotonic clock.
    """

    def __init__(
        self, join: Join, requirements: dict[str, Any], limit_s: float, propose: Callable[[Proposal], None]
    ) -> None:
        self.join = join
        self.bridge: Bridge | None = None
        self.launch_s = self.ready_at = 0.0
        self._requirements, self._limit_s, self._propose = requirements, limit_s, propose
        self._told = self._asked = False
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._deadline = threading.Timer(limit_s, self._expired)
        self._deadline.daemon = True
        self._watch = LaunchWatch(join, self._ended)
        self._called = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"chaos_mpi-{join.id}", daemon=True)

    def start(self) -> None:
        """Start the process, in the background."""
        self._deadline.start()
        self._watch.start()
        self._thread.start()

    def call_in(self) -> None:
        """The newcomer's turn has come: from now on the bridge is the caller's."""
        self._called.set()
        if self.ready_at:
            self._thread.join()

    def give_up(self, reason: str) -> None:
        """Tell the newcomer, if it is up, that the job has no use for it."""
        self._called.set()
        self._tell("")
        if self.bridge is not None:
            log.info("%s is given up: %s", self.join.id, reason)
            self.bridge.give_up()

    def process_ended(self, mark: str, how: str) -> None:
        """A newcomer's process on some host has ended; from any thread. MPI tells of it only once it is connected.

        Args:
            mark: see :func:`chaos_mpi.elastic.launching.mark`.
            how: what has become of it.
        """
        if self.bridge is None and mark == launching.mark(self.join):
            threading.Thread(target=self._ended, args=(how,), daemon=True).start()

    def _run(self) -> None:
        try:
            bridge = launching.start(self.join, self._requirements["sizes"], START_DIRECTORY)
            self.bridge = bridge
            self._watch.stop()
            bridge.send({"welcome": self.join.id, "requirements": self._requirements["versions"]})
            word = bridge.receive(self._limit_s, f"the newcomer of {self.join.id} to build its model")
            difference = self._misfit(word)
            if difference is not None:
                bridge.send({"refused": difference})
                self._tell("misfit", reason=f"{word['member']} does not fit: {difference}")
                return
        except (ChaosError, PeerFailedError, WaitTimeoutError) as error:
            self._tell("failed", reason=str(error))
            if self.bridge is not None:
                self.bridge.give_up()
            return
        self.ready_at = time.monotonic()
        self.launch_s = self.ready_at - self._begun
        if self._tell("arrived", member=str(word["member"])):
            self._keep_in_touch(bridge)
        else:
            bridge.give_up()  # it came when nobody waited for it any more

    def is_there(self) -> bool:
        """After :meth:`call_in`: whether the newcomer answers. Waits for :data:`ANSWER_LIMIT_S` at most."""
        if self.bridge is None or not self.ready_at:
            return False
        limit = time.monotonic() + ANSWER_LIMIT_S
        try:
            if not self._asked:
                self.bridge.send({"wait": True})
            while self.bridge.poll() is None:
                if time.monotonic() > limit:
                    log.warning("%s does not answer any more (%.0f s); it is left out", self.join.id, ANSWER_LIMIT_S)
                    return False
                time.sleep(_POLL_S / 10)
        except PeerFailedError:
            return False
        return True

    def _keep_in_touch(self, bridge: Bridge) -> None:
        try:
            while not self._called.is_set():
                bridge.send({"wait": True})
                self._asked = True
                limit = time.monotonic() + ANSWER_LIMIT_S
                while bridge.poll() is None:
                    if self._called.wait(_POLL_S):
                        return
                    if time.monotonic() > limit:
                        raise WaitTimeoutError(f"the newcomer does not answer any more ({ANSWER_LIMIT_S:.0f} s)")
                self._asked = False
                self._called.wait(ASK_PERIOD_S)
        except (PeerFailedError, WaitTimeoutError) as error:
            self._propose(Proposal("failed", self.join.id, "", self.join.host, self.join.attempt, str(error)))
            bridge.give_up()

    def _misfit(self, word: dict[str, Any]) -> str | None:
        versions = self._requirements["versions"]
        for name, version in versions.items():
            if word["versions"].get(name) != version:
                return f"{name} is {version} here and {word['versions'].get(name)} at {word['host']}"
        return first_difference(without_rates(self._requirements["signature"]), without_rates(word["signature"]))

    def _ended(self, reason: str = "the process ended before it was connected; its output says why") -> None:
        self._tell("failed", reason=reason)
        growth.unblock()  # MPI may be making a communicator with it

    def _expired(self) -> None:
        self._tell("failed", reason=f"the newcomer was not ready within {self._limit_s:.0f} s")
        if self.bridge is not None:
            self.bridge.give_up()
        growth.unblock()

    def _tell(self, kind: str, *, member: str = "", reason: str = "") -> bool:
        """Propose what the start came to, once and never again; whether it was this time."""
        with self._lock:
            if self._told:
                return False
            self._told = True
        self._deadline.cancel()
        self._watch.stop()
        if kind:
            self._propose(Proposal(kind, self.join.id, member, self.join.host, self.join.attempt, reason))
        return True


def versions() -> dict[str, str]:
    """What has to be the same at all members. A local label of torch need not: builds for CPU and GPU fit together."""
    import torch

    import chaos_mpi

    python = ".".join(map(str, sys.version_info[:2]))
    return {"chaos_mpi": chaos_mpi.__version__, "torch": str(torch.__version__).partition("+")[0], "Python": python}
