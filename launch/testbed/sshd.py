"""An ssh server in each host of a test bed, and the ``ssh`` command that gets there.

    with TestBed(["left", "right"]) as bed, SshServers(bed, Path("/tmp/keys")) as ssh:
        subprocess.run([*ssh.command, "left", "hostname"])

Keys are made for the occasion and accepted by these servers only. Each host has a shared memory of its own, and
nothing but the environment that ssh gives.

On the command line, ``python -m launch.testbed.sshd`` starts servers in all hosts of a bed that run until that is
removed, and says how ``chaosrun`` gets there.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from launch.testbed.testbed import TestBed, TestBedError, only_bed

#: Where sshd may be that is not on the path of a user.
_PLACES = "/usr/sbin:/usr/local/sbin:/sbin"
#: A server that does not listen by then never will, seconds.
START_LIMIT_S = 20.0
_POLL_S = 0.05


class SshServers:
    """The servers, which run while the context is entered.

    Args:
        bed: the hosts.
        directory: for keys and configuration; has to exist.
        hidden: directories that a host is not to share with the launcher: it has empty ones there.

    Attributes:
        command: ``ssh`` with the configuration that knows the hosts by their names.

    Raises:
        TestBedError: (on entry) ssh is missing, or a server does not start.
    """

    def __init__(self, bed: TestBed, directory: Path, hidden: tuple[str, ...] = ("/dev/shm",)) -> None:
        self._bed, self._directory, self._hidden = bed, directory, hidden
        self._stack = contextlib.ExitStack()
        self.command = ("ssh", "-F", str(directory / "ssh_config"))

    def __enter__(self) -> SshServers:
        if (reason := why_not()) is not None:
            raise TestBedError(reason)
        self._make_keys()
        self._configure()
        with contextlib.ExitStack() as starting:
            for host in self._bed.hosts:
                starting.callback(self._stop, self._start(host))
            for host in self._bed.hosts:
                self._wait_for(host)
            self._stack = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def leave_running(self, hosts: Sequence[str]) -> None:
        """Start servers, with the keys that are there, and have them run on.

        Raises:
            TestBedError: ssh is missing, or one does not start.
        """
        if (reason := why_not()) is not None:
            raise TestBedError(reason)
        if not (self._directory / "authorized_keys").exists():
            self._make_keys()
        self._configure()
        for host in hosts:
            self._start(host)
        for host in hosts:
            self._wait_for(host)

    def restart(self, host: str) -> None:
        """Start the server of a host again that was powered off and is powered on.

        Raises:
            TestBedError: it does not start.
        """
        self._stack.callback(self._stop, self._start(host))
        self._wait_for(host)

    def _make_keys(self) -> None:
        for name in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._directory / name)], check=True
            )
        shutil.copy(self._directory / "user_key.pub", self._directory / "authorized_keys")

    def _configure(self) -> None:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd confines itself before it knows the user
        place = self._directory
        hosts = "\n".join(f"Host {host}\n  HostName {self._bed.address(host)}" for host in self._bed.hosts)
        (place / "ssh_config").write_text(
            f"{hosts}\nHost *\n  IdentityFile {place}/user_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
            f"  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        (place / "sshd_config").write_text(
            f"HostKey {place}/host_key\nAuthorizedKeysFile {place}/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nPrintMotd no\n"
            "MaxStartups 100\n"
        )

    def _start(self, host: str) -> subprocess.Popen[bytes]:
        mounts = "".join(f"mount -t tmpfs none {path} && " for path in self._hidden)
        server = [_sshd(), "-D", "-e", "-f", str(self._directory / "sshd_config")]
        log = (self._directory / f"{host}.log").open("wb")
        with log:
            return subprocess.Popen(
                self._bed.command(host, ["sh", "-c", f'{mounts}exec "$@"', "sh", *server]),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @staticmethod
    def _stop(server: subprocess.Popen[bytes]) -> None:
        server.terminate()
        server.wait()

    def _wait_for(self, host: str) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                socket.create_connection((self._bed.address(host), 22), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    said = (self._directory / f"{host}.log").read_text()
                    raise TestBedError(f"the ssh server in {host} does not start: {said}") from None
                time.sleep(_POLL_S)


def why_not() -> str | None:
    """None where ssh servers can be had; otherwise what is missing."""
    for program, package in (("ssh", "openssh-client"), ("ssh-keygen", "openssh-client")):
        if shutil.which(program) is None:
            return f"there is no '{program}' on the PATH: apt-get install {package}"
    if shutil.which("sshd") is None and shutil.which("sshd", path=_PLACES) is None:
        return "there is no ssh server: apt-get install openssh-server"
    return None


def _sshd() -> str:
    """The full path, which sshd wants to be started by."""
    found = shutil.which("sshd") or shutil.which("sshd", path=_PLACES)
    assert found is not None
    return found


def _listens(bed: TestBed, host: str) -> bool:
    try:
        socket.create_connection((bed.address(host), 22), timeout=1).close()
    except OSError:
        return False
    return True


def main() -> int:
    """Start what does not run yet; exit status 1 with one line of explanation when something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.testbed.sshd", description="Starts ssh servers in hosts of a test bed."
    )
    parser.add_argument("--bed", metavar="NAME", help="which bed; needed when there are several")
    parser.add_argument("--keys", type=Path, metavar="DIR", help="for keys and settings; default: NAME-ssh in /tmp")
    parser.add_argument("hosts", nargs="*", metavar="HOST", help="default: all; those that run already are left alone")
    options = parser.parse_args()
    try:
        bed = only_bed(options.bed)
        directory = (options.keys or Path(tempfile.gettempdir(), f"{bed.prefix}-ssh")).absolute()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        servers = SshServers(bed, directory)
        servers.leave_running([host for host in options.hosts or bed.hosts if not _listens(bed, host)])
    except (TestBedError, OSError) as error:
        print(f"sshd: {error}", file=sys.stderr)
        return 1
    arguments = shlex.quote(shlex.join(servers.command[1:]))
    print(f"chaosrun --hosts {','.join(bed.hosts)} --network {bed.subnet} --ssh-args {arguments}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
