"""How members agree, without an administrator, on who joins and who leaves.

Any member may propose. At a step boundary all members hold the same list of proposals, in rank order, and each works
out what follows from it by itself: :func:`negotiate` is a pure function of the agenda so far, the view and
the proposals, so all come to the same outcome. Every request has an id, and one that was dealt with is never
dealt with again, so a proposal that is repeated after a failure does no harm.

A join goes through these stages::

    requested -> spawning (its sponsor starts the process) -> arrived (it is up and fits) -> admitted, and forgotten
                    ^   |                                        |
                    +---+ sponsor died, or the start failed <----+  (up to MAX_ATTEMPTS times)

Where the members train on while newcomers get the state, those that were admitted are *replicating* until they are as
far as the members: first their links are measured, then the state of one step, the *cut*, is fixed for them, and once
they have caught up they are activated, all together. Others that arrive meanwhile wait.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from chaos_mpi.membership.hosts import HostList, HostSlots, as_entries, newest
from chaos_mpi.membership.restarts import Crash, Restart, judge
from chaos_mpi.membership.view import View

#: A join is given up after its process failed to start so often.
MAX_ATTEMPTS = 3
#: Begins why requests are refused once the job is to go on under another launcher.
MOVES = "the job moves to another launcher"
_REQUESTS = frozenset({"join", "leave", "move", "restart", "stop"})


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one member wants all to do.

    Attributes:
        kind: ``join``; ``leave`` (``member`` is to go); ``arrived`` (the newcomer of join ``id`` is up, and is
            called ``member``); ``failed`` (attempt number ``attempt`` to start it came to nothing, perhaps after it
            was up); ``misfit`` (it is up and cannot be used, so it is not tried again); ``ready`` and ``caught_up``
            (the newcomers that are replicating, join ``id`` among them, are ready for the cut, or as far as they can
            get); ``hosts`` (the machines that there are now are ``hosts``); ``move`` (all are to end, with their
            state kept as ``name``, because the job goes on under another launcher); ``restart`` (``member`` crashed,
            and one more rank is to run on ``host``); ``order`` (the members are to be in the order ``order``); ``stop``
            (all are to end, because the job was told to).
        id: of the request; unique in the life of a job.
        member: see ``kind``; empty for a join.
        host: for a join, the machine it is to run on; empty for any.
        attempt: for ``arrived`` and ``failed``, the number of the attempt they speak of.
        reason: for a person to read; for ``restart``, how the rank ended; for ``stop``, the name of the signal.
        asked_at: when the request was made, Unix seconds, by the clock of its origin; 0 if not known.
        waited_s: how long ago that was when it was put before the members, seconds; their clocks may differ.
        hosts: see ``kind``.
        name: see ``kind``.
        obstacle: for ``restart``, why it cannot be; empty if it can as far as its origin knows.
        order: see ``kind``.
    """

    kind: str
    id: str
    member: str = ""
    host: str = ""
    attempt: int = 0
    reason: str = ""
    asked_at: float = 0.0
    waited_s: float = 0.0
    hosts: tuple[HostSlots, ...] = ()
    name: str = ""
    obstacle: str = ""
    order: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        return cls(**{**fields, "hosts": as_entries(fields["hosts"]), "order": tuple(fields["order"])})


