"""The training state: what it names, how it compares, and that restoring it is exact or does nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from chaos_mpi.elastic import checkpoint
from chaos_mpi.elastic.state import TrainingState, first_difference
from chaos_mpi.errors import CheckpointError, ConfigError
from chaos_mpi.replication.tree import pack, unpack


class Net(nn.Module):
    """Parameters, a frozen one, tied ones, buffers of two dtypes, and one that is not saved."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x)))


class Counter:
    """A sampler or another object with a state."""

    def __init__(self, length: int = 10) -> None:
        self.length, self.position = length, 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["length"] != self.length:
            raise ValueError(f"made for {state['length']} samples, not {self.length}")
        vars(self).update(state)


def trained(state: TrainingState, steps: int) -> None:
    """A few steps on data that depend on the number of the step only."""
    for _ in range(steps):
        optimizer = state.optimizer
        x = torch.arange(8).reshape(8) * (state.count + 3) % 5
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(state.model(x), (x + 1) % 5)
        loss.backward()
        optimizer.step(loss.item) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
        if state.scheduler is not None:
            state.scheduler.step(*([1.0] if isinstance(state.scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        state.count += 1


def make(
    seed: int = 0,
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    scheduler: Callable[[Any], Any] | None = None,
    **extras: Any,
) -> TrainingState:
    torch.manual_seed(seed)
    net = Net()
    opt = optimizer([p for p in net.parameters() if p.requires_grad])
    return TrainingState(
        model=net, optimizer=opt, scheduler=scheduler(opt) if scheduler else None, sampler=Counter(), count=0, **extras
    )


def through_disk(state: TrainingState, directory: Path) -> Any:
    checkpoint.save_now(directory / "c", 1, pack(state.capture(), clone=True))
    return unpack(checkpoint.load(directory / "c"))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 1e-2}, {"params": p[1:], "weight_decay": 0.0}]),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "adafactor": torch.optim.Adafactor,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 3]),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_after_a_restore_is_bitwise_the_same(name: str, steps: int, tmp_path: Path) -> None:
    one, other = make(0, OPTIMIZERS[name]), make(1, OPTIMIZERS[name])
    assert one.digest() != other.digest()
    trained(one, steps)
    trained(other, 2)
    other.restore(through_disk(one, tmp_path))
    assert other.digest() == one.digest()
    assert first_difference(one.signature(), other.signature()) is None
    trained(one, 3)
    trained(other, 3)
    assert other.digest() == one.digest()
    assert (other.count, other.sampler.position) == (steps + 3, 0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_too(name: str, tmp_path: Path) -> None:
    one, other = make(0, scheduler=SCHEDULERS[name]), make(1, scheduler=SCHEDULERS[name])
    trained(one, 2)
    other.restore(through_disk(one, tmp_path))
    for _ in range(4):
        trained(one, 1)
        trained(other, 1)
        assert one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]
    assert other.digest() == one.digest()


def test_state_of_another_dtype_than_the_parameter_keeps_its_bits() -> None:
    def mixed(seed: int) -> TrainingState:
        torch.manual_seed(seed)
        net = nn.Linear(3, 3).to(torch.bfloat16)
        optimizer = torch.optim.SGD(net.parameters())
        for p in net.parameters():
            optimizer.state[p] = {"master": torch.randn(p.shape), "kind": "text", "step": 3}
        return TrainingState(model=net, optimizer=optimizer)

    one, other = mixed(0), mixed(1)
    other.restore(unpack(pack(one.capture(), clone=True)))
    assert other.digest() == one.digest()
    kept = other.optimizer.state[other.model.weight]
    assert (kept["master"].dtype, kept["kind"], kept["step"]) == (torch.float32, "text", 3)


def test_a_restored_tree_stays_as_it_was() -> None:
    one, other = (
        make(0, OPTIMIZERS["adam"], t=torch.zeros(2), log=[1]),
        make(1, OPTIMIZERS["adam"], t=torch.ones(2), log=[]),
    )
    trained(one, 2)
    packed = pack(one.capture(), clone=True)
    tree = unpack(packed)
    before = copy.deepcopy(packed.tensors)
    other.restore(tree)
    trained(other, 2)
    other.t.add_(1)
    other.log.append(2)
    assert all(torch.equal(before[name], tensor) for name, tensor in packed.tensors.items())
    assert tree["extras"]["log"] == [1]


