"""Views, and the decision where survivors go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.errors import MismatchError, RecoveryError
from chaos_mpi.membership import Report, View, decide


def report(member: str, finished: int, entered: int) -> Report:
    label = f"op {entered}" if entered > finished else ""
    return Report(member, finished, entered, label, f"op {finished}")


@st.composite
def reachable_reports(draw: st.DrawFn) -> list[Report]:
    """What survivors of a run can report: an operation is finished only after everyone entered it."""
    count = draw(st.integers(1, 9))
    newest_finished = draw(st.integers(0, 50))
    reports = []
    somebody_finished = False
    for i in range(count):
        behind = newest_finished > 0 and draw(st.booleans())
        if behind:
            reports.append(report(f"m{i}", newest_finished - 1, newest_finished))
        else:
            somebody_finished = True
            reports.append(report(f"m{i}", newest_finished, newest_finished + draw(st.integers(0, 1))))
    if not somebody_finished:
        reports[draw(st.integers(0, count - 1))] = report("x", newest_finished, newest_finished)
    return reports


@given(reachable_reports())
def test_all_go_on_after_the_newest_finished_operation(reports: list[Report]) -> None:
    decision = decide(reports)
    assert decision.finished == max(r.finished for r in reports)
    assert set(decision.behind) == {i for i, r in enumerate(reports) if r.finished < decision.finished}
    if decision.behind:
        assert decision.source is not None
        assert reports[decision.source].finished == decision.finished
        # Whoever adopts has contributed: the adopted result is the one it was waiting for.
        assert all(reports[i].label == reports[decision.source].finished_label for i in decision.behind)
    else:
        assert decision.source is None
    assert reports[decision.furthest].entered == max(r.entered for r in reports)


@given(reachable_reports(), st.randoms(use_true_random=False))
def test_the_decision_depends_on_nothing_but_the_reports(reports: list[Report], random: object) -> None:
    again = [Report.from_json(r.to_json()) for r in reports]
    assert decide(again) == decide(reports)


@given(reachable_reports())
def test_a_repeated_recovery_comes_to_the_same_place(reports: list[Report]) -> None:
    """A recovery that broke after some had adopted, and others not, ends where the first would have."""
    first = decide(reports)
    for adopted in range(len(first.behind) + 1):
        partly = list(reports)
        for i in first.behind[:adopted]:
            partly[i] = report(reports[i].member, first.finished, first.finished)
        assert decide(partly).finished == first.finished


def test_members_in_different_calls_are_named() -> None:
    here = Report("a:1", 3, 4, "gradient step", "op")
    there = Report("b:2", 3, 4, "gather", "op")
    with pytest.raises(MismatchError, match=r"number 4 is 'gradient step' on a:1 but 'gather' on b:2"):
        decide([here, there])
    said = replace(there, label="collective call", call="all_reduce of 3 numbers")
    with pytest.raises(MismatchError, match=r"is 'gradient step' on a:1 but 'all_reduce of 3 numbers' on b:2"):
        decide([here, said])
    done = replace(there, entered=3, finished_label="another", finished_call="another in words")
    with pytest.raises(MismatchError, match=r"number 3 is 'op' on a:1 but 'another in words' on b:2"):
        decide([here, done])


def test_a_result_of_another_call_is_never_adopted() -> None:
    ahead = Report("a:1", 4, 4, "", "gather")
    behind = Report("b:2", 3, 4, "gradient step", "op")
    with pytest.raises(MismatchError):
        decide([ahead, behind])


@pytest.mark.parametrize("behind", [(2, 3), (1, 2), (3, 3)])
def test_reports_no_run_can_produce_are_refused(behind: tuple[int, int]) -> None:
    with pytest.raises(RecoveryError):
        decide([report("a", 4, 4), report("b", *behind)])


def test_no_reports() -> None:
    with pytest.raises(RecoveryError):
        decide([])


def test_views() -> None:
    view = View(0, ("a:1", "b:2", "c:3"))
    following = view.next(["a:1", "c:3"])
    assert (following.epoch, following.size, following.rank_of("c:3")) == (1, 2, 1)
    assert view.gone(following.members) == ("b:2",)
    assert following.gone(view.members) == ()
    with pytest.raises(ValueError, match="twice"):
        View(0, ("a:1", "a:1"))
    with pytest.raises(ValueError, match="at least one"):
        View(0, ())
