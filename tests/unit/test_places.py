"""Where in its loop a script can be joined, and where a checkpoint can be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_rank import OneRank, Wrapped

from chaos_mpi import ElasticSampler, TrainingState
from chaos_mpi.config import Settings
from chaos_mpi.elastic import checkpoint, persistence
from chaos_mpi.elastic.attached import AttachedSamplers
from chaos_mpi.elastic.places import ALONE_STEPS, UNAPPLIED_LIMIT, Places, Turns

INPUTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(2))


def places(pattern: str, turns: Turns) -> list[int]:
    """At which of these calls, of models 1 to 9, each followed by a step, the loop begins anew; j: no step follows."""
    found = []
    for index, (model, after) in enumerate(zip(pattern, [*pattern[1:], ""], strict=True)):
        if model == "j":
            continue
        if turns.begin(int(model)):
            found.append(index)
        if after != "j":
            turns.stepped(int(model))
    return found


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("121212", [0, 2, 4]),
        ("212121", [0, 2, 4]),  # the one wrapped second is trained first
        ("2222122221", [0, 5]),  # several steps of a critic
        ("123123", [0, 3]),
        ("1j21j2", [0, 3]),  # one backward pass through both
    ],
)
def test_a_loop_over_several_models_begins_with_the_one_that_it_began_with(pattern: str, expected: list[int]) -> None:
    assert places(pattern, Turns()) == expected


def test_several_steps_of_one_model_in_an_iteration() -> None:
    # As in the usual script for a GAN: discriminator on real and on fake samples, and then the generator through it.
    turns, found = Turns(), []
    for iteration in range(3):
        for call, stepped in (("real 2", [2]), ("fake 1", []), ("detached 2", [2]), ("through 2", [2, 1])):
            if turns.begin(int(call[-1])):
                found.append((iteration, call))
            for model in stepped:
                turns.stepped(model)
    assert found == [(0, "real 2"), (1, "real 2"), (2, "real 2")]


def test_a_model_that_is_trained_alone_for_long() -> None:
    turns = Turns()
    assert places("12" * 3, turns) == [0, 2, 4]
    assert places("2" * (ALONE_STEPS - 1), turns) == []
    assert places("22", turns) == [0, 1]
    assert places("121212", turns) == [0, 2, 4]


def test_who_joins_comes_to_the_same_places() -> None:
    samplers = AttachedSamplers()
    member = Places(samplers)
    for _ in range(4):
        assert member.begin(1, 2)
        newcomer = Places(samplers)
        newcomer.take_over(json.loads(json.dumps(member.to_json())))
        for one in (member, newcomer):
            one.stepped(1)
            one.stepped(2)
        assert [one.begin(2, 2) for one in (member, newcomer)] == [False, False]


def script(session: OneRank) -> tuple[Wrapped, torch.optim.SGD]:
    """One model, and no sampler."""
    model = Wrapped(session, torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    TrainingState(model=model.module, optimizer=optimizer, session=session)
    return model, optimizer


@pytest.mark.parametrize("number", [1, 4])
def test_members_do_not_negotiate_between_accumulated_gradients(number: int) -> None:
    talks: list[int] = []
    session = OneRank()
    session.told = lambda: talks.append(session.step)
    model, optimizer = script(session)
    for index in range(13):
        model.backward(model(INPUTS[:2]).sum())
        if index % number == number - 1:
            optimizer.step()
    assert talks == list(range(number, 13, number))


def test_a_loop_that_steps_no_optimizer_is_joined_all_the_same() -> None:
    talks: list[int] = []
    session = OneRank()
    session.told = lambda: talks.append(session.step)
    model, _ = script(session)
    for _ in range(UNAPPLIED_LIMIT + 3):
        model.backward(model(INPUTS[:2]).sum())
    assert talks == [UNAPPLIED_LIMIT, UNAPPLIED_LIMIT + 1, UNAPPLIED_LIMIT + 2]


def test_a_loop_over_two_models_without_a_sampler_is_joined_where_it_begins() -> None:
    talks: list[int] = []
    session = OneRank()
    session.told = lambda: talks.append(session.step)
    models = [Wrapped(session, torch.nn.Linear(3, 1)) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.module.parameters(), lr=0.1) for model in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.backward(model(INPUTS[:2]).sum())
            optimizer.step()
    assert talks == [2, 4]


def test_a_sampler_that_a_newcomer_would_not_have_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    session = OneRank()
    ElasticSampler(4, session=session)
    script(session)
    assert not caplog.records
    for _ in range(2):
        ElasticSampler(4, session=session)
    (told,) = caplog.records
    assert "made after the TrainingState: from now on no rank can join" in told.getMessage()


# -- checkpoints ----------------------------------------------------------------------------------------

#: Trains on one batch; ``stop`` is called after each of its gradient steps.
Loop = Callable[[Wrapped, torch.optim.Optimizer, torch.Tensor, Callable[[], None]], None]


class StoppedError(Exception):
    """The machine loses power."""


def by_lbfgs(model: Wrapped, optimizer: torch.optim.Optimizer, x: torch.Tensor, stop: Callable[[], None]) -> None:
    """Several forward and backward passes on one batch, within one step of the optimizer."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        model.backward(loss)
        stop()
        return loss.item()

    optimizer.step(closure)


