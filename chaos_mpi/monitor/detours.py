"""Which links between hosts are down, and which third host passes their traffic on. Pure: the time is told.

Links are those of hosts, because all ranks on a host share its routes. One agent speaks for each host, that of the
lowest member that is alive there. For a pair that cannot reach each other the speaker of the lower host leads: it
chooses a third host that hears both, and says so to everybody (``Links``). The speaker of that third host forwards,
and says so to both ends (``Carries``); each of them sets its route then. So both ways go through the same host, and no
route leads to one that does not forward. All of it has to be said again and again: what is not repeated ends by itself.
Heartbeats may be late because an agent gets no processor. So it takes an attempt to connect, too, that has come to
nothing, for the kernel answers to it.

Whether a detour works is seen as any link is, by the heartbeats that arrive. If none do in time, the next host is
tried. While there is a detour both ends try the direct way, too. When it has worked for a while in both directions
(the other end says so to the leader by ``Direct``), the detour is given up.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chaos_mpi.membership import host_of
from chaos_mpi.monitor.cluster import Node
from chaos_mpi.monitor.cuts import detour
from chaos_mpi.monitor.hostlinks import CUT, DETOUR, DOWN, UP, Ends, LinkStatus, Order, Sight, ends_of

#: What agents say to each other of links.
LINKS, CARRIES, DIRECT = "Links", "Carries", "Direct"
KINDS = frozenset({LINKS, CARRIES, DIRECT})
#: How often all is said again, and after what time without that it ends.
RENEW_S, LEASE_S = 0.5, 3.0
#: The direct way is taken again when it has worked for so long.
STEADY_S = 2.0


class Said(NamedTuple):
    """A message, and the member whose agent is to get it."""

    to: str
    fields: dict[str, Any]


class Way(NamedTuple):
    """A route to another host: through which one. A new number means that it is to be set again."""

    via: str
    number: int


@dataclass(slots=True)
class _Led:
    """A link that this agent leads: the host that is tried or in use, since when, and why others were of no use."""

    since_s: float
    via: str = ""
    number: int = 0
    works: bool = False
    refused: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    no_detour: str = ""  # why there is none, once all were tried; until one works
    direct_s: float = -math.inf  # when the other end last said that the direct way works


class Detours:
    """One agent's part.

    Args:
        me: its member, ``host:pid``.
        try_s: a detour that has not brought the ends together by then is of no use.

    Attributes:
        can_route: whether this host's routes may be set.
        can_forward: whether this host may forward.
        bytes_per_s: bandwidth of links, as far as it is known; the faster detour is tried first.
    """

    def __init__(self, me: str, try_s: float, *, can_route: bool = True, can_forward: bool = True) -> None:
        self.me, self.host = me, host_of(me)
        self.can_route, self.can_forward = can_route, can_forward
        self.bytes_per_s: Mapping[Ends, float] = {}
        self._try_s = try_s
        self._sight = Sight((me,), {self.host: me}, frozenset())
        self._led: dict[str, _Led] = {}  # by the other end
        self._over: dict[str, float] = {}  # by the other end of what was led: how long it is said that it is up
        self._ways: dict[str, tuple[Way, float]] = {}  # by the other end, and until when
        self._carried: dict[Ends, tuple[str, float]] = {}  # for whom, and until when
        self._told: dict[str, tuple[dict[Ends, LinkStatus], float]] = {}  # by who said it, and until when
        self._direct_since_s: dict[str, float] = {}
        self._orders: dict[Ends, Order] = {}
        self._unreachable: dict[str, float] = {}  # hosts that could not be connected with, until when that counts
        self._shown: dict[Ends, LinkStatus] = {}
        self._number = 0
        self._said: list[dict[str, Any]] = []
        self._said_s = -math.inf

    @property
    def ways(self) -> dict[str, Way]:
        """The routes that this host should have: for each other host that has one, through which."""
        return {other: way for other, (way, _) in self._ways.items()}

    @property
    def forwards(self) -> bool:
        """Whether this host should pass on what is for others."""
        return bool(self._carried)

    @property
    def links(self) -> dict[Ends, LinkStatus]:
        """The links that are not up, or go round."""
        return {ends: status for ends, status in self._known().items() if status.state != UP}

    def _known(self) -> dict[Ends, LinkStatus]:
        known = {ends: status for told, _ in self._told.values() for ends, status in told.items()}
        return known | {status.ends: status for status in self._own()}

    def changes(self) -> list[LinkStatus]:
        """The links that are otherwise than at the last call. Links of hosts that are gone are not mentioned."""
        known = self._known()
        changed = [known[ends] for ends in sorted(known) if self._shown.get(ends, LinkStatus(ends, UP)) != known[ends]]
        self._shown = known
        return changed

    # -- time and messages ---------------------------------------------------------------------------------------

    def tick(self, sight: Sight, now_s: float) -> list[Said]:
        """Look at the hosts. To be called a few times within the time that a detour is tried for."""
        self._sight = sight
        self._expire(now_s)
        self._over = {o: until_s for o, until_s in self._over.items() if until_s > now_s and o in sight.speakers}
        if sight.speakers.get(self.host) == self.me:
            self._take_over(now_s)
            for other in self._to_lead():
                self._led[other] = _Led(now_s)
                self._over.pop(other, None)
        for other, led in list(self._led.items()):
            self._lead(other, led, now_s)
        return [*self._say_links(now_s), *self._say_direct(now_s)]

    def receive(self, sender: str, fields: Mapping[str, Any], now_s: float) -> list[Said]:
        """Take in a message.

        Raises:
            ValueError: it cannot be understood.
        """
        if sender not in self._sight.members:
            return []
        try:
            match fields["kind"]:
                case "Links":
                    return self._heard_links(sender, {_ends(entry): entry for entry in fields["links"]}, now_s)
                case "Carries":
                    self._heard_carries(
                        host_of(sender), _ends(fields), int(fields["number"]), fields["ok"] is True, now_s
                    )
                case "Direct":
                    if (led := self._led.get(host_of(sender))) is not None:
                        led.direct_s = now_s
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"what {sender} says of links cannot be read: {error!r}") from error
        return []

    def to_probe(self, sight: Sight) -> list[str]:
        """The hosts that this agent should try to connect with: something is late on the links to them, which it leads.

        Args:
            sight: by a shorter silence than that which :meth:`tick` is given.
        """
        if sight.speakers.get(self.host) != self.me:
            return []
        between = [ends for ends in sorted(sight.cut) if sight.hosts.issuperset(ends)]
        return [high for low, high in between if low == self.host and high not in self._led]

    @property
    def orders(self) -> dict[Ends, Order]:
        """What was ordered, for each link the latest."""
        return dict(self._orders)

    def order(self, orders: Mapping[Ends, Order]) -> None:
        """Take note of what was ordered; what is older than what is known counts for nothing."""
        for ends, order in orders.items():
            self._orders[ends] = max(order, self._orders.get(ends, order))

    def refuse_to_forward(self) -> list[Said]:
        """This host cannot forward after all; what is to be said to those that count on it."""
        self.can_forward = False
        carried, self._carried = list(self._carried.items()), {}
        return [answer for ends, (leader, _) in carried for answer in self._answer(leader, ends, 0)]

    def probed(self, other: str, works: bool, now_s: float) -> None:
        """Whether a host could be connected with by the direct way at this time."""
        if works:
            self._direct_since_s.setdefault(other, now_s)
            self._unreachable.pop(other, None)
        else:
            self._direct_since_s.pop(other, None)
            self._unreachable[other] = now_s + RENEW_S

    # -- the leader ----------------------------------------------------------------------------------------------

    def _to_lead(self) -> list[str]:
        """The other ends of links that are cut, and for which nobody does anything so far."""
        known = {ends for told, _ in self._told.values() for ends, status in told.items() if status.state != UP}
        cut = [high for high in self.to_probe(self._sight) if high in self._unreachable]
        down = [high for low, high in self._down() if low == self.host and high in self._sight.speakers]
        return [high for high in {*cut, *down} - self._led.keys() if (self.host, high) not in known]

    def _take_over(self, now_s: float) -> None:
        """Lead what another agent of this host has led, which is gone."""
        for sender, (told, _) in list(self._told.items()):
            if host_of(sender) == self.host and sender not in self._sight.members:
                del self._told[sender]
                for (low, high), status in told.items():
                    if low == self.host and status.state == DETOUR and high not in self._led:
                        self._number += 1
                        self._led[high] = _Led(now_s, status.via, self._number, works=True)

    def _lead(self, other: str, led: _Led, now_s: float) -> None:
        down = (self.host, other) in self._down()
        cut = (self.host, other) in self._sight.cut
        # What was taken over works before it is said to do so.
        carried = other in self._ways or (led.works and now_s - led.since_s < LEASE_S)
        if other not in self._sight.speakers:
            self._end_lead(other)
        elif not (cut or down) and (not carried or self._direct_again(other, led, now_s)):
            self._end_lead(other)
            self._over[other] = now_s + LEASE_S
        else:
            led.works = carried and not cut
            if led.works:
                led.no_detour = ""
            else:
                self._find_way(other, led, now_s)

    def _end_lead(self, other: str) -> None:
        del self._led[other]
        self._ways.pop(other, None)

    def _find_way(self, other: str, led: _Led, now_s: float) -> None:
        waited_s = now_s - led.since_s
        if led.via and (led.refused or waited_s >= self._try_s or not self._is_able(led.via, other)):
            led.failed[led.via] = "cannot pass it on" if led.refused else "was of no use"
            led.via, led.since_s, led.refused = "", now_s, False
            self._ways.pop(other, None)
        if not led.via and self.can_route and (via := self._choice(other, led.failed)):
            self._number += 1
            led.via, led.number, led.since_s = via, self._number, now_s
        elif not led.via:
            # What others see of a link that has just been cut may not be known yet.
            if not self.can_route or led.failed or waited_s >= RENEW_S:
                tried = ", ".join(f"{via} {how}" for via, how in sorted(led.failed.items()))
                nobody = tried or "there is no third host that reaches both"
                led.no_detour = nobody if self.can_route else f"{self.host} may not set routes"
            if waited_s >= 2 * self._try_s:
                led.failed.clear()

    def _choice(self, other: str, failed: Collection[str]) -> str:
        cut = {(Node(low), Node(high)) for low, high in self._unusable()}
        rates = {(Node(low), Node(high)): rate for (low, high), rate in self.bytes_per_s.items()}
        for hosts in (self._sight.hosts, self._sight.speakers):  # over the witness only where there is no other
            able = [Node(host) for host in hosts if host not in failed]
            if (via := detour(Node(self.host), Node(other), able, cut, rates)) is not None:
                return via.name
        return ""

    def _down(self) -> set[Ends]:
        return {ends for ends, order in self._orders.items() if order.down}

    def _unusable(self) -> frozenset[Ends]:
        """Links that no detour may lead over: neither those that are cut nor those that have one themselves."""
        return self._sight.cut | frozenset(self.links) | self._down()

    def _is_able(self, via: str, other: str) -> bool:
        """Whether both ends still reach a host, and not by a detour."""
        hops = {ends_of(self.host, via), ends_of(via, other)}
        return via in self._sight.speakers and hops.isdisjoint(self._unusable())

    def _direct_again(self, other: str, led: _Led, now_s: float) -> bool:
        since_s = self._direct_since_s.get(other, now_s)
        return now_s - since_s >= STEADY_S and now_s - led.direct_s < STEADY_S

    def _is_better_direct(self, other: str, way: Way) -> bool:
        """A detour that is cut itself, while the direct way works again, would make its ends seem to be dead."""
        return other in self._direct_since_s and not {other, way.via} <= self._sight.speakers.keys()

    # -- what is said --------------------------------------------------------------------------------------------

    def _own(self) -> list[LinkStatus]:
        own = [
            _status((self.host, other), self._state(other, led), led.via, led.no_detour)
            for other, led in self._led.items()
        ]
        return own + [LinkStatus((self.host, other), UP) for other in self._over]

    def _state(self, other: str, led: _Led) -> str:
        if led.works:
            return DETOUR
        return DOWN if (self.host, other) in self._down() else CUT

    def _say_links(self, now_s: float) -> list[Said]:
        """To all, at once when something is new, and then again and again."""
        links = [
            {
                "ends": [self.host, other], "state": self._state(other, led), "via": led.via, "number": led.number,
                "no_detour": led.no_detour,
            }
            for other, led in self._led.items()
        ]  # fmt: skip
        links += [{"ends": [self.host, other], "state": UP, "via": "", "number": 0} for other in self._over]
        if links == self._said and (not links or now_s - self._said_s < RENEW_S):
            return []
        self._said, self._said_s = links, now_s
        return [Said(to, {"kind": LINKS, "links": links}) for to in self._sight.members if to != self.me]

    def _say_direct(self, now_s: float) -> list[Said]:
        """To those who lead a detour that this host is the other end of."""
        return [
            Said(self._sight.speakers[other], {"kind": DIRECT})
            for other, since_s in self._direct_since_s.items()
            if other in self._ways and other not in self._led and other in self._sight.speakers
            and now_s - since_s >= STEADY_S
        ]  # fmt: skip

    def _answer(self, leader: str, ends: Ends, number: int) -> list[Said]:
        fields = {"kind": CARRIES, "ends": list(ends), "number": number, "ok": self.can_forward}
        told = dict.fromkeys([leader, *(self._sight.speakers[end] for end in ends if end in self._sight.speakers)])
        return [Said(member, fields) for member in told]

    # -- what is heard -------------------------------------------------------------------------------------------

    def _heard_links(self, sender: str, said: Mapping[Ends, Mapping[str, Any]], now_s: float) -> list[Said]:
        before, _ = self._told.get(sender, ({}, 0.0))
        told = {
            ends: _status(ends, str(fields["state"]), str(fields["via"]), str(fields.get("no_detour", "")))
            for ends, fields in said.items()
        }
        self._told[sender] = (told, now_s + LEASE_S)
        for ends in before.keys() | told.keys():
            if ends not in told or told[ends].state == UP:
                self._end(ends)
        out: list[Said] = []
        for ends, fields in said.items():
            if fields["via"] != self.host or self._sight.speakers.get(self.host) != self.me or self.host in ends:
                self._carried.pop(ends, None)
                continue
            if self.can_forward:
                self._carried[ends] = (sender, now_s + LEASE_S)
            out += self._answer(sender, ends, int(fields["number"]))
        return out

    def _heard_carries(self, via: str, ends: Ends, number: int, ok: bool, now_s: float) -> None:
        low, high = ends
        other = high if low == self.host else low
        led = self._led.get(other)
        if self.host not in ends or (led is None and low == self.host):
            return
        if led is not None and (led.via != via or (ok and led.number != number)):
            return
        if ok:
            self._ways[other] = (Way(via, number), now_s + LEASE_S)
        elif led is not None:
            led.refused = True

    def _end(self, ends: Ends) -> None:
        """Who leads says no more of this link: it is up again, or a host is gone. Unless another one leads it now."""
        if any(ends in told and told[ends].state != UP for told, _ in self._told.values()):
            return
        self._carried.pop(ends, None)
        if self.host in ends:
            for other in {*ends} - {self.host} - self._led.keys():
                self._ways.pop(other, None)

    def _expire(self, now_s: float) -> None:
        for sender in [sender for sender, (_, until_s) in self._told.items() if until_s <= now_s]:
            for ends in self._told.pop(sender)[0]:
                self._end(ends)
        self._ways = {
            other: (way, until_s) for other, (way, until_s) in self._ways.items()
            if until_s > now_s and not self._is_better_direct(other, way)
        }  # fmt: skip
        self._unreachable = {other: until_s for other, until_s in self._unreachable.items() if until_s > now_s}
        self._carried = {ends: kept for ends, kept in self._carried.items() if kept[1] > now_s}
        self._direct_since_s = {o: at_s for o, at_s in self._direct_since_s.items() if o in self._ways}


def _ends(fields: Mapping[str, Any]) -> Ends:
    one, other = fields["ends"]
    return ends_of(str(one), str(other))


def _status(ends: Ends, state: str, via: str, no_detour: str) -> LinkStatus:
    return LinkStatus(ends, state, via if state == DETOUR else "", no_detour if state in (CUT, DOWN) else "")
