#!/usr/bin/env python3
"""A network of hosts on one Linux machine: network namespaces on a bridge, with rates, cuts and power failures.

As a module::

    with TestBed(4, rate_mbit=1000) as bed:
        bed.set_pair_rate("h0", "h1", 100)
        subprocess.run(bed.command("h0", ["hostname"]))

On the command line: ``python launch/testbed/testbed.py --help``. Needs root and iproute2, nothing else. What is
built, and why so: see ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

#: One file per bed, and the lock under which beds are built and changed.
STATE_DIR = Path("/run/chaos_testbed")
#: ``ip netns exec`` puts files of this directory over those of ``/etc``; each host gets its own ``hosts`` file.
NETNS_ETC = Path("/etc/netns")
#: Each bed takes the first /24 of this network that overlaps with nothing the machine uses.
ADDRESS_POOL = ipaddress.IPv4Network("10.213.0.0/16")
MAX_HOSTS = 200
#: What "not shaped" is to HTB, Mbit/s: more than a veth pair carries.
UNLIMITED_MBIT = 100_000.0
#: Tokens a class may save up, seconds at its rate. A busy machine wakes the shaper late; with less, rate is lost.
BURST_S = 0.01
#: A class's queue: this many seconds at its rate, within the bounds in bytes. Overflow is congestion to TCP.
QUEUE_S = 0.05
QUEUE_BYTES = (256 << 10, 4 << 20)
#: Bytes a class may send before the next one's turn.
QUANTUM_BYTES = 16 << 10
#: One run of ip or tc, and one wait for killed processes, seconds.
COMMAND_LIMIT_S = 30.0
KILL_LIMIT_S = 5.0
TRANSFER = Path(__file__).with_name("transfer.py")

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_PREFIX = re.compile(r"[a-z][a-z0-9]{0,7}")
_ADVICE = (
    ("qdisc kind is unknown", "this kernel lacks a queueing discipline: it needs sch_htb (CONFIG_NET_SCH_HTB)"),
    ("classifier not found", "this kernel lacks a filter: it needs cls_u32 (CONFIG_NET_CLS_U32)"),
    ("Unknown device type", "this kernel lacks veth or bridge devices (CONFIG_VETH, CONFIG_BRIDGE)"),
    ("Operation not permitted", "root is not enough here: CAP_NET_ADMIN and CAP_SYS_ADMIN are needed"),
)


class TestBedError(Exception):
    """The bed cannot be built or changed; the message says why and what to do."""

    __test__ = False


@dataclasses.dataclass
class State:
    """A bed as it stands; rates in Mbit/s, None for not shaped."""

    prefix: str
    hosts: list[str]
    subnet: str
    owner: list[int] | None
    up: dict[str, float | None]
    down: dict[str, float | None]
    pairs: dict[str, float | None] = dataclasses.field(default_factory=dict)
    cuts: list[str] = dataclasses.field(default_factory=list)

    def index(self, host: str) -> int:
        """Number of a host, from 0.

        Raises:
            TestBedError: there is no such host.
        """
        if host not in self.hosts:
            raise TestBedError(f"bed {self.prefix} has no host {host!r}; its hosts are {', '.join(self.hosts)}")
        return self.hosts.index(host)

    def pair(self, a: str, b: str) -> str:
        """Key of an unordered pair in ``pairs`` and ``cuts``."""
        first, second = sorted((self.index(a), self.index(b)))
        if first == second:
            raise TestBedError(f"a pair is two hosts, not {a!r} twice")
        return f"{first}-{second}"


@dataclasses.dataclass(frozen=True)
class MpirunOptions:
    """What ``mpirun`` in the launcher's namespace needs to have its ranks in hosts of a bed."""

    arguments: list[str]
    environment: dict[str, str]