def by_sharpness(model: Wrapped, optimizer: torch.optim.Optimizer, x: torch.Tensor, stop: Callable[[], None]) -> None:
    """The gradient at weights that are perturbed along the gradient (SAM)."""
    model.backward(model(x).square().mean())
    stop()
    changes = [p.grad.clone() for p in model.module.parameters() if p.grad is not None]
    with torch.no_grad():
        torch._foreach_add_(list(model.module.parameters()), changes)
    optimizer.zero_grad()
    model.backward(model(x).square().mean())
    stop()
    with torch.no_grad():
        torch._foreach_sub_(list(model.module.parameters()), changes)
    optimizer.step()
    optimizer.zero_grad()


def train(
    settings: Settings, loop: Loop, kind: type[torch.optim.Optimizer], stops_at: int, *, sampled: bool
) -> list[torch.Tensor]:
    """Two epochs, or until so many gradient steps were made in this process; the parameters."""
    torch.manual_seed(3)
    session = OneRank(settings)
    model = Wrapped(session, torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)))
    options = {"max_iter": 4} if kind is torch.optim.LBFGS else {}
    optimizer = kind(model.module.parameters(), lr=0.1, **options)
    sampler = ElasticSampler(len(INPUTS), 6, session=session) if sampled else None
    state = TrainingState(model=model.module, optimizer=optimizer, sampler=sampler, epoch=0, batch=0, session=session)
    begun = session.step

    def stop() -> None:
        if session.step - begun == stops_at:
            session.write_down()
            raise StoppedError

    batches = [list(range(i, i + 6)) for i in range(0, len(INPUTS), 6)]
    for state.epoch in range(state.epoch, 2):
        if sampler is not None:
            sampler.set_epoch(state.epoch)
        for indices in sampler if sampler is not None else batches[state.batch :]:
            loop(model, optimizer, INPUTS[indices], stop)
            state.batch += 1
        state.batch = 0
    session.boundary(final=True)
    session.write_down()
    return [p.detach().clone() for p in model.module.parameters()]


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(("loop", "kind"), [(by_lbfgs, torch.optim.LBFGS), (by_sharpness, torch.optim.SGD)])
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    loop: Loop, kind: type[torch.optim.Optimizer], sampled: bool, tmp_path: Path
) -> None:
    expected = train(Settings(), loop, kind, -1, sampled=sampled)
    for stops_at in (5, 6, 10, 13):
        settings = Settings(checkpoint_dir=tmp_path / str(stops_at), checkpoint_every=1)
        with pytest.raises(StoppedError):
            train(settings, loop, kind, stops_at, sampled=sampled)
        assert checkpoint.list_checkpoints(tmp_path / str(stops_at))
        resumed = train(replace(settings, resume=True), loop, kind, -1, sampled=sampled)
        assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True)), f"after {stops_at} steps"


def test_a_checkpoint_that_is_due_in_the_middle_of_a_batch_is_written_after_it(tmp_path: Path) -> None:
    settings = Settings(checkpoint_dir=tmp_path, checkpoint_every=3)
    session = OneRank(settings)
    model, optimizer = script(session)
    for _ in range(4):
        for _ in range(2):
            model.backward(model(INPUTS[:2]).sum())
        optimizer.step()
        session.write_down()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [4, 6]


def test_a_checkpoint_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "LONGEST_WAIT_STEPS", 5)
    session = OneRank(Settings(checkpoint_dir=tmp_path, checkpoint_every=2))
    sampler = ElasticSampler(100, 2, session=session)  # of which the loop makes no use
    model, optimizer = script(session)
    for _ in range(14):
        model.backward(model(INPUTS[:2]).sum())
        optimizer.step()
        session.write_down()
    assert not sampler.has_untrained()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [7, 13]


def test_gradients_that_no_optimizer_of_the_state_applies_hold_up_joins_for_a_while_only() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    places = Places(AttachedSamplers())
    places.watch([optimizer])
    found = []
    for iteration in range(40):
        if places.begin(1, 1):
            found.append(iteration)
        places.stepped(1)
        parameter.grad = torch.ones(1)
        optimizer.step()
        places.stepped(1)  # of something that the script steps by hand, at the end of each iteration
    assert found[0] == 0
    assert len(found) > 10


def test_calls_before_the_loop_are_no_part_of_it() -> None:
    places = Places(AttachedSamplers())
    places.begin(1, 2)  # a first picture, say
    places.watch([])
    assert [places.begin(2, 2), places.stepped(2), places.begin(1, 2), places.stepped(1), places.begin(2, 2)] == [
        True, None, False, None, True,
    ]  # fmt: skip
