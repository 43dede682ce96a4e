"""A long run in which ranks join, leave and die all the time, at random: the training is as if nothing had happened."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from checks import check_history
from churn import JOIN_TIMEOUT_S, LEAST, MOST, Churn
from jobs import Finished, start_training
from problem import Problem, as_trained, read_traces

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEED = 20250519
#: One epoch takes about a second. Steps are slow, so that there is processor time left to start newcomers.
PROBLEM = Problem(ranks=4, samples=480, epochs=10**6, pause_s=0.025)


@pytest.mark.timeout(0, method="signal")
@pytest.mark.parametrize("policy", ["blocking", "overlap"])
def test_training_survives_churn(policy: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    events: int = request.config.getoption("--churn-events")
    seed: int = request.config.getoption("--churn-seed") or SEED
    print(f"--churn-seed {seed}")
    short = tempfile.TemporaryDirectory(prefix="churn-")  # the name of a socket may have no more than 107 characters
    request.addfinalizer(short.cleanup)
    (tmp_path / "t").symlink_to(short.name)
    environment = {
        "TMPDIR": short.name,
        "CHAOS_JOIN_POLICY": policy,
        "CHAOS_JOIN_TIMEOUT_S": str(JOIN_TIMEOUT_S),
    }
    options = ["--max-ranks", str(MOST)]
    with start_training(
        tmp_path, PROBLEM, may_be_armed=True, environment=environment, options=options,
        limit_s=120.0 + 10.0 * events, timeout_s=90.0,
    ) as job:  # fmt: skip
        churn = Churn(job, PROBLEM.ranks, overlap=policy == "overlap", seed=seed)
        churn.run(events)
        finished = job.finish()
        print(f"{events} events: {dict(churn.done)}")
        check_churn(finished, churn)


def check_churn(job: Finished, churn: Churn) -> None:
    """Assert that no step and no sample was lost or done twice, and that nobody was lost who was not killed."""
    traces = read_traces(job.folder)
    last_step = max(max(trace.steps, default=0) for trace in traces.values())
    final = {member for member, trace in traces.items() if last_step in trace.steps}
    steps = check_history(job, as_trained(PROBLEM, job.folder), final)
    assert LEAST <= len(final) <= MOST
    assert set(steps[last_step]) <= final

    died = {int(path.name.removeprefix("died-")) for path in job.folder.glob("died-*")}
    views: dict[int, list[str]] = {}
    for event in job.events("view_committed"):
        members = views.setdefault(event["epoch"], event["members"])
        assert members == event["members"], f"view {event['epoch']} is not the same at all its members"
        lost = {int(member.rpartition(":")[2]) for member in event["lost"]}
        assert lost <= died, f"{lost - died} were lost, and nobody had killed them"
    assert sorted(views) == list(range(1, len(views) + 1))
    assert max(map(len, views.values())) <= MOST
    assert len([v for v in views.values() if len(v) == MOST]) + len([v for v in views.values() if len(v) == LEAST])

    members = {member for view in views.values() for member in view}
    for event in job.events("session_ended"):
        if event["outcome"] == "left":
            assert event["member"] in churn.told_to_leave
        elif event["member"] in members:
            assert event["outcome"] == "finished", event
        else:
            assert event["outcome"] == "crashed", event  # a newcomer that lost the member which had started it
    active = job.events("join_active")
    assert active, "nobody joined, so this run has tested little"
    for event in active:
        assert event["member"] in steps[event["step"]], "it said that it contributed to a step, and did not"