def test_restoring_writes_into_the_tensors_that_others_hold() -> None:
    one, other = make(0, weights=torch.full((2,), 5.0)), make(1, weights=torch.zeros(2))
    pointers = {name: tensor.data_ptr() for name, tensor in other.named_tensors()}
    weights = other.weights
    other.restore(one.capture())
    assert {name: tensor.data_ptr() for name, tensor in other.named_tensors()} == pointers
    assert weights.tolist() == [5, 5]


def test_module_versions_do_not_get_lost() -> None:
    # Without its version, a BatchNorm's state is taken for one of torch 0.4 and changed silently.
    seen: list[Any] = []
    state = make()
    state.model.norm.register_load_state_dict_pre_hook(lambda *args: seen.append(args[3].get("version")))
    state.restore(unpack(pack(state.capture(), clone=True)))
    assert seen == [2]


# -- attributes ------------------------------------------------------------------------------------


def test_values_are_attributes() -> None:
    state = make(epoch=0, best=None, t=torch.zeros(2), scaler=Counter())
    for state.epoch in range(state.epoch, 3):
        state.best = min(state.best or 1.0, 0.5)
    state.epoch += 10
    assert (state.epoch, state.best, type(state.scaler), type(state.model)) == (12, 0.5, Counter, Net)
    state.t = torch.ones(2)
    assert state.capture()["extras"] | {"t": 0, "scaler": 0} == {
        "count": 0,
        "epoch": 12,
        "best": 0.5,
        "t": 0,
        "scaler": 0,
    }


def test_what_was_not_named_is_refused() -> None:
    state = make(epoch=0, t=torch.zeros(2))
    with pytest.raises(
        AttributeError, match=r"no 'epoh'; name it when making it: TrainingState\(\.\.\., epoh=\.\.\.\)"
    ):
        state.epoh = 1
    with pytest.raises(AttributeError, match="no 'loss'"):
        _ = state.loss
    with pytest.raises(AttributeError, match="the model of a TrainingState cannot be replaced"):
        state.model = Net()
    with pytest.raises(ConfigError, match="'epoch' is of type set"):
        state.epoch = {1}
    with pytest.raises(ConfigError, match=r"t is a tensor of shape \[2\] and dtype float32 and must stay one"):
        state.t = torch.zeros(3)
    assert not hasattr(state, "_anything")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": object()}, "model must be a torch.nn.Module, not builtins.object"),
        ({"model": {}}, "model: a dict of several must"),
        ({"model": None}, "model must not be None"),
        ({"model": {"a": Net(), "b": 1}}, r"model\.b must be a torch\.nn\.Module"),
        ({"optimizer": None}, "optimizer must not be None"),
        ({"optimizer": Counter()}, "optimizer must be a torch.optim.Optimizer"),
        ({"sampler": [1]}, r"sampler needs state_dict\(\) and load_state_dict\(\)"),
        ({"capture": 1}, "cannot have an extra named 'capture'"),
        ({"_x": 1}, "cannot have an extra named '_x'"),
        ({"x": open}, "'x' is of type builtin_function_or_method"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(ConfigError, match=message):
        TrainingState(**{"model": net, "optimizer": torch.optim.SGD(net.parameters()), **arguments})


def test_the_session_is_told_last() -> None:
    class Session:
        seen: Any = None

        def attach_state(self, state: TrainingState) -> None:
            self.seen = (state.epoch, state.digest())

    session, net = Session(), Net()
    state = TrainingState(model=net, optimizer=torch.optim.SGD(net.parameters()), session=session, epoch=3)
    assert session.seen == (3, state.digest())


# -- several, and wrapped ---------------------------------------------------------------------------


def test_several_models_and_optimizers() -> None:
    def gan(seed: int) -> TrainingState:
        torch.manual_seed(seed)
        nets = {"gen": nn.Linear(2, 3), "disc": nn.Linear(3, 1)}
        return TrainingState(
            model=nets, optimizer={name: torch.optim.Adam(net.parameters()) for name, net in nets.items()}
        )

    one, other = gan(0), gan(1)
    one.model["disc"](one.model["gen"](torch.ones(4, 2))).sum().backward()
    for optimizer in one.optimizers():
        optimizer.step()
    other.restore(unpack(pack(one.capture(), clone=True)))
    assert other.digest() == one.digest()
    names = [name for name, _ in one.named_tensors()]
    assert names[0] == "model.gen.weight"
    assert "optimizer.disc.disc.bias.exp_avg" in names
    assert list(one.signature()["parameters"]) == ["gen.weight", "gen.bias", "disc.weight", "disc.bias"]
    tree = one.capture()
    del tree["model"]["disc"]
    with pytest.raises(CheckpointError, match=r"it lacks model\.disc"):
        other.restore(tree)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module, extra: bool = False) -> None:
        super().__init__()
        self.module = module
        if extra:
            self.scale = nn.Parameter(torch.ones(1))


