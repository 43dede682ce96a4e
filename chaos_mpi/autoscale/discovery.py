"""Finding out which machines there are: a file is read, or a script is run, again and again."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from chaos_mpi.agent.spawning import VARIABLE
from chaos_mpi.autoscale.hostlist import parse_hosts, split_usable
from chaos_mpi.errors import ConfigError
from chaos_mpi.membership import HostSlots

log = logging.getLogger("chaos_mpi.autoscale")

#: A script is ended, with all it has started, when it takes longer, seconds.
SCRIPT_LIMIT_S = 10.0
#: What ``timeout`` (coreutils) exits with when it had to end the program, and when it could not run it.
_TIMED_OUT = (124, -signal.SIGKILL)
_CANNOT_RUN = (126, 127)
#: What mpirun tells its ranks is not for a script, which chaosrun has run without it.
_LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PRTE_")


def is_script(path: Path) -> bool:
    """Whether the list is printed by this program, and not in this file."""
    return os.path.isfile(path) and os.access(path, os.X_OK)


def read_hosts(path: Path, limit_s: float = SCRIPT_LIMIT_S, *, for_ssh: bool = False) -> tuple[HostSlots, ...]:
    """The hosts in a file, or that an executable file prints.

    Args:
        path: of the file.
        limit_s: time that it has to print them, seconds.
        for_ssh: see :func:`parse_hosts`.

    Raises:
        ConfigError: it cannot be read or run, fails, takes longer than ``limit_s`` seconds, or its list has an error.
    """
    if is_script(path):
        return parse_hosts(_printed_by(path, limit_s), f"the output of {path}", for_ssh=for_ssh)
    try:
        return parse_hosts(path.read_text(encoding="utf-8"), str(path), for_ssh=for_ssh)
    except OSError as error:
        raise ConfigError(f"the list of hosts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the list of hosts {path} is not text in UTF-8: {error}") from error


def usable_hosts(
    entries: tuple[HostSlots, ...], own: str | None = None
) -> tuple[tuple[HostSlots, ...], tuple[HostSlots, ...]]:
    """Those on which this job can start ranks, and the others; see :func:`split_usable`.

    A job that was started on several hosts can start ranks on any.

    Args:
        entries: a list of hosts.
        own: what this machine is called in member ids; default: by its present name, which may be another one later.
    """
    if VARIABLE in os.environ:
        return entries, ()
    now = socket.gethostname()
    own = now if own is None else own
    addresses = {address.address for of_card in psutil.net_if_addrs().values() for address in of_card}
    names = {*(part for name in (own, now) for part in (name, name.partition(".")[0])), "localhost", *addresses}
    if any(host not in names for host, _ in entries):
        names |= _further_names(now)
    return split_usable(entries, names, own)


@functools.cache
def _further_names(own: str) -> frozenset[str]:
    """What the resolver knows this machine as; asked once, since that may take seconds."""
    names = {socket.getfqdn()}
    with contextlib.suppress(OSError):
        name, aliases, _ = socket.gethostbyname_ex(own)
        names |= {name, *aliases}
    return frozenset(names)


class Discovery:
    """Looks for hosts in a thread, and says what it finds.

    A list is believed when two looks in a row find the same, because a file may be in the middle of being written.
    While there is none, the last one holds; what is wrong is logged once.

    Args:
        path: of the file or script.
        interval_s: time between two looks, seconds.
        observe: is told every list that is believed; only hosts that can be used.
        is_my_turn: whether it is for this member to look.
        host: what this machine is called in member ids. It stays so when the machine gets another name (DHCP, VPN).
    """

    def __init__(
        self,
        path: Path,
        interval_s: float,
        observe: Callable[[tuple[HostSlots, ...]], None],
        is_my_turn: Callable[[], bool],
        host: str,
    ) -> None:
        self._path, self._interval_s = path, interval_s
        self._observe, self._is_my_turn, self._host = observe, is_my_turn, host
        self._last: tuple[HostSlots, ...] | None = None
        self._problem = ""
        self._warned: set[str] = set()
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="chaos_mpi-discovery", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            if self._is_my_turn():
                self.look()

    def look(self) -> None:
        """Look once."""
        try:
            found = read_hosts(self._path, for_ssh=VARIABLE in os.environ)
        except ConfigError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log.warning("%s. The hosts that were known before hold on", error)
            return
        if self._problem:
            log.warning("%s can be used again", self._path)
            self._problem = ""
        before, self._last = self._last, found
        if found == before and not self._stop.is_set():
            usable, others = usable_hosts(found, self._host)
            self._warn(others)
            self._observe(usable)

    def _warn(self, others: tuple[HostSlots, ...]) -> None:
        for host, slots in others:
            if host not in self._warned:
                self._warned.add(host)
                log.warning(
                    "host %s is another machine; its %d slots are only used by jobs that are started with --hosts",
                    host, slots,
                )  # fmt: skip


def _printed_by(script: Path, limit_s: float) -> str:
    # Into files: a pipe would stay open as long as anything that the script has left behind. And with coreutils'
    # timeout, which ends the script in time also when this process is killed meanwhile.
    command = ["timeout", "--kill-after=1", f"{limit_s}", str(script.absolute())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_VARIABLES)}
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            output, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, check=False
            )
        except OSError as error:
            raise ConfigError(f"the discovery script {script} cannot be run by timeout: {error.strerror}") from error
        for file in (output, errors):
            file.seek(0)
        if ended.returncode in _TIMED_OUT and time.monotonic() - begun >= limit_s:
            raise ConfigError(f"the discovery script {script} did not end within {limit_s:g} s")
        if ended.returncode != 0:
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise ConfigError(f"the discovery script {script} {_failure(ended.returncode, said)}")
        return output.read().decode(errors="replace")


def _failure(status: int, said: list[str]) -> str:
    """How a script ended, in words, with the last line of what it said."""
    how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
    why = f": {said[-1]}" if said else ""
    hint = ". If it is a list and no program, take away its x permission" if status in _CANNOT_RUN else ""
    return f"{how}{why}{hint}"