@dataclass(frozen=True, slots=True)
class Join:
    """A newcomer on its way.

    Attributes:
        id: of the request.
        host: where it is to run; empty for anywhere.
        turn: a number by which sponsors take turns.
        sponsor: the member that starts it and is its first contact.
        attempt: 1 for the first start.
        newcomer: its member id once it is up, else empty.
        asked_at: when it was asked for, Unix seconds, by the clock of the origin; 0 if not known.
        failure: why the attempt before came to nothing; empty for the first.
    """

    id: str
    host: str
    turn: int
    sponsor: str
    attempt: int = 1
    newcomer: str = ""
    asked_at: float = 0.0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many members a job may have, and how often a rank that crashed is started again on a host within an hour."""

    min_ranks: int = 1
    max_ranks: int | None = None
    restarts_an_hour: int = 0


@dataclass(frozen=True, slots=True)
class Agenda:
    """What is agreed and not yet done; the same at every member.

    Attributes:
        joins: newcomers on their way, in the order in which they were agreed on.
        settled: ids of all requests that were accepted, refused or done.
        replicating: newcomers that are connected, and catch up while the members train.
        ready: members that know all they need to fix the cut for them.
        cut: whether it is fixed.
        hosts: the machines that ranks may run on; None if nobody has looked.
        restarts: of ranks that crashed; those of the last hour, at least.
    """

    joins: tuple[Join, ...] = ()
    settled: frozenset[str] = frozenset()
    replicating: tuple[Join, ...] = ()
    ready: frozenset[str] = frozenset()
    cut: bool = False
    hosts: HostList | None = None
    restarts: tuple[Restart, ...] = ()

    @property
    def expected(self) -> int:
        """How many newcomers are on their way."""
        return len(self.joins) + len(self.replicating)

    @property
    def has_waiting(self) -> bool:
        """Whether a newcomer that is up could be admitted now."""
        return not self.replicating and any(join.newcomer for join in self.joins)

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict. Without those that replicate: it is for them, for when they do no more."""
        hosts = self.hosts.to_json() if self.hosts is not None else None
        return {
            "joins": [asdict(join) for join in self.joins], "settled": sorted(self.settled), "hosts": hosts,
            "restarts": [asdict(restart) for restart in self.restarts],
        }  # fmt: skip

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        hosts = HostList.from_json(fields["hosts"]) if fields["hosts"] is not None else None
        joins = tuple(Join(**join) for join in fields["joins"])
        restarts = tuple(Restart(**restart) for restart in fields["restarts"])
        return cls(joins, frozenset(fields["settled"]), hosts=hosts, restarts=restarts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all members do now.

    Attributes:
        agenda: the agenda from here on.
        start: joins whose sponsor is to start a process now.
        admit: joins whose newcomer is up, to be taken in now, in this order.
        leave: members that go now, in rank order.
        cut: whether the cut is now, for those that are replicating.
        activate: those that were replicating and are to be members now.
        move: the request to move the job to another launcher, before anything else; None if there is none.
        refused: why requests are not carried out, by id.
        crashes: what is done about ranks that crashed.
        order: the members in the order that they are to be in from here on; empty if they stay as they are.
        stop: the name of the signal because of which all end, and nothing else is done; empty if there is none.
    """

    agenda: Agenda
    start: tuple[Join, ...] = ()
    admit: tuple[Join, ...] = ()
    leave: tuple[str, ...] = ()
    cut: bool = False
    activate: tuple[Join, ...] = ()
    move: Proposal | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    crashes: tuple[Crash, ...] = ()
    order: tuple[str, ...] = ()
    stop: str = ""


def negotiate(agenda: Agenda, view: View, proposals: Iterable[Sequence[Proposal]], limits: Limits) -> Outcome:
    """What follows from the proposals of all members.

    Leaves come before joins, and requests of a kind in the order of their ids, then of their origin's rank.

    Args:
        agenda: as after the last negotiation.
        view: the members that took part in this one; some of them may have died since.
        proposals: those of each member, in rank order.
        limits: how small and how large the job may get.
    """
    rows = [list(of_member) for of_member in proposals]
    everything = [proposal for row in rows for proposal in row]
    requests = sorted(
        {p.id: p for p in reversed(everything) if p.kind in _REQUESTS and p.id not in agenda.settled}.values(),
        key=lambda p: (p.kind != "leave", p.id),
    )
    if (stop := next((p for p in requests if p.kind == "stop"), None)) is not None:
        return Outcome(agenda, stop=stop.reason)
    refused: dict[str, str] = {}
    leaving = _leaving([p for p in requests if p.kind == "leave"], view, limits, refused)
    staying = view.next(m for m in view.members if m not in leaving) if len(leaving) < view.size else view
    joins, admit, start = _progress(agenda, everything, staying, refused)
    replicating = _replication(agenda, staying, zip(view.members, rows, strict=False))
    cut = replicating.cut and not agenda.cut
    activate = agenda.replicating if not replicating.replicating else ()
    restarts, crashes = agenda.restarts, []
    obstacles = {p.id: p.obstacle for p in everything if p.obstacle}
    for proposal in [p for p in requests if p.kind in ("join", "restart")]:
        replaced = proposal.kind == "restart" and proposal.member in staying.members
        full = _full(staying.size + len(admit) + len(joins) + len(agenda.replicating) - replaced, limits)
        if proposal.kind == "restart":
            crash, restarts = judge(
                restarts, proposal.host, proposal.reason, proposal.asked_at, limits.restarts_an_hour,
                obstacles.get(proposal.id, "") or full,
            )  # fmt: skip
            crashes.append(crash)
            if crash.obstacle:
                continue
        elif full:
            refused[proposal.id] = full
            continue
        turn = len(agenda.settled) + len(start)
        join = Join(proposal.id, proposal.host, turn, _sponsor(staying, turn), asked_at=proposal.asked_at)
        joins.append(join)
        start.append(join)
    moves = [p for p in requests if p.kind == "move"]
    refused |= {p.id: f"{MOVES} already" for p in moves[1:]}
    settled = agenda.settled | {p.id for p in requests}
    hosts = newest(agenda.hosts, (p.hosts for p in everything if p.kind == "hosts"))
    following = replace(replicating, joins=tuple(joins), settled=settled, hosts=hosts, restarts=restarts)
    move = moves[0] if moves else None
    # With other changes the links change, too; it is asked for again if it is still better then.
    order = () if leaving or admit or agenda.replicating or move else _order(everything, view)
    return Outcome(following, tuple(start), tuple(admit), leaving, cut, activate, move, refused, tuple(crashes), order)


def orphaned(agenda: Agenda, view: View) -> bool:
    """Whether a join has lost its sponsor, so that the members should negotiate."""
    return any(join.sponsor not in view.members for join in agenda.joins)


def cut_is_due(agenda: Agenda, view: View) -> bool:
    """Whether the members should negotiate because all that are left are ready for the cut."""
    return bool(agenda.replicating) and not agenda.cut and agenda.ready >= set(view.members)


def restart(agenda: Agenda, view: View, failed: Iterable[Join]) -> tuple[Agenda, tuple[Join, ...], tuple[Join, ...]]:
    """The agenda after these joins could not be admitted, those to start again, and those that are given up."""
    again: list[Join] = []
    given_up: list[Join] = []
    for join in failed:
        next_try = _again(join, view, "it has ended, or cannot be reached, before it had the state")
        if next_try is None:
            given_up.append(join)
        else:
            again.append(next_try)
    return replace(agenda, joins=(*agenda.joins, *again)), tuple(again), tuple(given_up)


def _full(size: int, limits: Limits) -> str:
    """Why a job of this size takes nobody in; empty if it does."""
    if limits.max_ranks is None or size < limits.max_ranks:
        return ""
    return f"the job has {size} ranks, counting those on their way, and max_ranks is {limits.max_ranks}"


def _leaving(requests: Sequence[Proposal], view: View, limits: Limits, refused: dict[str, str]) -> tuple[str, ...]:
    leaving: set[str] = set()
    for proposal in requests:
        left = view.size - len(leaving) - 1
        if proposal.member not in view.members:
            refused[proposal.id] = f"{proposal.member} is not a member; members are {', '.join(view.members)}"
        elif proposal.member in leaving:
            continue
        elif left < max(1, limits.min_ranks):
            few = f"{left} ranks would be left, and min_ranks is {limits.min_ranks}"
            what = "it is the last rank" if left < 1 else few
            refused[proposal.id] = f"{proposal.member} cannot leave: {what}"
        else:
            leaving.add(proposal.member)
    return tuple(m for m in view.members if m in leaving)


def those_that_go(leaving: Collection[str], view: View, min_ranks: int) -> tuple[str, ...]:
    """Who of the living goes, of those that were granted it: not all if too many others have died since. Pure."""
    going = tuple(m for m in view.members if m in leaving)
    lacking = max(1, min_ranks) - (view.size - len(going))
    return going[max(0, lacking) :]


def with_stayers(outcome: Outcome, stayers: Collection[str], proposals: Iterable[Proposal]) -> Outcome:
    """What follows if members that were to go have to stay, because others have died. Pure.

    Args:
        outcome: as negotiated.
        stayers: the members.
        proposals: those that were negotiated.
    """
    wishes = {p.id: p.member for p in proposals if p.kind == "leave" and p.member in stayers}
    refused = {id_: f"{member} cannot leave: too few ranks would be left" for id_, member in wishes.items()}
    leave = tuple(member for member in outcome.leave if member not in stayers)
    return replace(outcome, leave=leave, refused={**outcome.refused, **refused})


def _order(proposals: Iterable[Proposal], view: View) -> tuple[str, ...]:
    """The first order that is asked for and is one of just these members; empty if there is none, or it is theirs."""
    wanted = (p.order for p in proposals if p.kind == "order" and sorted(p.order) == sorted(view.members))
    order = next(wanted, ())
    return order if order != view.members else ()


def _replication(agenda: Agenda, staying: View, rows: Iterable[tuple[str, Sequence[Proposal]]]) -> Agenda:
    """The agenda as to those that replicate; none do any more if they are to be activated."""
    ids = {join.id for join in agenda.replicating}
    words = [(member, p.kind) for member, row in rows for p in row if p.id in ids]
    if any(kind == "caught_up" for _, kind in words):
        return replace(agenda, replicating=(), ready=frozenset(), cut=False)
    ready = agenda.ready | {member for member, kind in words if kind == "ready"}
    following = replace(agenda, ready=ready)
    return replace(following, cut=agenda.cut or cut_is_due(following, staying))


def _progress(
    agenda: Agenda, proposals: Sequence[Proposal], view: View, refused: dict[str, str]
) -> tuple[list[Join], list[Join], list[Join]]:
    """What has become of the joins under way: those still under way, those to admit, and those to start again."""
    going: list[Join] = []
    admit: list[Join] = []
    again: list[Join] = []
    news = {(p.id, p.attempt): p for p in proposals if p.kind in ("arrived", "failed", "misfit")}
    for join in agenda.joins:
        word = news.get((join.id, join.attempt))
        up = bool(join.newcomer) if word is None else word.kind == "arrived"
        if join.sponsor in view.members and up:
            arrived = replace(join, newcomer=join.newcomer or (word.member if word is not None else ""))
            # A connection to it would have to be made anew for those that come in before it.
            (going if agenda.replicating else admit).append(arrived)
        elif join.sponsor in view.members and word is None:
            going.append(join)
        elif word is not None and word.kind == "misfit":
            refused[join.id] = word.reason
        elif (next_try := _again(join, view, why := _why(join, word))) is not None:
            going.append(next_try)
            again.append(next_try)
        else:
            refused[join.id] = f"given up after {join.attempt} attempts: {why}"
    return going, admit, again


def _why(join: Join, word: Proposal | None) -> str:
    """Why an attempt came to nothing, of which its sponsor said this, if it said anything."""
    return word.reason if word is not None and word.reason else f"its sponsor {join.sponsor} is gone"


def _again(join: Join, view: View, failure: str) -> Join | None:
    if join.attempt >= MAX_ATTEMPTS:
        return None
    turn = join.turn + 1
    if _sponsor(view, turn) == join.sponsor:
        turn += 1  # the view has changed, so that the next turn would be the same one's
    return replace(
        join, attempt=join.attempt + 1, turn=turn, newcomer="", sponsor=_sponsor(view, turn), failure=failure
    )


def _sponsor(view: View, turn: int) -> str:
    # Another one for each attempt, and joins that are agreed on together are spread: starting is slow.
    return view.members[turn % view.size]