def test_a_wrapper_does_not_show_in_names_but_a_model_with_a_part_named_module_keeps_it() -> None:
    def names(model: nn.Module) -> list[str]:
        state = TrainingState(model=model, optimizer=torch.optim.SGD(model.parameters()))
        assert state.model is model
        return list(state.signature()["parameters"])

    assert names(Wrapper(nn.Linear(1, 1))) == ["weight", "bias"]
    assert names(Wrapper(Wrapper(nn.Linear(1, 1)))) == ["weight", "bias"]
    assert names(Wrapper(nn.Linear(1, 1), extra=True)) == ["scale", "module.weight", "module.bias"]


def test_an_average_of_the_model_is_restored_as_strictly_as_the_model() -> None:
    one = make(0, ema=torch.optim.swa_utils.AveragedModel(Net()))
    other = make(1, ema=torch.optim.swa_utils.AveragedModel(Net()))
    one.ema.update_parameters(one.model)
    other.restore(unpack(pack(one.capture(), clone=True)))
    assert torch.equal(other.ema.module.embed.weight, one.model.embed.weight)
    with pytest.raises(CheckpointError, match=r"extras\.ema\.module\.embed\.weight has shape \[5, 8\]"):
        make(2, ema=torch.optim.swa_utils.AveragedModel(Net(8))).restore(one.capture())


# -- refusing what does not fit -----------------------------------------------------------------------


