"""What happened to a job, told from its event log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]

#: How the time from a join request to the first contribution is split.
JOIN_PARTS = {
    "launch_s": "start",
    "waited_s": "wait for the members",
    "grow_s": "connect",
    "probe_s": "measure links",
    "cut_wait_s": "wait for the cut",
    "scheduling_s": "plan",
    "transfer_s": "transfer",
    "catch_up_s": "catch up",
    "restore_s": "take over",
    "regroup_s": "regroup",
    "first_step_s": "first step",
}

_WITNESS_STATES = {
    "silent": "the witness on {} is not reachable",
    "up": "the witness on {} is reachable again",
    "out": "the witness on {} is given up, and has no vote any more",
    "replaced": "a rank on {} votes in the place of the witness",
}
_LINK_STATES = {"cut": "cut", "down": "not to be used", "detour": "goes round by ", "up": "up"}


def runs(events: list[Event]) -> list[list[Event]]:
    """The events of each job in a log to which several jobs were appended, as by a resume; the earliest job first.

    Those are of one job that were ever together: every member is listed with others, or trains alone. Processes that
    were to join and never did belong to none.
    """
    job_of: dict[str, set[str]] = {}
    for event in events:
        together = {event["member"], *event.get("members", ())}
        jobs = {id(job): job for job in (job_of.get(member, {member}) for member in together)}
        merged = set().union(*jobs.values())
        job_of.update(dict.fromkeys(merged, merged))
    found: dict[int, list[Event]] = {}
    for event in sorted(events, key=lambda e: e["t"]):
        found.setdefault(id(job_of[event["member"]]), []).append(event)
    trained = [job for job in found.values() if len(found) == 1 or any(e["event"] == "step" for e in job)]
    return trained or [sorted(events, key=lambda e: e["t"])]


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that happened.

    Attributes:
        key: tells it from others, however many members tell of it.
        t: when, Unix seconds.
        step: the steps finished then.
        text: what, in words.
    """

    key: tuple[str, ...]
    t: float
    step: int
    text: str


def rows(events: list[Event]) -> list[tuple[float, int, str]]:
    """The story in order of time: seconds since the start, step, and what happened."""
    start = min(e["t"] for e in events)
    return sorted((line.t - start, line.step, line.text) for line in story(events))


def story(events: list[Event]) -> list[Line]:
    """What happened, in order of time. ``events`` are in order of time, and need not go back to the start."""
    told = []
    views: dict[int, Event] = {}
    recoveries: dict[int, list[Event]] = {}
    for event in events:
        if event["event"] == "view_committed":
            views.setdefault(event["epoch"], event)
        elif event["event"] == "recovered":
            recoveries.setdefault(event["epoch"], []).append(event)
    first = next((e for e in events if e["event"] == "session_started" and not e.get("newcomer")), None)
    if first is not None:
        told.append(_line(first, f"training started with {first['size']} ranks"))
    before = set(first["members"]) if first is not None else None
    for epoch, view in sorted(views.items()):
        told.append(_line(view, _change(view, before), epoch))
        before = set(view["members"])
        if epoch in recoveries:
            # The one that took longest is what the job as a whole waited for.
            worst = max(recoveries[epoch], key=lambda e: e["total_ms"])
            parts = ", ".join(
                f"{part} {worst[part + '_ms']:.0f}" for part in ("detect", "revoke", "shrink", "exchange", "redo")
            )
            told.append(_line(worst, f"went on after {worst['total_ms']:.0f} ms ({parts})", epoch))
    for active in (e for e in events if e["event"] == "join_active"):
        parts = ", ".join(f"{word} {active[name] * 1e3:.0f}" for name, word in JOIN_PARTS.items() if name in active)
        text = f"{active['member']} contributes, {active['total_s'] * 1e3:.0f} ms after the request ({parts})"
        told.append(_line(active, text, active["member"]))
    told += _told_by_all(events, "link_changed", ("a", "b", "state", "via"), _link)
    told += _told_by_all(events, "detour_failed", ("a", "b", "reason"), _no_detour)
    told += _told_by_all(events, "witness_changed", ("witness", "state"), _witness)
    ended = [e for e in events if e["event"] == "session_ended" and e["outcome"] != "left"]
    going_on = (before or set()) - {e["member"] for e in ended}
    if ended and not (going_on and all(e["outcome"] == "crashed" for e in ended)):
        told.append(_line(ended[-1], _ending(ended)))
    return sorted(told, key=lambda line: (line.t, line.step, line.text))


