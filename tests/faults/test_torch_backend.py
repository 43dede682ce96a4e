"""``torch.distributed`` on the backend ``chaos``, with ranks that are killed, join and leave."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from checks import check_survival
from fault_points import Rule
from jobs import start, start_training
from problem import Problem
from test_kills import BINOMIAL, STEP, WITHHOLD, die, in_allreduce, in_recovery
from test_membership_changes import FIRST, LONG, check_changes, rule, until_ready

pytestmark = [pytest.mark.faults, pytest.mark.timeout(100, method="signal")]

HOOK = Problem(wrapper="hook")
KILLS: dict[str, tuple[list[Rule], set[int]]] = {
    "in the very first forward": ([die(1, "forward", 0)], {1}),
    "between two buckets": ([die(2, "between buckets")], {2}),
    "rank 0 inside the allreduce": (in_allreduce(0, 2, [1, 3]), {0}),
    "a second one while shrinking": (in_recovery("shrink"), {1, 2}),
    "all but one, one by one": ([die(0, "forward", 2), die(2, "between buckets", 4), die(1, "boundary", 8)], {0, 1, 2}),
}


@pytest.mark.parametrize("case", KILLS, ids=lambda case: case.replace(" ", "-"))
def test_the_hook_survives_a_kill(case: str, tmp_path: Path) -> None:
    rules, dead = KILLS[case]
    with start_training(tmp_path, HOOK, rules) as job:
        check_survival(job.finish(), HOOK, dead)


def test_the_finished_result_is_adopted_with_the_hook(tmp_path: Path) -> None:
    with start_training(tmp_path, HOOK, WITHHOLD, environment=BINOMIAL, plain_mpirun=True) as job:
        finished = job.finish()
        steps = check_survival(finished, HOOK, {3}, status=None)
    assert finished.member(3) in steps[STEP + 1], "the step that others had finished was done again without rank 3"


def seen_in(program: str, folder: Path, ranks: int = 4) -> dict[int, Any]:
    """What each rank that came to the end of a part of ``torch_program.py`` saw."""
    with start("torch_program.py", folder, program, str(folder), ranks=ranks) as job:
        assert job.finish().status == 0
    return {int(path.stem.removeprefix("saw-")): json.loads(path.read_text()) for path in folder.glob("saw-*.json")}


@pytest.mark.parametrize("wrong", [0, 1])
def test_ranks_in_the_environment_have_to_be_those_of_mpi(wrong: int, tmp_path: Path) -> None:
    environment = {"WRONG": str(wrong)}
    with start("torch_program.py", tmp_path, "by_environment", str(tmp_path), ranks=2, environment=environment) as job:
        finished = job.finish()
    if wrong:
        assert finished.status == 1
        assert "in MPI, and was told to be rank" in finished.output
    else:
        assert finished.status == 0


def test_a_rank_dies_before_there_is_a_group(tmp_path: Path) -> None:
    assert set(seen_in("initialising", tmp_path).values()) == {3.0}


def test_an_error_in_a_frame_that_destroys_the_group_is_of_one_rank(tmp_path: Path) -> None:
    with start("torch_program.py", tmp_path, "fails_in_a_frame", str(tmp_path), ranks=3) as job:
        finished = job.finish()
    assert finished.status == 0
    assert "1 of 3 ranks crashed on the way: KeyError: 'a mistake of one rank'" in finished.output
    assert sorted(path.name for path in tmp_path.glob("saw-*")) == ["saw-0.json", "saw-2.json"]
    assert {path.read_text() for path in tmp_path.glob("saw-*")} == {"2"}


def test_a_rank_leaves_in_a_frame_that_destroys_the_group(tmp_path: Path) -> None:
    with start("torch_program.py", tmp_path, "leaves_in_a_frame", str(tmp_path), ranks=3) as job:
        finished = job.finish()
    assert finished.status == 0
    assert "Traceback" not in finished.output
    assert "crashed" not in finished.output
    assert {e["outcome"] for e in finished.events("session_ended")} == {"finished", "left"}
    assert {path.read_text() for path in tmp_path.glob("saw-*")} == {"2"}


def test_a_rank_dies_while_the_model_is_wrapped(tmp_path: Path) -> None:
    seen = seen_in("wrapping", tmp_path)
    assert set(seen) == {0, 2, 3}
    assert seen[0] == seen[2] == seen[3]
    assert seen[0]["size"] == 3


def test_unmodified_ddp_goes_on(tmp_path: Path) -> None:
    seen = seen_in("unmodified_ddp", tmp_path)
    assert set(seen) == {0, 2, 3}
    assert seen[0] == seen[2] == seen[3]
    before, during, after = seen[0][:2], seen[0][2], seen[0][3:]
    assert before == [2.5, 2.5]
    # DDP divides before it sums, by the number of ranks that it knew then.
    assert during == pytest.approx(8 / 4) or during == pytest.approx(8 / 3)
    assert after == pytest.approx([8 / 3] * 3)


def test_collectives_leave_the_dead_out(tmp_path: Path) -> None:
    seen = seen_in("collectives", tmp_path)
    assert set(seen) == {0, 1, 3}
    for rank, saw in seen.items():
        assert saw["gathered"] == [1, 2, 1, 4]
        assert saw["sums"] == [[3.0, 4.0]] * 20
        assert saw["average"] == pytest.approx(4 / 3)
        assert saw["now"] == [min(rank, 2), 3]


def test_lists_stay_as_long_as_they_were(tmp_path: Path) -> None:
    seen = seen_in("objects", tmp_path)
    assert set(seen) == {0, 2, 3}
    for saw in seen.values():
        assert saw["first"] == [0, 0, 20, 30]
        assert saw["second"][:3] == [0, 20, 30]  # torch asks for the number of ranks in each call
        assert saw["old ranks"] == [0, 0, 2, 3]


def test_rank_0_has_a_successor_as_root_and_others_have_none(tmp_path: Path) -> None:
    seen = seen_in("roots", tmp_path)
    assert set(seen) == {1, 2}
    for saw in seen.values():
        assert saw["broadcast"] == [1, 1, 1]
        assert "only rank 0 has a successor" in saw["error"]
        assert saw["sum"] == [3, 3, 3]


def test_a_group_keeps_its_numbers_when_others_die(tmp_path: Path) -> None:
    seen = seen_in("names", tmp_path)
    assert set(seen) == {1, 2, 3}
    assert seen[2] == {"group": [0, 2], "sum": 5.0, "from peer": 3.0, "from root": 3.0}
    assert seen[3] == {"group": [1, 2], "sum": 5.0, "from peer": 2.0, "from root": 3.0}


def test_fsdp_says_that_its_group_is_broken(tmp_path: Path) -> None:
    seen = seen_in("fully_sharded", tmp_path)
    assert {rank: saw["step"] for rank, saw in seen.items()} == {0: 2, 2: 2, 3: 2}
    assert all("make a new one" in saw["error"] for saw in seen.values())


def test_an_object_that_only_the_dead_rank_had(tmp_path: Path) -> None:
    seen = seen_in("handing_out_objects", tmp_path)
    assert set(seen) == {1, 2, 3}
    for saw in seen.values():
        assert "the root of 'broadcast" in saw["error"]
        assert saw["second"] == [1]


def test_objects_for_each_rank_that_only_the_dead_rank_had(tmp_path: Path) -> None:
    seen = seen_in("scattering_objects", tmp_path)
    assert set(seen) == {1, 2, 3}
    for rank, saw in seen.items():
        assert "the root of 'broadcast" in saw["error"]
        assert saw["second"] == [{"to": rank - 1}]


def test_what_was_to_be_gathered_at_a_rank_that_dies_is_lost_and_nobody_else(tmp_path: Path) -> None:
    seen = seen_in("gathering", tmp_path)
    assert set(seen) == {1, 2, 3}
    assert [seen[rank]["second"] for rank in (1, 2, 3)] == [[1, 2, 3], None, None]


def test_groups_of_those_that_are_left(tmp_path: Path) -> None:
    seen = seen_in("subgroups", tmp_path, ranks=5)
    assert {rank: saw["sum"] for rank, saw in seen.items()} == {0: 1.0, 2: 1.0, 3: 5.0, 4: 5.0}
    assert all(saw["ranks"] == [0, 1, 2, 3] for saw in seen.values())


def test_messages_of_a_dead_rank_do_not_come_and_those_of_others_do(tmp_path: Path) -> None:
    seen = seen_in("messages", tmp_path)
    assert set(seen) == {1, 2, 3}
    assert "rank 0 has died" in seen[1]["error"]
    assert (seen[1]["source"], seen[1]["received"]) == (2, 7.0)
    assert [seen[rank]["now"] for rank in (1, 2, 3)] == [[0, 3], [1, 3], [2, 3]]


def test_a_group_of_some_ends_with_one_of_them(tmp_path: Path) -> None:
    seen = seen_in("group_of_some", tmp_path)
    assert set(seen) == {0, 1, 3}
    for rank in (0, 1):
        assert seen[rank]["before"] == 3.0
        assert len(seen[rank]["errors"]) == 2
        assert all("make a new one" in error for error in seen[rank]["errors"])
    assert [saw["after"] for saw in seen.values()] == [3.0] * 3


def test_a_sharded_optimizer_heals_from_the_other_node(tmp_path: Path) -> None:
    seen = seen_in("sharded_optimizer", tmp_path)
    assert set(seen) == {0, 3}
    for saw in seen.values():
        assert saw["equal"], "the parameters are not those of an optimizer that is not sharded"
        assert saw["error"] == ""
        assert saw["kept"] == [0, 1]
    assert seen[0]["parameters"] == seen[3]["parameters"]


def test_a_rank_that_leaves_hands_its_part_of_a_sharded_optimizer_over(tmp_path: Path) -> None:
    seen = seen_in("sharded_optimizer_and_a_leave", tmp_path)
    assert set(seen) == {0, 2, 3}
    for saw in seen.values():
        assert saw["equal"], "the parameters are not those of an optimizer that is not sharded"
        assert saw["error"] == ""
        assert saw["parameters"] == seen[0]["parameters"]
    assert sorted(number for saw in seen.values() for number in saw["kept"]) == [0, 1, 2, 3]


def test_a_sharded_optimizer_says_when_nothing_is_left_to_heal_from(tmp_path: Path) -> None:
    seen = seen_in("sharded_optimizer_without_replica", tmp_path)
    assert set(seen) == {2}
    assert "parts [1] of the optimizer's state have died" in seen[2]["error"]


def test_a_rank_joins_with_the_hook(tmp_path: Path) -> None:
    problem = dataclasses.replace(LONG, wrapper="hook")
    with start_training(tmp_path, problem, [rule(1, "boundary", "join", step=3), *until_ready()], limit_s=90) as job:
        steps = check_changes(job.finish(), problem, joined=[FIRST])
    assert len(steps[max(steps)]) == 4


def test_a_rank_leaves_with_the_hook(tmp_path: Path) -> None:
    with start_training(tmp_path, HOOK, [rule(2, "boundary", "leave", step=3)]) as job:
        check_changes(job.finish(), HOOK, left=[2])


@pytest.mark.parametrize("plain_mpirun", [False, True])
def test_the_traceback_of_a_mistake_is_printed(plain_mpirun: bool, tmp_path: Path) -> None:
    with start("torch_program.py", tmp_path, "mistaken", str(tmp_path), ranks=2, plain_mpirun=plain_mpirun) as job:
        finished = job.finish()
    assert "KeyError: 'a mistake in the script'" in finished.output
    assert "in mistaken" in finished.output
    assert plain_mpirun or finished.status != 0