def _delete(tree: Any, *path: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    del tree[path[-1]]


def _put(tree: Any, value: Any, *path: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


MISFITS: list[tuple[Callable[[Any], None], str]] = [
    (lambda t: _delete(t, "model", "norm.bias"), r"it lacks model\.norm\.bias$"),
    (lambda t: _put(t, torch.ones(1), "model", "old"), r"it has model\.old, which is not here"),
    (lambda t: _put(t, torch.ones(5), "model", "norm.bias"), r"model\.norm\.bias has shape \[4\] here and \[5\] there"),
    (lambda t: _put(t, torch.ones(4).double(), "model", "norm.bias"), r"norm\.bias has dtype float32 here and float64"),
    (lambda t: _put(t, 3, "model", "norm.bias"), r"norm\.bias is a tensor here and a int there"),
    (lambda t: _delete(t, "optimizer"), r"it lacks optimizer$"),
    (lambda t: _put(t, [1], "optimizer"), r"optimizer is a list, not a dict"),
    (lambda t: t["optimizer"]["param_groups"].append({"params": []}), r"1 groups of parameters here and 2 there"),
    (lambda t: t["optimizer"]["param_groups"][0]["params"].pop(), r"group 0, has 3 parameters here and 2 there"),
    (lambda t: _put(t, {}, "optimizer", "state", 7), r"has state for parameter 7, which is not here"),
    (
        lambda t: _put(t, torch.ones(1), "optimizer", "state", 0, "momentum_buffer"),
        r"optimizer\.state\.0\.momentum_buffer has shape \[5, 4\] here and \[1\] there",
    ),
    (lambda t: _put(t, {}, "scheduler"), r"it has scheduler, which is not here"),
    (lambda t: _delete(t, "extras", "count"), r"it lacks extras\.count"),
    (lambda t: _put(t, 1, "extras", "epoch"), r"it has extras\.epoch"),
    (
        lambda t: _put(t, torch.ones(3), "extras", "t"),
        r"extras\.t is a tensor of shape \[2\] .* here and a tensor of shape \[3\]",
    ),
    (lambda t: _put(t, None, "extras", "t"), r"extras\.t is a tensor .* here and a NoneType there"),
    (lambda t: _put(t, 99, "sampler", "length"), r"sampler cannot take the state: made for 99 samples, not 10"),
    (lambda t: _put(t, 99, "extras", "last", "length"), r"extras\.last cannot take the state: made for 99"),
]


@pytest.mark.parametrize(("spoil", "message"), MISFITS, ids=[message for _, message in MISFITS])
def test_what_does_not_fit_is_refused_before_anything_changes(spoil: Callable[[Any], None], message: str) -> None:
    one, other = (make(seed, t=torch.full((2,), seed), first=Counter(), last=Counter()) for seed in (0, 1))
    trained(one, 2)
    trained(other, 1)
    one.first.position = one.sampler.position = 5
    tree = unpack(pack(one.capture(), clone=True))
    spoil(tree)
    before = pack(other.capture(), clone=True)
    with pytest.raises(CheckpointError, match=message):
        other.restore(tree)
    after = pack(other.capture(), clone=True)
    assert after.skeleton == before.skeleton
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())


# -- signatures -------------------------------------------------------------------------------------


def test_a_signature_survives_json_and_equals_itself() -> None:
    state = make(optimizer=OPTIMIZERS["adamw"], scheduler=SCHEDULERS["cosine"], t=torch.ones(2), s=Counter(), best=None)
    signature = state.signature()
    assert json.loads(json.dumps(signature, allow_nan=False)) == signature
    assert first_difference(signature, json.loads(json.dumps(signature))) is None
    assert signature["parameters"]["frozen"] == [[2], "float32", False]
    assert signature["tied"] == [["embed.weight", "head.weight"]]
    assert list(signature["buffers"]) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    groups = signature["optimizers"]["optimizer"]["groups"]
    assert [group["params"] for group in groups] == [["embed.weight"], ["norm.weight", "norm.bias"]]
    assert groups[0]["hyper"]["betas"] == [0.9, 0.999]
    trained(state, 1)
    state.best = 1.0
    changed = state.signature()
    assert (
        first_difference(signature, changed) == f"optimizer, group 0, has lr {0.01} here and {groups_lr(state)} there"
    )


def groups_lr(state: TrainingState) -> float:
    return float(state.optimizer.param_groups[0]["lr"])


def untied(net: Net) -> None:
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())


def _linear(**kwargs: Any) -> TrainingState:
    model = nn.Linear(3, 8, **kwargs)
    return TrainingState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def with_net(change: Callable[[Net], Any], **kwargs: Any) -> TrainingState:
    net = Net()
    change(net)
    return TrainingState(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), **kwargs)


