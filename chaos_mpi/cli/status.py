"""A running job as a whole, from what its members answer when they are asked. Pure but for :func:`look`.

Members may answer a moment before and after a change of the view: what they all know is taken from the one that is
furthest.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from chaos_mpi.agent import marks, voice
from chaos_mpi.cli.control import LAUNCHER, ask_all
from chaos_mpi.membership import host_of
from chaos_mpi.monitor.hostlinks import UP

Answer = dict[str, Any]
Job = dict[str, Any]

#: A member that does not answer so soon is shown as silent, seconds.
ANSWER_LIMIT_S = 1.0
#: What is said then of a job of which no member does.
NOBODY = f"no member of the job answers within {ANSWER_LIMIT_S:.0f} s; it is starting, or has just ended, or hangs"
#: States of members of which nothing is known: those that do not answer, and those on hosts where nobody is asked.
SILENT, ELSEWHERE = "silent", "elsewhere"
#: What is the same at all members, or is shown as the furthest of them has it.
_COMMON = ("epoch", "step", "steps_per_s", "data_epochs", "members", "min_ranks", "max_ranks", "joins", "changes")


def look(directory: Path) -> Job | None:
    """Ask all members of the job in ``directory``; None if none of them answers.

    Those are all that there are where the launcher is, and else those on this machine.
    """
    answers = ask_all(directory, {"do": "status"}, ANSWER_LIMIT_S)
    if not answers:
        return None
    is_launchers = any(map(marks.may_live, directory.glob(f"{LAUNCHER}-*.json")))
    return combine(answers, began(directory), time.time(), all_asked=is_launchers)


def began(directory: Path) -> float | None:
    """When the job was started, Unix seconds; None if that is not known."""
    try:
        return max((path.stat().st_mtime for path in directory.glob(f"{LAUNCHER}-*.json")), default=None)
    except OSError:
        return None


def combine(answers: Sequence[Answer], started_at: float | None, now: float, *, all_asked: bool = False) -> Job:
    """All that the members know, in JSON values.

    Args:
        answers: at least one; see :meth:`chaos_mpi.elastic.status.MemberStatus.answer`.
        started_at: when the job was started, Unix seconds, if that is known.
        now: Unix seconds.
        all_asked: whether all members were asked, and not only those on the hosts of which one answers.

    Returns:
        ``at``, ``started_at``; ``epoch``, ``step``, ``steps_per_s``, ``data_epochs``, ``members`` (ids in rank order),
        ``min_ranks``, ``max_ranks``, ``joins``, ``changes`` as in an answer; ``ranks``: for every member ``member``,
        ``rank``, ``host``, ``pid``, ``state``, ``step``, ``process`` and ``stalled_s`` (None where it does not answer);
        ``machines``: what is known of each host, by name; ``links`` as in an
        answer; ``witness``, the worst news of it that a member has; ``transfers`` and ``events`` of all, events in
        order of time.
    """
    furthest = max(answers, key=lambda answer: (answer["epoch"], answer["step"]))
    by_member = {answer["member"]: answer for answer in answers}
    asked = None if all_asked else {answer["host"] for answer in answers}
    rates = [answer["steps_per_s"] for answer in answers if answer["steps_per_s"] is not None]
    return {
        "at": now,
        "started_at": started_at,
        **{name: furthest[name] for name in _COMMON},
        "steps_per_s": median_high(rates) if rates else None,
        "ranks": [_rank(rank, member, by_member.get(member), asked) for rank, member in enumerate(furthest["members"])],
        "machines": _machines(furthest, answers),
        "transfers": list({t["member"]: t for answer in answers for t in answer["transfers"]}.values()),
        # A member whose agent was too slow to answer knows of none.
        "links": next((a["links"] for a in (furthest, *answers) if a["links"]), []),
        "witness": min(filter(None, (answer["witness"] for answer in answers)), key=_worst_first, default=None),
        "events": merged(answers),
    }


def merged(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The events of all members, each of them once, in order of time."""
    events = {json.dumps(event, sort_keys=True): event for answer in answers for event in answer["events"]}
    return sorted(events.values(), key=lambda event: float(event["t"]))


def _machines(furthest: Answer, answers: Sequence[Answer]) -> dict[str, Any]:
    """What is known of each host: from what the agents tell each other, or else from its own members."""
    known = {**{answer["host"]: answer["machine"] for answer in answers}, **furthest["machines"]}
    since: dict[str, float] = {}
    for host, machine in [*known.items(), *((answer["host"], answer["machine"]) for answer in answers)]:
        since[host] = min(machine["joined_at"], since.get(host, machine["joined_at"]))
    return {host: {**machine, "joined_at": since[host]} for host, machine in known.items()}


def _rank(rank: int, member: str, answer: Answer | None, asked: Collection[str] | None) -> dict[str, Any]:
    if answer is None:
        pid = member.rpartition(":")[2]
        host = host_of(member)
        state = SILENT if asked is None or host in asked else ELSEWHERE
        known = {"host": host, "pid": int(pid) if pid.isdigit() else None, "state": state}
        return {"member": member, "rank": rank, **known, "step": None, "process": None, "stalled_s": None}
    same = {name: answer[name] for name in ("host", "pid", "step", "process", "stalled_s")}
    return {"member": member, "rank": rank, "state": answer["phase"], **same}


# -- for people to read -------------------------------------------------------------------------------