def _told_by_all(events: list[Event], name: str, fields: Sequence[str], text: Callable[[Event], str]) -> list[Line]:
    """What every member tells of, and as often as it happens; those with the same fields are of one thing."""
    times: Counter[tuple[str, ...]] = Counter()
    first: dict[tuple[str, ...], Line] = {}
    for event in (e for e in events if e["event"] == name):
        news = tuple(str(event[field]) for field in fields)
        times[event["member"], *news] += 1
        number = str(times[event["member"], *news])
        first.setdefault((*news, number), _line(event, text(event), *news, number))
    return list(first.values())


def _link(event: Event) -> str:
    return f"link {event['a']} - {event['b']}: {_LINK_STATES[event['state']]}{event['via']}"


def _no_detour(event: Event) -> str:
    return f"link {event['a']} - {event['b']}: no detour ({event['reason']})"


def _witness(event: Event) -> str:
    return _WITNESS_STATES[event["state"]].format(event["host"])


def _line(event: Event, text: str, *key: object) -> Line:
    return Line((event["event"], *map(str, key)), event["t"], event["step"], text)


def _change(view: Event, before: set[str] | None) -> str:
    """What a change of the view was, in words; ``before`` are the members before, if they are known."""
    now = set(view["members"])
    ranks = f"{view['size']} rank{'s' if view['size'] > 1 else ''}"
    if view["cause"] == "join":
        who = ", ".join(sorted(now - before)) if before is not None else "others"
        return f"{who} joined; {ranks} train on"
    if view["cause"] == "leave":
        who = ", ".join(sorted(before - now)) if before is not None else "others"
        return f"{who} left; {ranks} train on"
    if view["cause"] == "order":
        return f"the ranks are in another order, in which slow links carry less: {', '.join(view['members'])}"
    lost = ", ".join(view["lost"]) or "nobody"
    return f"{lost} died; {ranks} {'are' if view['size'] > 1 else 'is'} left"


def _ending(ended: list[Event]) -> str:
    finished = [e for e in ended if e["outcome"] == "finished"]
    if not finished:
        return f"ended: {ended[-1]['outcome']}"
    digests = {e["params_digest"] for e in finished}
    if digests == {""}:
        return f"finished; the {len(finished)} replicas were not compared, as the script has no TrainingState"
    size = max(e["size"] for e in finished)
    if len(digests) == 1 and len(finished) < size:
        return f"finished; digest {digests.pop()} at the {len(finished)} of {size} ranks that this is from"
    if size == 1:
        return f"finished with one replica (digest {digests.pop()})"
    if len(digests) == 1:
        return f"finished; all {len(finished)} replicas are bitwise identical (digest {digests.pop()})"
    return f"finished; the {len(finished)} replicas DIFFER"


def draw(events: list[Event], path: Path) -> None:
    """Cluster size over time, and the loss if it was recorded, changes of the view marked, as a PNG.

    Needs matplotlib (extra ``plot``).
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    start = min(e["t"] for e in events)
    rank = min((e["rank"] for e in events if e["event"] == "step"), default=0)
    steps = [e for e in events if e["event"] == "step" and e["rank"] == rank]
    losses = [(e["t"] - start, e["loss"]) for e in steps if e.get("loss") is not None]
    marks = {"failure": ("tab:red", "died"), "join": ("tab:blue", "joined"), "leave": ("tab:orange", "left")}
    marks["order"] = ("tab:gray", "other order")
    changes = {e["epoch"]: (e["t"] - start, *marks[e["cause"]]) for e in events if e["event"] == "view_committed"}
    if losses:
        figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 5.5), height_ratios=(3, 1))
        above.plot(*zip(*losses, strict=True), linewidth=1, color="tab:blue")
        above.set_yscale("log")
        above.set_ylabel("loss")
    else:
        figure, below = plt.subplots(figsize=(9, 3))
        above = below
    below.step([e["t"] - start for e in steps], [e["size"] for e in steps], where="post", color="tab:green")
    below.set_ylim(bottom=0)
    below.set_ylabel("ranks")
    below.set_xlabel("seconds since the start")
    for axes in {above, below}:
        axes.grid(alpha=0.3)
        for moment, color, _ in changes.values():
            axes.axvline(moment, color=color, linestyle="--", linewidth=1)
    for line, (moment, color, what) in enumerate(changes.values()):
        place = (moment, 1 - 0.06 * (line % 3))  # so that texts close to each other can be read
        above.annotate(f" rank {what}", place, xycoords=("data", "axes fraction"), color=color, va="top")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
