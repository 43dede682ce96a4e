"""How gossip and the agreement on members behave as the cluster grows, simulated from the code that agents run.

Nothing is sent: nodes, messages and time are simulated, so the numbers do not depend on this machine. Two questions:

    spread   one node says something new: how long until all know it, and what does a node send meanwhile? Each sends
             at most a fixed number of bytes to a few others per round, so this does not grow with the cluster.
    removal  one node dies: how long until all others hold the view without it, and what does a node send for
             heartbeats? Here everybody hears everybody: what a node sends grows with the cluster, a link's part not.

    python benchmarks/gossip.py            # up to 1,000 nodes (removal: up to 60)
    python benchmarks/gossip.py --quick    # a look, not a result
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import report

from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.gossip import Gossip
from chaos_mpi.monitor.member import Member
from chaos_mpi.monitor.messages import Message, to_json

SIZES = (10, 30, 60, 100, 300, 1000)
REMOVAL_SIZES = (3, 6, 10, 20, 40, 60)
QUICK_SIZES = (10, 30, 60)
QUICK_REMOVAL_SIZES = (3, 6, 10)
#: One round of gossip of each node, seconds.
ROUND_S = 0.2
FAN_OUT = 3
BUDGET_BYTES = 1024
#: What a node says of itself: resources and its worst links.
PAYLOAD_BYTES = 100
#: A message takes a random time between these, seconds.
DELAY_S = (0.0002, 0.002)
#: Rounds after which a cluster that has not converged is given up.
_MOST_ROUNDS = 2000


def spread(count: int, loss: float, rng: random.Random) -> dict[str, Any]:
    """One node of ``count``, which all know all, says something new.

    Returns:
        ``rounds`` and ``seconds`` until all know it (None if they never did), and what a node sends per second: the
        average, and the most that any sent.
    """
    nodes: list[Gossip[int]] = [Gossip(i, FAN_OUT, BUDGET_BYTES) for i in range(count)]
    for node in nodes:
        node.publish(bytes(PAYLOAD_BYTES))
    everything = [node.records[node.me] for node in nodes]
    for node in nodes:
        node.receive(everything, settled=True)
    others = [[j for j in range(count) if j != i] for i in range(count)]
    nodes[0].publish(bytes(PAYLOAD_BYTES))
    version, sent = nodes[0].records[0].version, [0] * count
    for done in range(1, _MOST_ROUNDS + 1):
        # All send at the same time: what comes in a round is passed on in the next.
        posts = [(i, to, records) for i, node in enumerate(nodes) for to, records in node.next_round(others[i], rng)]
        for i, to, records in posts:
            sent[i] += sum(record.nbytes for record in records)
            if rng.random() >= loss:
                nodes[to].receive(records)
        if all(node.records[0].version == version for node in nodes):
            seconds = done * ROUND_S
            return {"rounds": done, "seconds": seconds, "bytes_per_s": sum(sent) / count / seconds,
                    "most_bytes_per_s": max(sent) / seconds}  # fmt: skip
    return {"rounds": None, "seconds": None, "bytes_per_s": 0.0, "most_bytes_per_s": 0.0}


def removal(count: int, timing: Timing, rng: random.Random) -> dict[str, Any]:
    """One node of ``count`` dies at a random moment.

    Returns:
        ``seconds`` until all others hold the view without it (None if they never did), and what a node and a link carry
        per second before the death, as JSON.
    """
    view = ClusterView(0, tuple(Node(f"n{i:04}") for i in range(count)))
    members = {node: Member(node, view, timing, -rng.random() * timing.beat_s) for node in view.members}
    wires: list[tuple[float, int, Node, Node, Message | None]] = []
    numbers, sent_bytes = itertools.count(), 0
    dead, dies_s = rng.choice(view.members), 1.0 + rng.random() * timing.beat_s

    def push(at_s: float, sender: Node, to: Node, message: Message | None) -> None:
        heapq.heappush(wires, (at_s, next(numbers), sender, to, message))

    for node in view.members:
        push(rng.random() * timing.beat_s, node, node, None)
    waiting = set(view.members) - {dead}
    while wires and wires[0][0] < dies_s + 10 * timing.limit_s:
        now_s, _, sender, node, message = heapq.heappop(wires)
        if node == dead and now_s >= dies_s:
            continue
        member = members[node]
        out = member.tick(now_s) if message is None else member.receive(sender, message, now_s)
        for to, answer in out:
            sent_bytes += len(json.dumps(to_json(answer), separators=(",", ":"))) if now_s < dies_s else 0
            push(now_s + rng.uniform(*DELAY_S), node, to, answer)
        if message is None:
            push(max(now_s + 1e-3, member.due_s(now_s)), node, node, None)
        if dead not in member.view.members:
            waiting.discard(node)
            if not waiting:
                rate = sent_bytes / dies_s / count
                return {"seconds": now_s - dies_s, "bytes_per_s": rate, "link_bytes_per_s": 2 * rate / (count - 1)}
    return {"seconds": None, "bytes_per_s": 0.0, "link_bytes_per_s": 0.0}


def summarise(records: Sequence[dict[str, Any]], keys: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """Median and so on of the numbers ``names``, for each value of ``keys``; runs that never ended are counted."""
    rows = []
    for group in sorted({tuple(record[key] for key in keys) for record in records}):
        runs = [record for record in records if tuple(record[key] for key in keys) == group]
        ended = [record for record in runs if record["seconds"] is not None]
        rows.append({**dict(zip(keys, group, strict=True)), "unfinished": len(runs) - len(ended),
                     **{name: report.summary([record[name] for record in ended]) for name in names}})  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = Table(
        title=f"spread: {FAN_OUT} others in each round of {ROUND_S:g} s, at most {BUDGET_BYTES} bytes to each"
    )
    for name in ("nodes", "loss", "seconds", "slowest", "kB/s of a node", "most of any", "unfinished"):
        shown.add_column(name, justify="right")
    for row in result["spread"]:
        shown.add_row(
            str(row["nodes"]), f"{row['loss']:.0%}", f"{row['seconds']['median']:.1f}", f"{row['seconds']['max']:.1f}",
            f"{row['bytes_per_s']['median'] / 1e3:.1f}", f"{row['most_bytes_per_s']['max'] / 1e3:.1f}",
            str(row["unfinished"]),
        )  # fmt: skip
    console.print(shown)
    shown = Table(title=f"removal: a death until all others hold the new view; limit {result['limit_s']:g} s")
    for name in ("nodes", "ms", "slowest", "kB/s of a node", "kB/s of a link", "unfinished"):
        shown.add_column(name, justify="right")
    for row in result["removal"]:
        shown.add_row(
            str(row["nodes"]), f"{1e3 * row['seconds']['median']:.0f}", f"{1e3 * row['seconds']['max']:.0f}",
            f"{row['bytes_per_s']['median'] / 1e3:.1f}", f"{row['link_bytes_per_s']['median'] / 1e3:.2f}",
            str(row["unfinished"]),
        )  # fmt: skip
    console.print(shown)


def plot(result: dict[str, Any], path: Path) -> None:
    """Times on the left, traffic of a node on the right, against the size of the cluster."""
    import matplotlib.pyplot as plt

    figure, (times, traffic) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for colour, loss in enumerate(sorted({row["loss"] for row in result["spread"]})):
        rows = [row for row in result["spread"] if row["loss"] == loss]
        sizes, label = [row["nodes"] for row in rows], f"spread, {loss:.0%} lost"
        times.plot(sizes, [row["seconds"]["median"] for row in rows], "o-", color=f"C{colour}", label=label)
        times.fill_between(
            sizes, [row["seconds"]["min"] for row in rows], [row["seconds"]["max"] for row in rows],
            color=f"C{colour}", alpha=0.2,
        )  # fmt: skip
        traffic.plot(sizes, [row["bytes_per_s"]["median"] / 1e3 for row in rows], "o-", color=f"C{colour}", label=label)
    rows = result["removal"]
    sizes = [row["nodes"] for row in rows]
    times.plot(sizes, [row["seconds"]["median"] for row in rows], "s--", color="C3", label="removal of a dead node")
    traffic.plot(sizes, [row["bytes_per_s"]["median"] / 1e3 for row in rows], "s--", color="C3", label="heartbeats")
    times.set(xscale="log", xlabel="nodes", ylabel="seconds", ylim=(0, None), title="until all know (band: all runs)")
    traffic.set(xscale="log", yscale="log", xlabel="nodes", ylabel="kB/s sent by a node", title="traffic of a node")
    for axis in (times, traffic):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def simulate(
    sizes: Sequence[int], removal_sizes: Sequence[int], repeats: int, timing: Timing, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Every run as one record; those in which something is spread say how much is lost on the way."""
    for repeat in range(repeats):
        print(f"round {repeat + 1}", file=sys.stderr, flush=True)
        for count, loss in itertools.product(sizes, (0.0, 0.2)):
            yield {"nodes": count, "loss": loss, **spread(count, loss, rng)}
        for count in removal_sizes:
            yield {"nodes": count, **removal(count, timing, rng)}


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="of clusters in which something is spread")
    parser.add_argument("--removal-sizes", type=int, nargs="+", help="of clusters in which a node dies")
    parser.add_argument("--repeats", type=int, default=10, help="runs of each size")
    parser.add_argument("--limit-s", type=float, default=Timing().limit_s, help="detection limit")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON and the plot")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small clusters, two runs of each")
    given = parser.parse_args()
    sizes = given.sizes or (QUICK_SIZES if given.quick else SIZES)
    removal_sizes = given.removal_sizes or (QUICK_REMOVAL_SIZES if given.quick else REMOVAL_SIZES)
    timing, repeats = Timing(limit_s=given.limit_s), 2 if given.quick else given.repeats
    report.refuse_unusable(given.out)
    records = report.collected(simulate(sizes, removal_sizes, repeats, timing, random.Random(given.seed)))
    spreads, removals = [r for r in records if "loss" in r], [r for r in records if "loss" not in r]
    result = {
        "benchmark": "gossip",
        **report.started(),
        "limit_s": timing.limit_s,
        "round_s": ROUND_S,
        "fan_out": FAN_OUT,
        "budget_bytes": BUDGET_BYTES,
        "payload_bytes": PAYLOAD_BYTES,
        "spread": summarise(spreads, ("nodes", "loss"), ("rounds", "seconds", "bytes_per_s", "most_bytes_per_s")),
        "removal": summarise(removals, ("nodes",), ("seconds", "bytes_per_s", "link_bytes_per_s")),
    }
    report.publish(given.out, result, table, plot, records, rows="spread")


if __name__ == "__main__":
    main()
