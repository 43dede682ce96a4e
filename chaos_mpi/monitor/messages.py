"""What node agents tell each other. The sender, with its incarnation, is known from the authenticated connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from chaos_mpi.monitor.cluster import ClusterView, Node


class Ballot(NamedTuple):
    """Number of an attempt to decide on the next view; no two proposers use the same."""

    number: int
    proposer: Node


class Vote(NamedTuple):
    """The members that somebody voted for, and in which ballot."""

    ballot: Ballot
    members: tuple[Node, ...]


class Row(NamedTuple):
    """Whom one node hears.

    Attributes:
        origin: who says so.
        version: grows with every row of this origin; the highest one known is the newest.
        age_s: how old it is, by what those it went through have added.
        late: the members that it has not heard lately, and for how many seconds it had not heard them.
    """

    origin: Node
    version: int
    age_s: float
    late: tuple[tuple[Node, float], ...]


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat.

    Attributes:
        epoch: of the sender's view.
        stamp_s: when it was sent, by the sender's clock; no other clock is compared with it.
        echo_s: the newest stamp of the receiver, in this epoch, that the sender stands by; None for none.
        rows: the sender's, and others' where there is trouble.
        leaving: whether the sender acts no more, and votes until there is a view without it.
        held_s: how long ago that stamp came to the sender.
    """

    epoch: int
    stamp_s: float
    echo_s: float | None
    rows: tuple[Row, ...]
    leaving: bool = False
    held_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prepare:
    """Paxos 1a: let me decide on the view of this epoch."""

    epoch: int
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Promise:
    """Paxos 1b: no lower ballot will get my vote; my last vote was this."""

    epoch: int
    ballot: Ballot
    vote: Vote | None


@dataclass(frozen=True, slots=True)
class Accept:
    """Paxos 2a: vote for these members."""

    epoch: int
    vote: Vote


@dataclass(frozen=True, slots=True)
class Accepted:
    """Paxos 2b: I voted for it."""

    epoch: int
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Refused:
    """A higher ballot has my promise."""

    epoch: int
    ballot: Ballot
    promised: Ballot


@dataclass(frozen=True, slots=True)
class Decided:
    """This view has been agreed on. Who is not in it is out."""

    view: ClusterView


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """The sender, which is no member, wants to become one. To be repeated until it is."""


Message = Beat | Prepare | Promise | Accept | Accepted | Refused | Decided | JoinRequest


class Sent(NamedTuple):
    """A message on its way."""

    to: Node
    message: Message


def to_json(message: Message) -> dict[str, Any]:
    """A message as a JSON-able dict."""
    fields: dict[str, Any] = {"kind": type(message).__name__}
    if isinstance(message, Decided):
        return {**fields, "view": message.view.to_json()}
    return {**fields, **{name: getattr(message, name) for name in message.__slots__}}


def from_json(fields: Mapping[str, Any]) -> Message:
    """The reverse of :func:`to_json`.

    Raises:
        ValueError: it is no message; the text says why.
    """
    kind = fields.get("kind")
    try:
        match kind:
            case "Beat":
                echo_s = fields["echo_s"]
                rows = tuple(_row(row) for row in fields["rows"])
                return Beat(
                    int(fields["epoch"]), float(fields["stamp_s"]), None if echo_s is None else float(echo_s), rows,
                    bool(fields["leaving"]), float(fields["held_s"]),
                )  # fmt: skip
            case "Prepare":
                return Prepare(int(fields["epoch"]), _ballot(fields["ballot"]))
            case "Promise":
                vote = fields["vote"]
                return Promise(int(fields["epoch"]), _ballot(fields["ballot"]), None if vote is None else _vote(vote))
            case "Accept":
                return Accept(int(fields["epoch"]), _vote(fields["vote"]))
            case "Accepted":
                return Accepted(int(fields["epoch"]), _ballot(fields["ballot"]))
            case "Refused":
                return Refused(int(fields["epoch"]), _ballot(fields["ballot"]), _ballot(fields["promised"]))
            case "Decided":
                return Decided(ClusterView.from_json(fields["view"]))
            case "JoinRequest":
                return JoinRequest()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a message of kind {kind} cannot be read: {error!r}") from error
    raise ValueError(f"there is no message of kind {kind!r}")


def _node(pair: Any) -> Node:
    name, incarnation = pair
    return Node(str(name), int(incarnation))


def _ballot(pair: Any) -> Ballot:
    number, proposer = pair
    return Ballot(int(number), _node(proposer))


def _vote(pair: Any) -> Vote:
    ballot, members = pair
    return Vote(_ballot(ballot), tuple(_node(member) for member in members))


def _row(fields: Any) -> Row:
    origin, version, age_s, late = fields
    silent = tuple((_node(node), float(seconds)) for node, seconds in late)
    return Row(_node(origin), int(version), float(age_s), silent)