SGD = "torch.optim.sgd.SGD"
BASE: Callable[[], TrainingState] = lambda: with_net(lambda net: None, sampler=Counter(), epoch=0)  # noqa: E731
DIFFERENCES: list[tuple[Callable[[], TrainingState], Callable[[], TrainingState], str]] = [
    (
        lambda: with_net(lambda n: None),
        lambda: with_net(lambda n: setattr(n, "frozen", nn.Parameter(torch.ones(3), requires_grad=False))),
        "parameter frozen has shape [2] here and [3] there",
    ),
    (_linear, lambda: _linear(bias=False), "parameter bias is here but not there"),
    (lambda: _linear(bias=False), _linear, "parameter bias is there but not here"),
    (_linear, lambda: _linear(dtype=torch.float64), "parameter weight has dtype float32 here and float64 there"),
    (
        lambda: with_net(lambda n: None),
        lambda: with_net(lambda n: n.frozen.requires_grad_(True)),
        "parameter frozen has requires_grad False here and True there",
    ),
    (
        lambda: with_net(lambda n: None),
        lambda: with_net(lambda n: n.register_buffer("new", torch.ones(1))),
        "buffer new is there but not here",
    ),
    (lambda: make(), lambda: make(optimizer=torch.optim.AdamW),
     f"optimizer is a {SGD} here and a torch.optim.adamw.AdamW there"),
    (lambda: make(), lambda: make(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
     "optimizer, group 0, has momentum 0.9 here and 0.8 there"),
    (lambda: make(), lambda: make(optimizer=lambda p: torch.optim.SGD([{"params": [q]} for q in p])),
     "optimizer has 1 parameter groups here and 3 there"),
    (lambda: make(), lambda: make(optimizer=lambda p: torch.optim.SGD(p[:2], lr=0.1, momentum=0.9)),
     "optimizer, group 0, has 3 parameters here and 2 there"),
    (lambda: make(), lambda: make(optimizer=lambda p: torch.optim.SGD(p[::-1], lr=0.1, momentum=0.9)),
     "optimizer, group 0, parameter 0 is embed.weight here and norm.bias there"),
    (lambda: make(), lambda: make(scheduler=SCHEDULERS["lambda"]),
     "optimizer, group 0, the hyper-parameter initial_lr is there but not here"),
    (lambda: make(scheduler=SCHEDULERS["lambda"]), lambda: make(scheduler=SCHEDULERS["step"]),
     "scheduler is a torch.optim.lr_scheduler.LambdaLR here and a torch.optim.lr_scheduler.StepLR there"),
    (BASE, lambda: with_net(lambda n: None, epoch=0), "sampler is here but not there"),
    (BASE, lambda: with_net(lambda n: None, sampler=Counter(), epoch=torch.ones(1)),
     "extra epoch is a value here and a tensor of shape [1] and dtype float32 there"),
    (BASE, lambda: with_net(lambda n: None, sampler=Counter()), "extra epoch is here but not there"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "sentence"), DIFFERENCES, ids=[sentence for *_, sentence in DIFFERENCES])
def test_the_first_difference(
    one: Callable[[], TrainingState], other: Callable[[], TrainingState], sentence: str
) -> None:
    here, there = one().signature(), json.loads(json.dumps(other().signature()))
    assert first_difference(here, there) == sentence


def test_more_differences() -> None:
    here, there = with_net(lambda n: None).signature(), with_net(untied).signature()
    assert first_difference(here, there) == "parameter head.weight is there but not here"
    shuffled = copy.deepcopy(here)
    shuffled["parameters"] = dict(reversed(shuffled["parameters"].items()))
    assert first_difference(here, shuffled) == "parameter number 0 is embed.weight here and frozen there" or (
        first_difference(here, shuffled) or ""
    ).startswith("parameter number 0 is ")
    assert "different versions" in (first_difference(here, here | {"future": 1}) or "")


# -- digests ----------------------------------------------------------------------------------------


def test_the_digest_covers_parameters_buffers_and_optimizer_state() -> None:
    state = make(optimizer=OPTIMIZERS["adam"])
    trained(state, 1)
    names = [name for name, _ in state.named_tensors()]
    assert len(names) == len(set(names))
    assert {"model.frozen", "model.norm.running_var", "optimizer.embed.weight.step"} <= set(names)
    assert "model.cache" not in names
    assert "model.head.weight" not in names  # tied
    digests = {state.digest()}
    for _, tensor in state.named_tensors():
        tensor.add_(1)
        digests.add(state.digest())
    assert len(digests) == len(names) + 1


def test_the_digest_does_not_depend_on_the_order_in_which_state_was_made() -> None:
    one, other = make(0), make(0)
    for state, turn in ((one, 1), (other, -1)):
        parameters = state.optimizer.param_groups[0]["params"]
        for parameter in parameters[::turn]:
            state.optimizer.state[parameter] = dict([("a", torch.ones(1)), ("b", torch.zeros(1))][::turn])
    assert one.digest() == other.digest()
