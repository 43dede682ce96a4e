"""Who joins and who leaves: rules of the negotiation, and replicas of the agenda that stay equal whatever happens."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chaos_mpi.membership import (
    Agenda,
    Join,
    Limits,
    Outcome,
    Proposal,
    View,
    cut_is_due,
    negotiate,
    orphaned,
    restart,
    those_that_go,
    with_stayers,
)
from chaos_mpi.membership.negotiation import MAX_ATTEMPTS

ABC = View(0, ("a", "b", "c"))
ANY = Limits()


def join(id_: str, host: str = "") -> Proposal:
    return Proposal("join", id_, host=host)


def leave(id_: str, member: str) -> Proposal:
    return Proposal("leave", id_, member)


def word(kind: str, of: Join, reason: str = "", member: str = "") -> Proposal:
    """What the sponsor has to say of a join."""
    return Proposal(kind, of.id, member or (f"new-{of.id}-{of.attempt}" if kind == "arrived" else ""), of.host,
                    of.attempt, reason)  # fmt: skip


def settle(agenda: Agenda, view: View, *rows: list[Proposal], limits: Limits = ANY) -> Outcome:
    """One negotiation in which the rows that are missing are empty."""
    return negotiate(agenda, view, [*rows, *([] for _ in range(view.size - len(rows)))], limits)


def started(view: View = ABC, *ids: str) -> Outcome:
    """Joins that were just agreed on."""
    return settle(Agenda(), view, [join(id_) for id_ in ids or ("j",)])


# -- orders ------------------------------------------------------------------------------------------------


def order(*members: str) -> Proposal:
    return Proposal("order", "order", order=members)


def test_an_order_of_just_these_members_is_taken() -> None:
    outcome = settle(Agenda(), ABC, [], [order("a", "c", "b")], [order("c", "b", "a")])
    assert outcome == Outcome(Agenda(), order=("a", "c", "b"))
    assert Proposal.from_json(json.loads(json.dumps(order("a", "c").to_json()))) == order("a", "c")


@pytest.mark.parametrize("members", [(), ("a", "b", "c"), ("a", "c"), ("a", "c", "b", "d"), ("a", "c", "c")])
def test_other_orders_change_nothing(members: tuple[str, ...]) -> None:
    assert settle(Agenda(), ABC, [order(*members)]) == Outcome(Agenda())


def test_an_order_waits_for_other_changes() -> None:
    asked = order("a", "c", "b")
    assert settle(Agenda(), ABC, [asked, leave("l", "b")]).order == ()
    assert settle(Agenda(), ABC, [asked, Proposal("move", "m", name="x")]).order == ()
    going = started()
    assert settle(going.agenda, ABC, [asked]).order == ("a", "c", "b")  # its start takes long
    arrived = settle(going.agenda, ABC, [asked, word("arrived", going.start[0])])
    assert arrived.admit
    assert arrived.order == ()
    assert settle(replace(Agenda(), replicating=going.start), ABC, [asked]).order == ()


# -- leaves ------------------------------------------------------------------------------------------------


def test_a_member_leaves() -> None:
    outcome = settle(Agenda(), ABC, [leave("l", "b")])
    assert outcome.leave == ("b",)
    assert outcome.agenda == Agenda((), frozenset({"l"}))
    assert (outcome.start, outcome.admit, dict(outcome.refused)) == ((), (), {})


def test_leavers_are_named_in_rank_order_whatever_the_order_of_the_requests() -> None:
    assert settle(Agenda(), ABC, [leave("1", "c"), leave("2", "a")]).leave == ("a", "c")


def test_who_is_no_member_cannot_leave() -> None:
    outcome = settle(Agenda(), ABC, [leave("l", "x")])
    assert outcome.leave == ()
    assert outcome.refused == {"l": "x is not a member; members are a, b, c"}
    assert outcome.agenda.settled == {"l"}


def test_the_last_rank_cannot_leave() -> None:
    outcome = settle(Agenda(), View(0, ("a",)), [leave("l", "a")])
    assert (outcome.leave, outcome.refused) == ((), {"l": "a cannot leave: it is the last rank"})
    outcome = settle(Agenda(), ABC, [leave("1", "a"), leave("2", "b"), leave("3", "c")], limits=Limits(min_ranks=0))
    assert outcome.leave == ("a", "b")
    assert outcome.refused == {"3": "c cannot leave: it is the last rank"}


def test_a_job_that_is_told_to_end_does_nothing_else() -> None:
    agenda = Agenda(settled=frozenset({"old"}))
    stops = [[Proposal("stop", "stop", member, reason=name)] for member, name in (("b", "SIGHUP"), ("c", "SIGTERM"))]
    outcome = settle(agenda, ABC, [leave("l", "a"), join("j"), Proposal("move", "m", name="x")], *stops)
    assert outcome == Outcome(agenda, stop="SIGHUP")


def test_some_of_those_that_were_to_go_stay_if_too_many_others_have_died() -> None:
    assert those_that_go({"a", "c"}, ABC, 1) == ("a", "c")
    assert those_that_go({"a", "c"}, View(0, ("b", "c")), 1) == ("c",)
    assert those_that_go({"a", "c"}, View(0, ("a", "c")), 1) == ("c",)
    assert those_that_go({"a", "c"}, View(0, ("c",)), 1) == ()
    assert those_that_go({"a", "c"}, ABC, 2) == ("c",)
    assert those_that_go({"a", "c"}, View(0, ("a", "c")), 3) == ()
    assert those_that_go({"a", "c"}, ABC, 0) == ("a", "c")
    wishes = [leave("1", "c"), leave("2", "a"), leave("3", "a"), leave("4", "x")]
    outcome = with_stayers(settle(Agenda(), ABC, wishes), {"a"}, wishes)
    assert outcome.leave == ("c",)
    why = "a cannot leave: too few ranks would be left"
    assert dict.fromkeys(("2", "3"), why).items() <= outcome.refused.items()
    assert set(outcome.refused) == {"2", "3", "4"}


def test_leaves_stop_at_min_ranks_in_the_order_of_their_ids() -> None:
    outcome = settle(Agenda(), ABC, [leave("2", "a")], [leave("1", "c")], limits=Limits(min_ranks=2))
    assert outcome.leave == ("c",)
    assert outcome.refused == {"2": "a cannot leave: 1 ranks would be left, and min_ranks is 2"}


def test_deaths_below_min_ranks_do_not_let_others_leave() -> None:
    outcome = settle(Agenda(), View(0, ("a", "b")), [leave("1", "a")], limits=Limits(min_ranks=3))
    assert outcome.leave == ()
    assert "1 ranks would be left, and min_ranks is 3" in outcome.refused["1"]


def test_two_requests_for_one_member_are_both_carried_out_by_one_leave() -> None:
    outcome = settle(Agenda(), ABC, [leave("1", "b"), leave("2", "b"), leave("3", "c")], limits=Limits(min_ranks=1))
    assert (outcome.leave, outcome.refused) == (("b", "c"), {})
    assert outcome.agenda.settled == {"1", "2", "3"}


def test_a_second_request_for_a_member_that_left_is_refused() -> None:
    first = settle(Agenda(), ABC, [leave("1", "b")])
    again = settle(first.agenda, ABC.next(["a", "c"]), [leave("1", "b"), leave("2", "b")])
    assert again.leave == ()
    assert list(again.refused) == ["2"]


# -- a move to another launcher ----------------------------------------------------------------------------


def move(id_: str, name: str = "state") -> Proposal:
    return Proposal("move", id_, name=name)


def test_a_job_moves_once_whoever_asks() -> None:
    outcome = settle(Agenda(), ABC, [move("2", "two")], [move("1", "one")])
    assert outcome.move == move("1", "one")
    assert outcome.refused == {"2": "the job moves to another launcher already"}
    assert settle(outcome.agenda, ABC, [move("1", "one")], [move("2", "two")]).move is None


def test_a_move_does_not_keep_the_rest_from_being_done() -> None:
    """In case that it comes to nothing."""
    proposals = [leave("l", "b"), join("j")]
    moving = settle(Agenda(), ABC, [*proposals, move("m")])
    plain = settle(Agenda(), ABC, proposals)
    assert moving == replace(plain, move=move("m"), agenda=replace(plain.agenda, settled=plain.agenda.settled | {"m"}))


def test_a_move_survives_the_way_to_the_others() -> None:
    assert Proposal.from_json(json.loads(json.dumps(move("m").to_json()))) == move("m")


# -- joins -------------------------------------------------------------------------------------------------


def test_a_join_is_started_by_a_member() -> None:
    outcome = settle(Agenda(), ABC, [], [join("j", host="h")])
    assert outcome.start == outcome.agenda.joins
    (started_,) = outcome.start
    assert (started_.id, started_.host, started_.attempt, started_.newcomer) == ("j", "h", 1, "")
    assert started_.sponsor in ABC.members
    assert outcome.agenda.settled == {"j"}


def test_joins_that_are_agreed_on_together_are_spread_over_the_members() -> None:
    assert sorted(j.sponsor for j in started(ABC, "1", "2", "3").start) == ["a", "b", "c"]


def test_joins_are_agreed_on_in_the_order_of_their_ids() -> None:
    outcome = settle(Agenda(), ABC, [join("2")], [join("3")], [join("1")], limits=Limits(max_ranks=5))
    assert [j.id for j in outcome.start] == ["1", "2"]
    assert list(outcome.refused) == ["3"]


def test_the_lower_rank_decides_between_requests_of_one_id() -> None:
    outcome = settle(Agenda(), ABC, [], [join("j", host="from-b")], [join("j", host="from-c")])
    assert [j.host for j in outcome.start] == ["from-b"]


def test_max_ranks_counts_those_on_their_way_and_those_that_come_in_now() -> None:
    limits = Limits(max_ranks=5)
    first = settle(Agenda(), ABC, [join("1"), join("2")], limits=limits)
    assert len(first.start) == 2
    on_their_way = settle(first.agenda, ABC, [join("3")], limits=limits)
    assert on_their_way.start == ()
    assert on_their_way.refused == {
        "3": "the job has 5 ranks, counting those on their way, and max_ranks is 5",
    }
    coming_in = settle(first.agenda, ABC, [word("arrived", first.start[0]), join("4")], limits=limits)
    assert [j.id for j in coming_in.admit] == ["1"]
    assert list(coming_in.refused) == ["4"]


def test_who_leaves_and_who_is_given_up_makes_room() -> None:
    limits = Limits(max_ranks=4)
    first = settle(Agenda(), ABC, [join("1")], limits=limits)
    outcome = settle(first.agenda, ABC, [leave("2", "b"), join("3")], limits=limits)
    assert (outcome.leave, [j.id for j in outcome.start if j.id == "3"]) == (("b",), ["3"])
    outcome = settle(first.agenda, ABC, [word("misfit", first.start[0]), join("4")], limits=limits)
    assert [j.id for j in outcome.start] == ["4"]


def test_a_sponsor_is_among_those_that_stay() -> None:
    for ids in itertools.permutations(("x", "y", "z")):
        outcome = settle(Agenda(), ABC, [leave("l", "a"), *map(join, ids)])
        assert outcome.leave == ("a",)
        assert {j.sponsor for j in outcome.start} == {"b", "c"}


# -- the way of a join -------------------------------------------------------------------------------------


def test_nothing_new_leaves_a_join_under_way() -> None:
    first = started()
    outcome = settle(first.agenda, ABC)
    assert outcome == Outcome(first.agenda)


def test_who_has_arrived_is_admitted_and_forgotten() -> None:
    first = started(ABC, "1", "2", "3")
    outcome = settle(first.agenda, ABC, [word("arrived", first.start[2])], [word("arrived", first.start[0])])
    assert [(j.id, j.newcomer) for j in outcome.admit] == [("1", "new-1-1"), ("3", "new-3-1")]  # in the agreed order
    assert outcome.agenda.joins == (first.start[1],)
    assert outcome.start == ()


def test_a_misfit_is_refused_and_not_tried_again() -> None:
    first = started()
    outcome = settle(first.agenda, ABC, [word("misfit", first.start[0], "it has another torch")])
    assert outcome.refused == {"j": "it has another torch"}
    assert (outcome.agenda.joins, outcome.start, outcome.admit) == ((), (), ())
    assert settle(outcome.agenda, ABC, [join("j")]).start == ()


def test_a_failed_start_is_tried_again_by_another_sponsor_until_it_is_given_up() -> None:
    outcome, sponsors = started(), []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        (current,) = outcome.start
        assert outcome.agenda.joins == (current,)
        assert current.attempt == attempt
        assert current.failure == (f"no luck {attempt - 1}" if attempt > 1 else "")
        sponsors.append(current.sponsor)
        outcome = settle(outcome.agenda, ABC, [word("failed", current, f"no luck {attempt}")])
    assert sorted(sponsors) == ["a", "b", "c"]
    assert outcome.refused == {"j": f"given up after {MAX_ATTEMPTS} attempts: no luck {MAX_ATTEMPTS}"}
    assert (outcome.agenda.joins, outcome.start) == ((), ())


def test_only_the_word_on_the_present_attempt_counts() -> None:
    first = started()
    second = settle(first.agenda, ABC, [word("failed", first.start[0])])
    late = [word("arrived", first.start[0]), word("failed", first.start[0]), word("misfit", first.start[0])]
    assert settle(second.agenda, ABC, late) == Outcome(second.agenda)
    early = replace(second.start[0], attempt=3)
    assert settle(second.agenda, ABC, [word("arrived", early)]) == Outcome(second.agenda)


def test_word_on_a_join_that_nobody_knows_is_ignored() -> None:
    stranger = Join("x", "", 0, "a")
    words = [word(kind, stranger) for kind in ("arrived", "failed", "misfit")]
    assert settle(Agenda(), ABC, words) == Outcome(Agenda())


@pytest.mark.parametrize("how", ["died", "leaves", "leaves and says that the newcomer is up"])
def test_a_join_goes_on_with_another_sponsor_when_its_own_is_gone(how: str) -> None:
    first = started()
    (lost,) = first.start
    rest = [m for m in ABC.members if m != lost.sponsor]
    if how == "died":
        assert not orphaned(first.agenda, ABC)
        assert orphaned(first.agenda, ABC.next(rest))
        outcome = settle(first.agenda, ABC.next(rest))
    else:
        row = [leave("l", lost.sponsor)]
        if how != "leaves":
            row.append(word("arrived", lost))
        outcome = settle(first.agenda, ABC, row)
        assert outcome.leave == (lost.sponsor,)
    (again,) = outcome.start
    assert (again.id, again.attempt, again.newcomer, outcome.admit) == ("j", 2, "", ())
    assert again.sponsor in rest
    assert outcome.agenda.joins == (again,)
    assert not orphaned(outcome.agenda, ABC.next(rest))


def test_a_join_that_loses_each_sponsor_is_given_up() -> None:
    view = View(0, tuple("abcdefgh"))
    outcome = started(view)
    for _ in range(MAX_ATTEMPTS):
        (current,) = outcome.agenda.joins
        view = view.next(m for m in view.members if m != current.sponsor)
        outcome = settle(outcome.agenda, view)
    assert outcome.refused == {"j": f"given up after {MAX_ATTEMPTS} attempts: its sponsor {current.sponsor} is gone"}
    assert outcome.agenda.joins == ()


def test_a_misfit_is_refused_even_if_its_sponsor_leaves() -> None:
    first = started()
    (current,) = first.start
    outcome = settle(first.agenda, ABC, [leave("l", current.sponsor), word("misfit", current, "too old")])
    assert outcome.refused == {"j": "too old"}
    assert outcome.agenda.joins == ()


def test_joins_that_could_not_be_admitted_start_again_or_are_given_up() -> None:
    first = started(ABC, "1", "2", "3")
    tired = replace(first.start[1], attempt=MAX_ATTEMPTS)
    agenda = replace(first.agenda, joins=(first.start[0], tired, first.start[2]))
    admitted = settle(agenda, ABC, [word("arrived", j) for j in agenda.joins[:2]])
    assert [j.id for j in admitted.admit] == ["1", "2"]
    after, again, given_up = restart(admitted.agenda, ABC, admitted.admit)
    assert [(j.id, j.attempt, j.newcomer) for j in again] == [("1", 2, "")]
    assert again[0].failure
    assert [j.id for j in given_up] == ["2"]
    assert again[0].sponsor in ABC.members
    assert again[0].sponsor != first.start[0].sponsor
    assert after.joins == (first.start[2], again[0])
    assert after.settled == admitted.agenda.settled


# -- while newcomers replicate -----------------------------------------------------------------------------


def test_who_arrives_while_others_replicate_waits_for_them() -> None:
    first, second = started(ABC, "a", "b").start
    going = Agenda((second,), frozenset("ab"), (replace(first, newcomer="x"),))
    outcome = settle(going, ABC, [word("arrived", second, member="y")])
    assert outcome.admit == ()
    (waiting,) = outcome.agenda.joins
    assert waiting.newcomer == "y"
    assert not outcome.agenda.has_waiting
    done = settle(outcome.agenda, ABC, [Proposal("caught_up", "a")])
    assert [j.newcomer for j in done.activate] == ["x"]
    assert done.agenda.has_waiting
    assert [j.newcomer for j in settle(done.agenda, ABC).admit] == ["y"]


def test_who_waits_starts_again_when_its_sponsor_dies() -> None:
    first, second = started(ABC, "a", "b").start
    waiting = replace(second, newcomer="y")
    going = Agenda((waiting,), frozenset("ab"), (replace(first, newcomer="x"),))
    left = ABC.next(m for m in ABC.members if m != second.sponsor)
    assert orphaned(going, left)
    (again,) = settle(going, left).start
    assert (again.id, again.attempt, again.newcomer) == ("b", 2, "")


def test_there_is_one_cut_and_one_activation() -> None:
    replicating = (replace(started(ABC, "a").start[0], newcomer="x"),)
    going = Agenda((), frozenset("a"), replicating)
    some = settle(going, ABC, [Proposal("ready", "a")], [Proposal("ready", "a")])
    assert not some.cut, "the third member does not know of the newcomer's links yet"
    cut = settle(some.agenda, ABC, [], [], [Proposal("ready", "a")])
    assert cut.cut
    assert cut.agenda.cut
    late = settle(cut.agenda, ABC, [Proposal("ready", "a")])
    assert not late.cut
    assert late.agenda.replicating == replicating
    done = settle(late.agenda, ABC, [], [Proposal("caught_up", "a")])
    assert done.activate == replicating
    assert done.agenda == Agenda((), frozenset("a"))
    assert settle(done.agenda, ABC, [Proposal("caught_up", "a")]).activate == ()


def test_the_cut_waits_for_no_member_that_is_gone() -> None:
    going = Agenda((), frozenset("a"), (replace(started(ABC, "a").start[0], newcomer="x"),))
    some = settle(going, ABC, [Proposal("ready", "a")], [Proposal("ready", "a")]).agenda
    assert not cut_is_due(some, ABC)
    left = ABC.next(ABC.members[:2])
    assert cut_is_due(some, left)
    assert settle(some, left).cut


@pytest.mark.parametrize("when", ["while it waits", "before all know that it is up"])
def test_who_was_up_and_hangs_is_started_again(when: str) -> None:
    first, second = started(ABC, "a", "b").start
    going = Agenda((second,), frozenset("ab"), (replace(first, newcomer="x"),))
    words = [word("arrived", second, member="y")]
    if when == "while it waits":
        going = settle(going, ABC, words).agenda
        words = []
    outcome = settle(going, ABC, [*words, word("failed", second, "it does not answer")])
    (again,) = outcome.start
    assert (again.id, again.attempt, again.newcomer, outcome.admit) == ("b", 2, "", ())
    assert settle(outcome.agenda, ABC, [word("failed", second)]).agenda == outcome.agenda


def test_those_that_replicate_count_for_max_ranks() -> None:
    going = Agenda((), frozenset("a"), (replace(started(ABC, "a").start[0], newcomer="x"),))
    assert settle(going, ABC, [join("b")], limits=Limits(1, 4)).refused


# -- for all of it -----------------------------------------------------------------------------------------


@st.composite
def situations(draw: st.DrawFn) -> tuple[Agenda, View, list[list[Proposal]], Limits]:
    """An agenda that a negotiation left behind, and new proposals, some of them nonsense."""
    view = View(0, tuple(draw(st.permutations("abcde"))[: draw(st.integers(1, 5))]))
    limits = Limits(draw(st.integers(0, 4)), draw(st.none() | st.integers(1, 8)))
    first = negotiate(Agenda(), view, [[join(f"{i}") for i in range(draw(st.integers(0, 4)))]], limits)
    kinds = st.sampled_from(["join", "leave", "arrived", "failed", "misfit"])
    proposals = st.builds(
        Proposal, kinds, st.sampled_from([str(i) for i in range(9)]), st.sampled_from([*"abcdex", ""]),
        attempt=st.integers(0, 1),
    )  # fmt: skip
    rows = [draw(st.lists(proposals, max_size=4)) for _ in view.members]
    deaths = draw(st.sets(st.sampled_from(view.members), max_size=view.size - 1))
    return first.agenda, view.next(m for m in view.members if m not in deaths), rows, limits


@settings(max_examples=100, deadline=None)
@given(situations())
def test_the_same_proposals_again_change_nothing(
    situation: tuple[Agenda, View, list[list[Proposal]], Limits],
) -> None:
    agenda, view, rows, limits = situation
    once = negotiate(agenda, view, rows, limits)
    stayed = view.next(m for m in view.members if m not in once.leave)
    requested = {p.id for row in rows for p in row if p.kind in ("join", "leave")}
    # There can be no word yet on a join that is only being asked for.
    possible = [[p for p in row if p.id not in requested or p.kind in ("join", "leave")] for row in rows]
    assert once.agenda.settled == agenda.settled | requested
    assert negotiate(once.agenda, stayed, possible, limits) == Outcome(once.agenda)


@settings(max_examples=100, deadline=None)
@given(situations())
def test_what_follows_depends_on_nothing_but_json_values(
    situation: tuple[Agenda, View, list[list[Proposal]], Limits],
) -> None:
    agenda, view, rows, limits = situation
    rows_again = [[Proposal.from_json(json.loads(json.dumps(p.to_json()))) for p in row] for row in rows]
    agenda_again = Agenda.from_json(json.loads(json.dumps(agenda.to_json())))
    assert (rows_again, agenda_again) == (rows, agenda)
    outcome = negotiate(agenda, view, rows, limits)
    assert negotiate(agenda_again, view, rows_again, limits) == outcome
    assert Agenda.from_json(json.loads(json.dumps(outcome.agenda.to_json()))) == outcome.agenda


@settings(max_examples=100, deadline=None)
@given(situations(), st.randoms(use_true_random=False))
def test_it_matters_not_who_makes_a_request(
    situation: tuple[Agenda, View, list[list[Proposal]], Limits], random: Any
) -> None:
    agenda, view, rows, limits = situation
    first_of_id = {(p.kind in ("join", "leave"), p.id): p for row in reversed(rows) for p in reversed(row)}
    proposals = list(first_of_id.values())
    expected = negotiate(agenda, view, [proposals], limits)
    random.shuffle(proposals)
    cuts = sorted(random.randint(0, len(proposals)) for _ in range(3))
    shuffled = [proposals[a:b] for a, b in itertools.pairwise([0, *cuts, len(proposals)])]
    assert negotiate(agenda, view, shuffled, limits) == expected


@settings(max_examples=100, deadline=None)
@given(situations())
def test_limits_hold_and_everybody_named_is_a_member(
    situation: tuple[Agenda, View, list[list[Proposal]], Limits],
) -> None:
    agenda, view, rows, limits = situation
    outcome = negotiate(agenda, view, rows, limits)
    staying = [m for m in view.members if m not in outcome.leave]
    assert len(staying) >= min(view.size, max(1, limits.min_ranks))
    assert set(outcome.leave) <= set(view.members)
    size = len(staying) + len(outcome.admit) + len(outcome.agenda.joins)
    if limits.max_ranks is not None:
        assert size <= max(limits.max_ranks, view.size + len(agenda.joins))
    assert all(j.sponsor in staying for j in (*outcome.agenda.joins, *outcome.admit))
    assert set(outcome.start) <= set(outcome.agenda.joins)
    assert not {j.id for j in outcome.admit} & {j.id for j in outcome.agenda.joins}
    assert not any(j.newcomer for j in outcome.agenda.joins)


class Job(RuleBasedStateMachine):
    """A job whose members hold replicas of the agenda; each replica is worked out by its member alone.

    As in a session, whoever is in the view takes part in a negotiation, and may die between its proposals being
    gathered and the outcome being carried out.
    """

    @initialize(members=st.integers(1, 5), min_ranks=st.integers(1, 4), room=st.none() | st.integers(0, 4))
    def begin(self, members: int, min_ranks: int, room: int | None) -> None:
        names = tuple(f"m{i}" for i in range(members))
        self.view = View(0, names)
        self.limits = Limits(min(min_ranks, members), None if room is None else members + room)
        self.agendas = dict.fromkeys(names, Agenda())
        self.inboxes: dict[str, list[Proposal]] = {name: [] for name in names}
        self.words: dict[str, list[Proposal]] = {name: [] for name in names}  # of processes that a member has started
        self.everything: list[Proposal] = []
        self.numbers = itertools.count()
        self.seen: set[str] = set()
        self.kinds: dict[str, str] = {}
        self.ends: Counter[str] = Counter()
        self.admitted: Counter[str] = Counter()
        self.cuts: Counter[tuple[str, int]] = Counter()

    # -- what members do -----------------------------------------------------------------------------------

    def propose(self, member: str, proposal: Proposal) -> None:
        self.inboxes[member].append(proposal)
        self.everything.append(proposal)

    @rule(data=st.data())
    def ask_for_a_rank(self, data: st.DataObject) -> None:
        number = next(self.numbers)
        self.kinds[f"{number}"] = "join"
        self.propose(self.one_of(data), join(f"{number}"))

    @rule(data=st.data())
    def ask_to_leave(self, data: st.DataObject) -> None:
        number = next(self.numbers)
        self.kinds[f"{number}"] = "leave"
        self.propose(self.one_of(data), leave(f"{number}", data.draw(st.sampled_from([*self.view.members, "x"]))))

    @precondition(lambda self: self.everything)
    @rule(data=st.data())
    def repeat_an_old_proposal(self, data: st.DataObject) -> None:
        again = data.draw(st.sampled_from(self.everything))
        if again.kind in ("join", "leave") or again.id in self.seen:
            self.inboxes[self.one_of(data)].append(again)

    @precondition(lambda self: any(self.words.values()))
    @rule(data=st.data(), kind=st.sampled_from(["arrived", "arrived", "failed", "misfit"]))
    def a_newcomer_is_up_or_not(self, data: st.DataObject, kind: str) -> None:
        sponsor = data.draw(st.sampled_from([m for m, words in self.words.items() if words]))
        started_ = self.words[sponsor].pop()
        self.propose(sponsor, replace(started_, kind=kind, member=f"n{started_.id}-{started_.attempt}"))

    @precondition(lambda self: self.agenda.replicating)
    @rule(data=st.data(), kind=st.sampled_from(["ready", "caught_up"]))
    def newcomers_get_on(self, data: st.DataObject, kind: str) -> None:
        self.propose(self.one_of(data), Proposal(kind, data.draw(st.sampled_from(self.agenda.replicating)).id))

    @precondition(lambda self: self.view.size > 1)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.bury({self.one_of(data)})

    @rule(data=st.data())
    def negotiate(self, data: st.DataObject) -> None:
        dying = data.draw(st.sets(st.sampled_from(self.view.members), max_size=min(1, self.view.size - 1)), "dying")
        admissible = data.draw(st.booleans() | st.just(True), "the newcomers are taken in")
        overlapping = data.draw(st.booleans(), "the members train on meanwhile")
        self.hold(dying, admissible, overlapping, forgetful=data.draw(st.booleans(), "they propose it again"))

    # -- what becomes of it --------------------------------------------------------------------------------

    def one_of(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.view.members))

    def bury(self, dead: set[str]) -> None:
        self.view = self.view.next(m for m in self.view.members if m not in dead)
        for name in dead:
            del self.agendas[name], self.inboxes[name], self.words[name]

    def hold(self, dying: set[str], admissible: bool, overlapping: bool, forgetful: bool) -> None:
        contributors = View(0, self.view.members)
        rows = [list(self.inboxes[m]) for m in contributors.members]
        self.bury(dying)
        outcomes = {
            m: negotiate(self.agendas[m], contributors, [[replace(p) for p in row] for row in rows], self.limits)
            for m in self.view.members
        }
        outcome = outcomes[self.view.members[0]]
        assert all(other == outcome for other in outcomes.values())
        self.agendas = {m: o.agenda for m, o in outcomes.items()}
        if not forgetful:
            for inbox in self.inboxes.values():
                inbox.clear()
        requests = [p for row in rows for p in row if p.kind in ("join", "leave")]
        new = {p.id: p for p in requests if p.id not in self.seen}
        self.seen |= set(new)
        self.check_sponsors(outcome, contributors)
        self.check_leaves(outcome, contributors, new)
        self.ends.update(list(outcome.refused))
        self.part(set(outcome.leave))
        for join_ in outcome.start:
            self.sponsor(join_)
        self.cuts.update((j.id, j.attempt) for j in self.agenda.replicating if outcome.cut)
        if outcome.activate:
            self.admit(outcome.activate, admissible)
        if outcome.admit and overlapping:
            assert not self.agenda.replicating
            self.agendas = {m: replace(agenda, replicating=outcome.admit) for m, agenda in self.agendas.items()}
        elif outcome.admit:
            self.admit(outcome.admit, admissible)

    def check_sponsors(self, outcome: Outcome, contributors: View) -> None:
        staying = [m for m in contributors.members if m not in outcome.leave]
        assert all(j.sponsor in staying for j in (*outcome.agenda.joins, *outcome.admit, *outcome.start))

    def check_leaves(self, outcome: Outcome, contributors: View, new: dict[str, Proposal]) -> None:
        if outcome.leave:
            assert contributors.size - len(outcome.leave) >= max(1, self.limits.min_ranks)
        for id_, proposal in new.items():
            if proposal.kind == "leave":
                assert (id_ in outcome.refused) != (proposal.member in outcome.leave)
                self.ends[id_] += proposal.member in outcome.leave

    def part(self, leaving: set[str]) -> None:
        going = leaving & set(self.view.members)
        if going == set(self.view.members):  # all others have died meanwhile; a model has to go on with somebody
            going.remove(self.view.members[0])
        self.bury(going)

    def sponsor(self, join_: Join) -> None:
        if join_.sponsor in self.words:
            self.words[join_.sponsor].append(word("", join_))

    def admit(self, joins: tuple[Join, ...], admissible: bool) -> None:
        assert all(j.newcomer for j in joins)
        if not admissible:
            again = {m: restart(agenda, self.view, joins) for m, agenda in self.agendas.items()}
            after, starting, given_up = again[self.view.members[0]]
            assert all(other == (after, starting, given_up) for other in again.values())
            self.agendas = {m: agenda for m, (agenda, _, _) in again.items()}
            self.ends.update(j.id for j in given_up)
            for join_ in starting:
                self.sponsor(join_)
            return
        agenda = Agenda.from_json(json.loads(json.dumps(self.agendas[self.view.members[0]].to_json())))
        self.view = self.view.next([*self.view.members, *(j.newcomer for j in joins)])
        for join_ in joins:
            self.admitted[join_.id] += 1
            self.ends[join_.id] += 1
            self.agendas[join_.newcomer], self.inboxes[join_.newcomer] = agenda, []
            self.words[join_.newcomer] = []

    # -- what holds at any time ----------------------------------------------------------------------------

    @invariant()
    def all_replicas_are_equal(self) -> None:
        assert list(self.agendas) != []
        assert set(self.agendas) == set(self.view.members)
        assert len(set(self.agendas.values())) == 1

    @invariant()
    def there_are_never_too_many(self) -> None:
        if self.limits.max_ranks is not None:
            assert self.view.size + self.agenda.expected <= self.limits.max_ranks

    @invariant()
    def each_request_is_settled_once(self) -> None:
        under_way = [j.id for j in (*self.agenda.joins, *self.agenda.replicating)]
        assert max(self.cuts.values(), default=1) == 1
        assert len(set(under_way)) == len(under_way)
        assert self.agenda.settled == self.seen
        assert max(self.admitted.values(), default=1) == 1
        assert {id_: self.ends[id_] + under_way.count(id_) for id_ in self.seen} == dict.fromkeys(self.seen, 1)
        assert all(self.kinds[id_] == "join" for id_ in (*under_way, *self.admitted))

    @property
    def agenda(self) -> Agenda:
        return self.agendas[self.view.members[0]]

    def teardown(self) -> None:
        """Whatever is under way comes to an end when all processes fail."""
        rounds = 0
        while hasattr(self, "view") and (self.agenda.expected or any(self.inboxes.values())):
            rounds += 1
            assert rounds <= 3 * MAX_ATTEMPTS + 3
            if self.agenda.replicating:
                self.propose(self.view.members[0], Proposal("caught_up", self.agenda.replicating[0].id))
            for sponsor, words in self.words.items():
                for started_ in words:
                    self.propose(sponsor, replace(started_, kind="failed"))
                words.clear()
            self.hold(set(), admissible=False, overlapping=False, forgetful=False)
            self.each_request_is_settled_once()


def test_replicas_of_the_agenda_stay_equal_and_no_request_is_lost() -> None:
    run_state_machine_as_test(Job, settings=settings(max_examples=80, stateful_step_count=30, deadline=None))
