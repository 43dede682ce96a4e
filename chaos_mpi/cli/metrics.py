"""Prometheus metrics of a running job, served by its launcher (extra ``metrics``).

Members come and go, and a counter must not go back. Changes of the view are counted alike by all members, who tell
newcomers, so the highest count is the right one, once seen. Seconds stood still are each member's own: what a member
last said is kept when it is gone.
"""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from chaos_mpi.cli.status import ELSEWHERE, Job, look

#: Scrapes so close to each other are answered from one look, seconds.
CACHE_S = 0.5

_CHANGES = {
    "recoveries": "Views committed because of a failure",
    "deaths": "Members that died",
    "joins": "Members that joined",
    "leaves": "Members that left by agreement",
}


class Ledger:
    """What has to be remembered of a job so that its counters never go back."""

    def __init__(self) -> None:
        self.step = self.epoch = 0
        self.changes = dict.fromkeys(_CHANGES, 0)
        self._stalled_s: dict[str, dict[str, float]] = {}

    def note(self, job: Job) -> None:
        """Take in one look at the job."""
        self.step, self.epoch = max(self.step, job["step"]), max(self.epoch, job["epoch"])
        for name in self.changes:
            self.changes[name] = max(self.changes[name], job["changes"][name])
        for rank in job["ranks"]:
            for cause, seconds in (rank["stalled_s"] or {}).items():
                of_member = self._stalled_s.setdefault(rank["member"], {})
                of_member[cause] = max(of_member.get(cause, 0.0), seconds)

    def stalled_s(self) -> dict[str, float]:
        """Seconds that members stood still, summed over all that ever were, by cause."""
        causes = sorted({cause for of_member in self._stalled_s.values() for cause in of_member})
        return {cause: sum(m.get(cause, 0.0) for m in self._stalled_s.values()) for cause in causes}


def families(job: Job | None, ledger: Ledger) -> Iterator[Metric]:
    """The metrics after a look, which the ledger has noted; ``job`` is None if nobody has answered."""
    yield GaugeMetricFamily("chaos_mpi_step", "Steps finished", ledger.step)
    yield GaugeMetricFamily("chaos_mpi_epoch", "Number of the view", ledger.epoch)
    yield GaugeMetricFamily("chaos_mpi_members", "Members of the job", len(job["members"]) if job else 0)
    yield GaugeMetricFamily("chaos_mpi_newcomers", "Newcomers on their way", len(job["joins"]) if job else 0)
    if job is not None and job["steps_per_s"] is not None:
        yield GaugeMetricFamily("chaos_mpi_steps_per_second", "Steps per second, lately", job["steps_per_s"])
    for name, text in _CHANGES.items():
        yield CounterMetricFamily(f"chaos_mpi_{name}", text, ledger.changes[name])
    stalled = CounterMetricFamily(
        "chaos_mpi_stalled_seconds", "Time that members stood still, summed over members", labels=["cause"]
    )
    for cause, seconds in ledger.stalled_s().items():
        stalled.add_metric([cause], seconds)
    yield stalled
    if job is not None:
        yield from _of_members(job)
        yield from _of_hosts(job)


def _of_members(job: Job) -> Iterator[Metric]:
    up = GaugeMetricFamily("chaos_mpi_member_up", "Whether the member answers", labels=["member", "rank", "host"])
    memory = GaugeMetricFamily(
        "chaos_mpi_member_resident_memory_bytes", "Resident memory of the process", labels=["member", "host"]
    )
    cpu = CounterMetricFamily(
        "chaos_mpi_member_cpu_seconds", "Processor time of the process", labels=["member", "host"]
    )
    for rank in job["ranks"]:
        process = rank["process"]
        if rank["state"] != ELSEWHERE:
            up.add_metric([rank["member"], str(rank["rank"]), rank["host"]], 0 if process is None else 1)
        if process is not None:
            memory.add_metric([rank["member"], rank["host"]], process["rss_bytes"])
            cpu.add_metric([rank["member"], rank["host"]], process["cpu_s"])
    yield from (up, memory, cpu)


def _of_hosts(job: Job) -> Iterator[Metric]:
    load = GaugeMetricFamily("chaos_mpi_host_load1", "Load of the machine, one minute", labels=["host"])
    free = GaugeMetricFamily("chaos_mpi_host_memory_available_bytes", "Memory that can be had", labels=["host"])
    total = GaugeMetricFamily("chaos_mpi_host_memory_total_bytes", "Memory of the machine", labels=["host"])
    for host, machine in sorted(job["machines"].items()):
        for family, value in (
            (load, machine["load"] and machine["load"][0]),
            (free, machine["memory_available_bytes"]),
            (total, machine["memory_total_bytes"]),
        ):
            if value is not None:
                family.add_metric([host], value)
    yield from (load, free, total)


class JobCollector:
    """Looks at the job when it is asked for metrics.

    Args:
        look: asks the job's members; None if nobody answers.
        clock: monotonic seconds.
    """

    def __init__(self, look: Callable[[], Job | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._look, self._clock = look, clock
        self._ledger = Ledger()
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._job: Job | None = None

    def collect(self) -> list[Metric]:
        """The metrics, for a registry. From any thread."""
        with self._lock:
            if self._clock() - self._looked_at >= CACHE_S:
                self._job = self._look()
                self._looked_at = self._clock()
                if self._job is not None:
                    self._ledger.note(self._job)
            return list(families(self._job, self._ledger))

    def describe(self) -> list[Metric]:
        """Nothing: a registry would look at the job to find the names out."""
        return []


class _Server(ThreadingHTTPServer):
    def __init__(self, family: socket.AddressFamily, where: tuple[str, int], handler: type) -> None:
        self.address_family = family
        super().__init__(where, handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks a name up, which may take long


class MetricsEndpoint:
    """Answers Prometheus over HTTP. The port is taken at once, and answered while :meth:`serving`.

    Args:
        address: to listen at; a name or a number.
        port: 0 for any that is free.
        directory: the job's private directory.

    Attributes:
        url: where the metrics are.

    Raises:
        OSError: the port is taken, or there is no such address here.
    """

    def __init__(self, address: str, port: int, directory: Path) -> None:
        registry = CollectorRegistry(support_collectors_without_names=True)
        registry.register(JobCollector(lambda: look(directory)))
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        self._server = _Server(family, (str(where[0]), int(where[1])), MetricsHandler.factory(registry))
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{self._server.server_address[1]}/metrics"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answer meanwhile, in threads."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="chaos_mpi-metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            thread.join()

    def close(self) -> None:
        """Give the port back."""
        self._server.server_close()