def lines(job: Job) -> Iterator[str]:
    """The job as text."""
    yield headline(job)
    for rank in job["ranks"]:
        yield "  " + "  ".join(text.rjust(w) if w > 0 else text.ljust(-w) for text, w in _columns(rank)).rstrip()
    for host, machine in sorted(job["machines"].items()):
        yield f"  {host}: {describe_machine(machine, job['at'])}"
    for link in job["links"]:
        if link["state"] != UP:
            yield f"  link {link['a']} - {link['b']}: {describe_link(link)}"
    if job["witness"] is not None and (text := describe_witness(job["witness"])):
        yield f"  {text}"
    for join in job["joins"]:
        yield f"  on its way: {describe_join(join, job['at'])}"
    for transfer in job["transfers"]:
        yield f"  {transfer['member']} fetches the state: {describe_transfer(transfer)}"


def headline(job: Job) -> str:
    """Where the job is, in a line."""
    speed = "" if job["steps_per_s"] is None else f" ({rate_text(job['steps_per_s'])})"
    since = "" if job["started_at"] is None else f", running for {duration(job['at'] - job['started_at'])}"
    size = len(job["members"])
    return f"step {job['step']}{speed}, view {job['epoch']}, {size} member{'s' if size > 1 else ''}{since}"


def rank_cells(rank: dict[str, Any]) -> list[str]:
    """The number, member, state, step, CPU share and memory of one rank."""
    process = rank["process"] or {"cpu_percent": None, "rss_bytes": None}
    step = "-" if rank["step"] is None else str(rank["step"])
    state = rank["state"].partition("[")[0]  # without what an operation is about
    return [
        str(rank["rank"]), rank["member"], state, step, percent(process["cpu_percent"]),
        nbytes(process["rss_bytes"]),
    ]  # fmt: skip


def describe_machine(machine: dict[str, Any], now: float) -> str:
    """Load and memory of a machine, its accelerators, and how long it has been part of the job."""
    load = "-" if machine["load"] is None else " ".join(f"{value:.2f}" for value in machine["load"])
    total, available = machine["memory_total_bytes"], machine["memory_available_bytes"]
    used = None if total is None or available is None else total - available
    cpu = "" if machine["cpu_percent"] is None else f", CPU {percent(machine['cpu_percent'])}"
    models = Counter(machine["accelerators"])
    accelerators = "".join(f", {model}" if n == 1 else f", {n} x {model}" for model, n in models.items())
    return (
        f"load {load} on {machine['cores']} cores{cpu}, "
        f"memory {nbytes(used)} of {nbytes(total)}{accelerators}, "
        f"for {duration(now - machine['joined_at'])}"
    )


def describe_link(link: dict[str, Any]) -> str:
    """State of a link, why there is no detour round it, round-trip time and bandwidth."""
    parts = [f"detour over {link['via']}" if link["via"] else str(link["state"])]
    if link["no_detour"]:
        parts[0] += f", no detour ({link['no_detour']})"
    if link["rtt_ms"] is not None:
        parts.append(f"{link['rtt_ms']:.2f} ms")
    if link["bytes_per_s"] is not None:
        parts.append(f"{nbytes(link['bytes_per_s'])}/s")
    return ", ".join(parts)


def describe_witness(witness: dict[str, str]) -> str:
    """What is to be said of the witness; empty if all is well."""
    where = f"the witness on {witness['host']} is not reachable"
    return {voice.SILENT: where, voice.OUT: f"{where}, and has no vote any more"}.get(witness["state"], "")


def _worst_first(witness: dict[str, str]) -> int:
    return (voice.SILENT, voice.OUT, voice.UP, voice.REPLACED).index(witness["state"])


def describe_join(join: dict[str, Any], now: float) -> str:
    """What is known of a newcomer."""
    since = f", asked for {duration(now - join['asked_at'])} ago" if join["asked_at"] else ""
    name = f" ({join['newcomer']})" if join["newcomer"] else ""
    return f"{join['id']}{name}, {join['stage']}, started by {join['sponsor']}, attempt {join['attempt']}{since}"


def describe_transfer(transfer: dict[str, Any]) -> str:
    """How far a newcomer is with fetching the state, and from whom."""
    left = "" if transfer["left_s"] is None else f", {transfer['left_s']:.0f} s left"
    sources = ", ".join(f"{member} {nbytes(rate)}/s" for member, rate in transfer["rates_bytes_per_s"].items())
    return f"{nbytes(transfer['got_bytes'])} of {nbytes(transfer['wanted_bytes'])}{left} ({sources})"


def duration(seconds: float) -> str:
    """A time in units that can be read."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def nbytes(number: float | None) -> str:
    """A number of bytes in units that can be read."""
    if number is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}" if number < 100 * size else f"{number / size:.0f} {unit}"
    return f"{number:.0f} B"


def percent(number: float | None) -> str:
    """A percentage, or a dash where it is not known."""
    return "-" if number is None else f"{number:.0f} %"


def rate_text(steps_per_s: float) -> str:
    """A speed: steps per second, or seconds per step where that is easier to read."""
    return f"{steps_per_s:.1f} steps/s" if steps_per_s >= 0.95 or not steps_per_s else f"{1 / steps_per_s:.1f} s/step"


def _columns(rank: dict[str, Any]) -> Iterator[tuple[str, int]]:
    number, member, state, step, cpu, memory = rank_cells(rank)
    yield f"rank {number:>3}", -8
    yield member, -24
    yield state, -16
    yield f"step {step}", -12
    yield f"CPU {cpu}", -9
    yield memory, 8