class TestBed:
    """Hosts on a bridge, made on entry and removed on exit, also after an error.

    Args:
        hosts: how many (named h0, h1, ...), or their names.
        rate_mbit: uplink and downlink of each host, Mbit/s; None: not shaped.
        prefix: name of the bed: at most eight small letters and digits, not in use; default: a random one.
        keep: do not mark this process as the owner; ``down --stale`` then leaves the bed alone.

    Raises:
        TestBedError: (on entry) not root, a tool or a kernel feature is missing, a bad or used name.
    """

    __test__ = False

    def __init__(
        self,
        hosts: int | Sequence[str],
        rate_mbit: float | None = 1000.0,
        prefix: str | None = None,
        *,
        keep: bool = False,
    ) -> None:
        names = [f"h{i}" for i in range(hosts)] if isinstance(hosts, int) else list(hosts)
        if not 1 <= len(names) <= MAX_HOSTS or len(set(names)) != len(names):
            raise TestBedError(f"a bed has 1 to {MAX_HOSTS} hosts with different names")
        for name in names:
            if not _NAME.fullmatch(name) or name == "switch":
                raise TestBedError(f"{name!r} is no host name for a bed: small letters, digits and '-' inside")
        self.prefix = prefix if prefix is not None else "tb" + secrets.token_hex(2)
        if not _PREFIX.fullmatch(self.prefix):
            raise TestBedError(f"{self.prefix!r} is no name for a bed: a small letter, then up to seven or digits")
        rates = dict.fromkeys(names, _checked_rate(rate_mbit))
        owner = None if keep else [os.getpid(), _start_time(os.getpid())]
        self._plan = State(self.prefix, names, "", owner, dict(rates), dict(rates))

    @classmethod
    def attach(cls, prefix: str) -> TestBed:
        """The bed of that name, made by another process. Leaving it as a context manager removes it, too."""
        bed = cls.__new__(cls)
        bed.prefix = prefix
        bed._plan = _load(prefix)
        return bed

    # -- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> TestBed:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def up(self) -> None:
        """Build the bed; what was built is removed again when something fails."""
        check_platform()
        with _lock():
            taken = (STATE_DIR / f"{self.prefix}.json").exists() or f"{self.prefix}-switch" in _namespaces()
            if taken or self.prefix in {link["ifname"] for link in json.loads(_run("ip", "-j", "link"))}:
                raise TestBedError(f"the name {self.prefix} is in use: see 'testbed.py list'")
            self._plan.subnet = str(_free_subnet())
            _save(self._plan)
            try:
                self._build(self._plan)
            except BaseException:
                self._demolish(self._plan)
                raise

    def remove(self) -> None:
        """Kill every process in the hosts and remove hosts, links and files; nothing happens when there is none.

        Raises:
            TestBedError: something is left.
        """
        with _lock():
            if (STATE_DIR / f"{self.prefix}.json").exists():
                self._demolish(_load(self.prefix))

    def _build(self, state: State) -> None:
        prefix, switch = state.prefix, f"{state.prefix}-switch"
        hosts_file = "".join(
            ["127.0.0.1 localhost\n", f"{self._address(state, -1)} launcher\n"]
            + [f"{self._address(state, i)} {name}\n" for i, name in enumerate(state.hosts)]
        )
        lines = [f"netns add {switch}"]
        # The bridge has a namespace of its own: firewall rules and network managers of the machine do not see it.
        for host in state.hosts:
            lines.append(f"netns add {prefix}-{host}")
            etc = NETNS_ETC / f"{prefix}-{host}"
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(hosts_file)
        _batch("ip", None, lines)
        lines = ["link add bridge type bridge stp_state 0 forward_delay 0", "link set bridge up"]
        for i, host in enumerate(state.hosts):
            lines += [
                f"link add p{i} type veth peer name eth0 netns {prefix}-{host} address {_mac(i)}",
                f"link set p{i} master bridge up",
            ]
        lines += [
            f"link add launcher type veth peer name {prefix} netns {os.getpid()} address {_mac(-1)}",
            "link set launcher master bridge up",
        ]
        _batch("ip", switch, lines)
        ports = [("launcher", _mac(-1))] + [(f"p{i}", _mac(i)) for i in range(len(state.hosts))]
        # Addresses are fixed: frames for a host without power must not be flooded into the others' downlinks.
        lines = [f"fdb replace {mac} dev {port} master static" for port, mac in ports]
        _batch("bridge", switch, lines + [f"link set dev {port} flood off learning off" for port, _ in ports])
        lines = [f"addr add {self._address(state, -1)}/24 dev {prefix}", f"link set {prefix} up"]
        _batch("ip", None, lines + self._neighbours(state, -1, prefix))
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(lambda host: self._build_host(state, host), state.hosts))

    def _build_host(self, state: State, host: str) -> None:
        i, namespace = state.index(host), f"{state.prefix}-{host}"
        lines = ["link set lo up", "link set eth0 addrgenmode none", f"addr add {self._address(state, i)}/24 dev eth0"]
        _batch("ip", namespace, [*lines, "link set eth0 up", *self._neighbours(state, i, "eth0")])
        # A relay that routes from one peer to another in the same subnet is no mistake here, so no ICMP redirects.
        settings = [f"{key}_redirects" for key in ("all/accept", "eth0/accept", "all/send", "eth0/send")]
        script = "; ".join(f"echo 0 > /proc/sys/net/ipv4/conf/{setting}" for setting in settings)
        _run("ip", "netns", "exec", namespace, "sh", "-ec", script)
        lines = ["qdisc add dev eth0 root handle 1: htb default 0", *self._uplink(state, host)]
        lines += [
            f"filter add dev eth0 parent 1: protocol all prio 1 u32 match ether dst {_mac(j)} flowid 1:{j + 16:x}"
            for j in range(len(state.hosts))
            if j != i
        ]
        _batch("tc", namespace, lines)
        lines = [f"qdisc add dev p{i} root handle 1: htb default 0", *self._downlink(state, host)]
        lines += [
            f"filter add dev p{i} parent 1: protocol all prio 1 u32 match ether src {_mac(j)} flowid 1:{j + 16:x}"
            for j in range(len(state.hosts))
            if j != i
        ]
        _batch("tc", f"{state.prefix}-switch", lines)

    def _demolish(self, state: State) -> None:
        namespaces = [f"{state.prefix}-{name}" for name in (*state.hosts, "switch")]
        links = {link["ifname"] for link in json.loads(_run("ip", "-j", "link"))}
        if state.prefix in links:
            _run("ip", "link", "set", state.prefix, "down", check=False)
        present = _namespaces()
        kept = [name for name in namespaces if name in present and not _kill_all(name)]
        # Taken down one by one: the kernel frees a deleted namespace's links later, but "removed" is to mean removed.
        if namespaces[-1] in present:
            ports = [f"link del {port}" for port in (*(f"p{i}" for i in range(len(state.hosts))), "launcher")]
            _batch("ip", namespaces[-1], ports, force=True)
        for name in namespaces:
            if name in present:
                _run("ip", "netns", "del", name, check=False)
            shutil.rmtree(NETNS_ETC / name, ignore_errors=True)
        if state.prefix in {link["ifname"] for link in json.loads(_run("ip", "-j", "link"))}:
            _run("ip", "link", "del", state.prefix, check=False)
        with contextlib.suppress(OSError):
            NETNS_ETC.rmdir()
        left = sorted(_namespaces().intersection(namespaces))
        if left or kept:
            raise TestBedError(f"bed {state.prefix} is not quite gone: namespaces {left}, processes left in {kept}")
        (STATE_DIR / f"{state.prefix}.json").unlink(missing_ok=True)

    # -- what is where -------------------------------------------------------------------------------------------

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts."""
        return list(self._plan.hosts)

    @property
    def subnet(self) -> str:
        """The hosts' network, as in ``10.213.0.0/24``."""
        return self._plan.subnet

    @property
    def launcher_interface(self) -> str:
        """Interface of the launcher's namespace that the hosts can reach; it is not shaped."""
        return self.prefix

    @property
    def launcher_address(self) -> str:
        """Address of :attr:`launcher_interface`."""
        return self._address(self._plan, -1)

    def address(self, host: str) -> str:
        """IPv4 address of a host."""
        return self._address(self._plan, self._plan.index(host))

    def namespace(self, host: str) -> str:
        """Name of a host's network namespace, for ``ip netns``."""
        self._plan.index(host)
        return f"{self.prefix}-{host}"

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` in a host: its network, its hostname, and the caller's files and
        environment. No process is put between: the one that is started becomes ``argv``."""
        script = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
        return ["ip", "netns", "exec", self.namespace(host), "unshare", "--uts", "sh", "-c", script, host, *argv]

    def pids(self, host: str) -> list[int]:
        """Processes that run in a host."""
        return _pids(self.namespace(host))

    # -- changes -------------------------------------------------------------------------------------------------

    def set_host_rate(self, host: str, mbit: float | None, *, up: bool = True, down: bool = True) -> None:
        """Set a host's uplink and downlink, or one of them, Mbit/s on the wire; None: not shaped."""
        with self._edit() as state:
            i = state.index(host)
            if up:
                state.up[host] = _checked_rate(mbit)
                _batch("tc", self.namespace(host), self._uplink(state, host))
            if down:
                state.down[host] = _checked_rate(mbit)
                _batch("tc", f"{self.prefix}-switch", self._downlink(state, state.hosts[i]))

    def set_pair_rate(self, a: str, b: str, mbit: float | None) -> None:
        """Limit what goes from ``a`` to ``b``, and from ``b`` to ``a``, each to Mbit/s; None: no such limit."""
        with self._edit() as state:
            state.pairs[state.pair(a, b)] = _checked_rate(mbit)
            self._apply_pair(state, a, b)

    def cut(self, a: str, b: str) -> None:
        """Lose everything between two hosts without a word, both ways; a detour over a third host still works."""
        with self._edit() as state:
            state.cuts = sorted({*state.cuts, state.pair(a, b)})
            self._apply_pair(state, a, b)

    def restore(self, a: str, b: str) -> None:
        """Undo :meth:`cut`."""
        with self._edit() as state:
            state.cuts = sorted({*state.cuts} - {state.pair(a, b)})
            self._apply_pair(state, a, b)

    def power_off(self, host: str) -> None:
        """Stop a host as a power failure does: its link goes down first, then all its processes are killed, so that
        no FIN or RST leaves it.

        Raises:
            TestBedError: a process survived SIGKILL for :data:`KILL_LIMIT_S`.
        """
        _run("ip", "-n", f"{self.prefix}-switch", "link", "set", f"p{self._plan.index(host)}", "down")
        if not _kill_all(self.namespace(host)):
            raise TestBedError(f"processes of host {host} do not die: {self.pids(host)}")

    def power_on(self, host: str) -> None:
        """Connect a host again after :meth:`power_off`; nothing runs in it yet."""
        _run("ip", "-n", f"{self.prefix}-switch", "link", "set", f"p{self._plan.index(host)}", "up")

    # -- measurement ---------------------------------------------------------------------------------------------

    def measure(self, a: str, b: str, seconds: float = 1.0) -> float:
        """Payload that one TCP connection moves from ``a`` to ``b``, Mbit/s; 0 when nothing gets through."""
        return self.measure_together([(a, b)], seconds)[0]

    def measure_together(self, pairs: Sequence[tuple[str, str]], seconds: float = 1.0) -> list[float]:
        """The same for several (from, to) at the same time, Mbit/s each."""
        with contextlib.ExitStack() as stack:

            def start(host: str, *arguments: str) -> subprocess.Popen[str]:
                argv = self.command(host, [sys.executable, "-S", str(TRANSFER), *arguments])
                process = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
                stack.callback(process.kill)
                return process

            ends = [start(b, "receive", self.address(b), str(seconds)) for _, b in pairs]
            ports = [_line(process, COMMAND_LIMIT_S) for process in ends]
            for (a, b), port in zip(pairs, ports, strict=True):
                start(a, "send", self.address(b), port)
            results = [_line(process, seconds + COMMAND_LIMIT_S).split() for process in ends]
        return [8e-6 * int(taken) / float(elapsed) for taken, elapsed in results]

    # -- inside --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _edit(self) -> Iterator[State]:
        """The state on disk, written back when the body succeeds: other processes may change the bed, too."""
        with _lock():
            state = _load(self.prefix)
            yield state
            _save(state)

    def _apply_pair(self, state: State, a: str, b: str) -> None:
        for source, target in ((a, b), (b, a)):
            lines = self._leaf("eth0", state, state.up[source], source, target, state.index(target), at_source=True)
            _batch("tc", self.namespace(source), lines)

    def _uplink(self, state: State, host: str) -> list[str]:
        """Classes at a host's own interface: 1:1 is the uplink, and below it one class for each other host."""
        lines = [_class("eth0", "1:", "1:1", state.up[host], state.up[host])]
        for j, other in enumerate(state.hosts):
            if other != host:
                lines += self._leaf("eth0", state, state.up[host], host, other, j, at_source=True)
        return lines

    def _downlink(self, state: State, host: str) -> list[str]:
        """Classes at a host's port of the bridge: 1:1 is the downlink, and below it one class for each other host."""
        device = f"p{state.index(host)}"
        lines = [_class(device, "1:", "1:1", state.down[host], state.down[host])]
        for j, other in enumerate(state.hosts):
            if other != host:
                lines += self._leaf(device, state, state.down[host], other, host, j, at_source=False)
        return lines

    def _leaf(
        self, device: str, state: State, total: float | None, source: str, target: str, j: int, *, at_source: bool
    ) -> list[str]:
        """One class for what goes from source to target: an equal share of ``total`` for sure, and all of it when
        the others are idle. At the source a pair has its own limit, and the queue of a cut pair loses everything."""
        pair = state.pair(source, target)
        ceiling = min(total or UNLIMITED_MBIT, state.pairs.get(pair) or UNLIMITED_MBIT) if at_source else total
        share = min((total or UNLIMITED_MBIT) / (len(state.hosts) - 1), ceiling or UNLIMITED_MBIT)
        low, high = QUEUE_BYTES
        limit = int(min(max(QUEUE_S * (ceiling or UNLIMITED_MBIT) * 125_000, low), high))
        queue = "blackhole" if at_source and pair in state.cuts else f"bfifo limit {limit}"
        leaf = f"1:{j + 16:x}"
        return [
            _class(device, "1:1", leaf, share, ceiling),
            f"qdisc replace dev {device} parent {leaf} {queue}",
        ]

    @staticmethod
    def _address(state: State, index: int) -> str:
        """Address of host ``index``; -1 is the launcher."""
        return str(ipaddress.IPv4Network(state.subnet)[254 if index < 0 else index + 1])

    @classmethod
    def _neighbours(cls, state: State, index: int, device: str) -> list[str]:
        """Fixed link addresses of all others. Without them a cut or dead peer would show within seconds as "no route
        to host", which on a routed network it does not."""
        others = [i for i in range(-1, len(state.hosts)) if i != index]
        return [f"neigh replace {cls._address(state, i)} lladdr {_mac(i)} nud permanent dev {device}" for i in others]


def mpirun_options(bed: TestBed) -> MpirunOptions:
    """What ``mpirun --with-ft ulfm`` needs to have its ranks in hosts of the bed; see README.md for the reasons."""
    arguments = ["--oversubscribe", "--bind-to", "none"]
    if os.geteuid() == 0:
        arguments.append("--allow-run-as-root")
    environment = {
        "PMIX_MCA_ptl_tcp_if_include": bed.launcher_interface,
        "PMIX_MCA_gds": "hash",
        "OMPI_MCA_btl": "self,tcp",
        "OMPI_MCA_btl_tcp_if_include": bed.subnet,
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_coll": "^han,hcoll,portals4,cuda",
    }
    return MpirunOptions(arguments, environment)


def rank_command(bed: TestBed, argv: Sequence[str], host: str | None = None) -> list[str]:
    """The command line to give to ``mpirun`` or ``Spawn``: runs ``argv`` in a host of the bed.

    Args:
        bed: the bed.
        argv: program and arguments of a rank.
        host: where; default: host number "rank modulo hosts", which suits the ranks started first.
    """
    where = [] if host is None else ["--host", host]
    wrapper = str(Path(__file__).with_name("rank_host.py"))
    return [sys.executable, "-S", wrapper, bed.prefix, *where, "--", *argv]


def check_platform() -> None:
    """Raises:
    TestBedError: not Linux, not root, or a program is missing.
    """
    if not sys.platform.startswith("linux"):
        raise TestBedError("a test bed needs Linux: it is made of network namespaces")
    if os.geteuid() != 0:
        raise TestBedError("a test bed needs root: network namespaces and tc are not for users; try sudo")
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("bridge", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            raise TestBedError(f"there is no '{program}' on the PATH: apt-get install {package}")


def why_not() -> str | None:
    """None where a test bed can be made here; otherwise what is missing. Makes a small one to find out."""
    try:
        with TestBed(2) as bed:
            bed.set_pair_rate("h0", "h1", 100)
            bed.cut("h0", "h1")
            subprocess.run(bed.command("h0", ["true"]), check=True, capture_output=True, timeout=COMMAND_LIMIT_S)
    except (TestBedError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None


def beds() -> list[State]:
    """All beds of this machine."""
    return [_load(path.stem) for path in sorted(STATE_DIR.glob("*.json"))]


def is_stale(state: State) -> bool:
    """Whether the process that made a bed, and was to remove it, has ended without."""
    if state.owner is None:
        return False
    pid, started = state.owner
    return _start_time(pid) != started


# -- helpers -----------------------------------------------------------------------------------------------------


def _mac(index: int) -> str:
    """Link address of host ``index``; -1 is the launcher."""
    return f"02:c4:a0:00:00:{index + 1:02x}"


def _class(device: str, parent: str, name: str, rate_mbit: float | None, ceiling_mbit: float | None) -> str:
    rate, ceiling = rate_mbit or UNLIMITED_MBIT, ceiling_mbit or UNLIMITED_MBIT
    bursts = [max(int(BURST_S * mbit * 125_000), 16 << 10) for mbit in (rate, ceiling)]
    return (
        f"class replace dev {device} parent {parent} classid {name} htb rate {int(rate * 1000)}kbit "
        f"ceil {int(ceiling * 1000)}kbit burst {bursts[0]} cburst {bursts[1]} quantum {QUANTUM_BYTES}"
    )


def _checked_rate(mbit: float | None) -> float | None:
    if mbit is not None and not 0.01 <= mbit <= UNLIMITED_MBIT:
        raise TestBedError(f"a rate is 0.01 to {UNLIMITED_MBIT:.0f} Mbit/s, not {mbit}; use cut() for none at all")
    return mbit


def _free_subnet() -> ipaddress.IPv4Network:
    """First /24 of the pool that no address or route of this machine touches."""
    used = [ipaddress.IPv4Network(state.subnet) for state in beds() if state.subnet]
    for route in json.loads(_run("ip", "-j", "-4", "route", "show", "table", "all")):
        with contextlib.suppress(ValueError):
            used.append(ipaddress.IPv4Network(route["dst"], strict=False))
    for subnet in ADDRESS_POOL.subnets(new_prefix=24):
        # A route to all of 10.0.0.0/8 is no obstacle: ours is more specific.
        if not any(subnet.overlaps(other) and other.prefixlen > 16 for other in used):
            return subnet
    raise TestBedError(f"all of {ADDRESS_POOL} is in use")


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """Held while beds are built, changed or removed."""
    STATE_DIR.mkdir(mode=0o755, exist_ok=True)
    with (STATE_DIR / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(prefix: str) -> State:
    try:
        return State(**json.loads((STATE_DIR / f"{prefix}.json").read_text()))
    except FileNotFoundError:
        raise TestBedError(f"there is no bed named {prefix}: see 'testbed.py list'") from None


def _save(state: State) -> None:
    path = STATE_DIR / f"{state.prefix}.json"
    path.with_suffix(".new").write_text(json.dumps(dataclasses.asdict(state)))
    path.with_suffix(".new").replace(path)


def _run(*argv: str, stdin: str | None = None, check: bool = True) -> str:
    """Standard output of a command.

    Raises:
        TestBedError: it failed (with ``check``), or ran for longer than :data:`COMMAND_LIMIT_S`.
    """
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False, env=_plain_env()
        )
    except subprocess.TimeoutExpired:
        raise TestBedError(f"'{shlex.join(argv)}' did not end within {COMMAND_LIMIT_S:.0f} s") from None
    if check and done.returncode != 0:
        advice = [text for pattern, text in _ADVICE if pattern in done.stderr]
        raise TestBedError("; ".join([*advice, f"'{shlex.join(argv)}' said: {done.stderr.strip()}"]))
    return done.stdout


def _plain_env() -> dict[str, str]:
    """Messages of the tools in English: advice is looked up by them."""
    return os.environ | {"LC_ALL": "C"}


def _batch(program: str, namespace: str | None, lines: Sequence[str], *, force: bool = False) -> None:
    """Run many commands of ``ip``, ``tc`` or ``bridge`` as one process."""
    where = [] if namespace is None else ["-n", namespace]
    _run(program, *where, *(["-force"] if force else []), "-batch", "-", stdin="\n".join(lines) + "\n", check=not force)


def _namespaces() -> set[str]:
    return {line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line}


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]


def _kill_all(namespace: str) -> bool:
    """SIGKILL everything in a namespace, again and again while something forks; whether nothing is left."""
    deadline = time.monotonic() + KILL_LIMIT_S
    while pids := _pids(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; with the pid it names one process. 0: there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _line(process: subprocess.Popen[str], limit_s: float) -> str:
    """Next line that a process prints."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], limit_s)
    line = process.stdout.readline() if ready else ""
    if not line:
        raise TestBedError(f"the measurement did not answer within {limit_s:.0f} s: {process.args!r}")
    return line


# -- command line ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Hosts as network namespaces on a bridge, with shaped links.")
    parser.add_argument("--bed", metavar="NAME", help="which bed; needed when there are several")
    commands = parser.add_subparsers(dest="action", required=True)
    up = commands.add_parser("up", help="make a bed and print its name")
    up.add_argument("hosts", nargs="+", help="how many, or their names")
    up.add_argument("--rate", type=float, metavar="MBIT", help="uplink and downlink of each host; default: not shaped")
    down = commands.add_parser("down", help="remove a bed and kill what runs in it")
    which = down.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all beds of this machine")
    which.add_argument("--stale", action="store_true", help="those whose maker has ended without removing them")
    commands.add_parser("list", help="show the beds")
    run = commands.add_parser("exec", help="run a command in a host")
    run.add_argument("host")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    rate = commands.add_parser("rate", help="rate HOST MBIT, or rate HOST HOST MBIT; 0: not shaped")
    rate.add_argument("hosts", nargs="+", metavar="HOST")
    rate.add_argument("mbit", type=float)
    side = rate.add_mutually_exclusive_group()
    side.add_argument("--up", action="store_true", help="only the host's uplink")
    side.add_argument("--down", action="store_true", help="only the host's downlink")
    for name, text in (
        ("cut", "lose everything between two hosts"),
        ("restore", "undo cut"),
        ("measure", "payload of one TCP connection, Mbit/s"),
    ):
        pair = commands.add_parser(name, help=text)
        pair.add_argument("a")
        pair.add_argument("b")
    for name, text in (("power-off", "link down, then kill everything in a host"), ("power-on", "link up again")):
        commands.add_parser(name, help=text).add_argument("host")
    return parser


def only_bed(name: str | None) -> TestBed:
    """The bed of that name, or the only one that there is.

    Raises:
        TestBedError: there is none, or more than one.
    """
    names = [state.prefix for state in beds()] if name is None else [name]
    if len(names) != 1:
        raise TestBedError("there is no bed: see 'up'" if not names else f"which bed? --bed {'|'.join(names)}")
    return TestBed.attach(names[0])


def _show(state: State) -> str:
    def rates(host: str) -> str:
        up, down = (f"{value:g}" if value else "unshaped" for value in (state.up[host], state.down[host]))
        return f"  {host}: up {up}, down {down}"

    def pair(key: str) -> str:
        return " - ".join(state.hosts[int(i)] for i in key.split("-"))

    lines = [f"{state.prefix}  {state.subnet}{'  (stale)' if is_stale(state) else ''}", *map(rates, state.hosts)]
    lines += [f"  {pair(key)}: {mbit:g}" for key, mbit in state.pairs.items() if mbit]
    return "\n".join(lines + [f"  {pair(key)}: cut" for key in state.cuts])


def _act(options: argparse.Namespace) -> None:
    if options.action == "list":
        for state in beds():
            print(_show(state))
        return
    check_platform()
    if options.action == "up":
        number = len(options.hosts) == 1 and options.hosts[0].isdigit()
        hosts = int(options.hosts[0]) if number else options.hosts
        bed = TestBed(hosts, options.rate or None, options.bed, keep=True)
        bed.up()
        print(bed.prefix)
        return
    if options.action == "down" and (options.all or options.stale):
        for state in beds():
            if options.all or is_stale(state):
                TestBed.attach(state.prefix).remove()
        return
    bed = only_bed(options.bed)
    if options.action == "down":
        bed.remove()
    elif options.action == "exec":
        argv = bed.command(options.host, options.argv[options.argv[:1] == ["--"] :] or ["bash"])
        os.execvp(argv[0], argv)
    elif options.action == "rate" and len(options.hosts) == 1:
        bed.set_host_rate(options.hosts[0], options.mbit or None, up=not options.down, down=not options.up)
    elif options.action == "rate":
        if len(options.hosts) != 2 or options.up or options.down:
            raise TestBedError("rate takes one host, or two without --up and --down, then Mbit/s")
        bed.set_pair_rate(options.hosts[0], options.hosts[1], options.mbit or None)
    elif options.action == "measure":
        print(f"{bed.measure(options.a, options.b):.1f}")
    elif options.action in {"cut", "restore"}:
        {"cut": bed.cut, "restore": bed.restore}[options.action](options.a, options.b)
    else:
        {"power-off": bed.power_off, "power-on": bed.power_on}[options.action](options.host)


def main() -> int:
    """The command line; exit status 1 with one line of explanation when something is wrong."""
    try:
        _act(_parser().parse_args())
    except TestBedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
