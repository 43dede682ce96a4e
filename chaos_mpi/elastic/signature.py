"""Signatures: what a training state is made of, without its values, to be compared between ranks.

A signature consists of dicts, lists, text and numbers only, and is the same after a trip through JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

#: Keys of a parameter group that are not hyper-parameters.
_NOT_HYPER = frozenset({"params", "param_names"})
_RATES = frozenset({"lr", "initial_lr"})


def class_name(thing: object) -> str:
    """The class of a thing with its module, as "torch.optim.sgd.SGD"."""
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def dtype_text(dtype: torch.dtype) -> str:
    """A dtype as "float32"."""
    return str(dtype).removeprefix("torch.")


def persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that are part of the module's state, each once, by name."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, buffer


def describe_module(prefix: str, module: torch.nn.Module) -> dict[str, Any]:
    """The ``parameters``, ``buffers`` and ``tied`` parameters of a module, with ``prefix`` before their names."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(prefix + name)
    return {
        "parameters": {prefix + name: _describe_tensor(p) for name, p in module.named_parameters()},
        "buffers": {prefix + name: _describe_tensor(b) for name, b in persistent_buffers(module)},
        "tied": [names for names in groups.values() if len(names) > 1],
    }


def describe_optimizer(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Class and parameter groups of an optimizer.

    Args:
        optimizer: the optimizer.
        names: the names of the parameters, by ``id()``.
    """
    groups = []
    for group in optimizer.param_groups:
        hyper = {key: _plain(value) for key, value in group.items() if key not in _NOT_HYPER}
        groups.append(
            {
                "hyper": {str(key): value for key, (known, value) in hyper.items() if known},
                "params": [names.get(id(parameter), "(not in the model)") for parameter in group["params"]],
            }
        )
    return {"class": class_name(optimizer), "groups": groups}


def with_groups_of(now: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """A signature, except that the optimizers have the parameter groups of a later one.

    A script may add groups in training, and a newcomer that has just started has not got them. Of groups that there
    were before, the hyper-parameters are those of ``first``: they change, as does which parameters are frozen.
    """
    optimizers = {}
    for name, optimizer in now["optimizers"].items():
        before = first["optimizers"][name]["groups"]
        groups = [
            {**group, "hyper": before[index]["hyper"]} if index < len(before) else group
            for index, group in enumerate(optimizer["groups"])
        ]
        optimizers[name] = {**optimizer, "groups": groups}
    return {**first, "optimizers": optimizers}


def without_rates(signature: dict[str, Any]) -> dict[str, Any]:
    """A signature without learning rates: a newcomer gets the members', and may have computed its own from the size."""
    optimizers = {}
    for name, optimizer in signature["optimizers"].items():
        groups = [
            {**group, "hyper": {key: value for key, value in group["hyper"].items() if key not in _RATES}}
            for group in optimizer["groups"]
        ]
        optimizers[name] = {**optimizer, "groups": groups}
    return {**signature, "optimizers": optimizers}


def first_difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """What differs first between two signatures, as a sentence with ``a`` being here and ``b`` there; else None."""
    return next(_differences(a, b), None)


def _differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    for kind in ("parameter", "buffer"):
        here, there = a.get(f"{kind}s", {}), b.get(f"{kind}s", {})
        yield from _different_names(f"{kind} ", here, there)
        for name, (shape, dtype, grad) in here.items():
            other_shape, other_dtype, other_grad = there[name]
            yield from _different(f"{kind} {name}", "shape", shape, other_shape)
            yield from _different(f"{kind} {name}", "dtype", dtype, other_dtype)
            yield from _different(f"{kind} {name}", "requires_grad", grad, other_grad)
        yield from _different_order(f"{kind} number", list(here), list(there))
    yield from _different("the model", "tied parameters", a.get("tied"), b.get("tied"))
    here, there = a.get("optimizers", {}), b.get("optimizers", {})
    yield from _different_names("", here, there)
    for name, optimizer in here.items():
        yield from _different_optimizers(name, optimizer, there[name])
    for section in ("schedulers", "samplers", "extras"):
        here, there = a.get(section, {}), b.get(section, {})
        kind = "extra " if section == "extras" else ""
        yield from _different_names(kind, here, there)
        for name, description in here.items():
            if description != there[name]:
                yield f"{kind}{name} is a {description} here and a {there[name]} there"
    if a != b:
        yield "the signatures were made by different versions of chaos_mpi"


def _different_optimizers(name: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    if a["class"] != b["class"]:
        yield f"{name} is a {a['class']} here and a {b['class']} there"
    if len(a["groups"]) != len(b["groups"]):
        yield f"{name} has {len(a['groups'])} parameter groups here and {len(b['groups'])} there"
    for index, (here, there) in enumerate(zip(a["groups"], b["groups"], strict=True)):
        what = f"{name}, group {index},"
        if len(here["params"]) != len(there["params"]):
            yield f"{what} has {len(here['params'])} parameters here and {len(there['params'])} there"
        yield from _different_order(f"{what} parameter", here["params"], there["params"])
        yield from _different_names(f"{what} the hyper-parameter ", here["hyper"], there["hyper"])
        for key, value in here["hyper"].items():
            yield from _different(what, key, value, there["hyper"][key])


def _different_names(what: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    yield from (f"{what}{name} is here but not there" for name in a if name not in b)
    yield from (f"{what}{name} is there but not here" for name in b if name not in a)


def _different_order(what: str, a: list[str], b: list[str]) -> Iterator[str]:
    for index, (here, there) in enumerate(zip(a, b, strict=True)):
        if here != there:
            yield f"{what} {index} is {here} here and {there} there"


def _different(what: str, attribute: str, a: Any, b: Any) -> Iterator[str]:
    if a != b:
        yield f"{what} has {attribute} {a} here and {b} there"


def _describe_tensor(tensor: torch.Tensor) -> list[Any]:
    return [list(tensor.shape), dtype_text(tensor.dtype), tensor.requires_grad]


def _plain(value: Any) -> tuple[bool, Any]:
    """Whether a hyper-parameter can be compared between ranks, and in which form."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()  # a learning rate may be a tensor
    if isinstance(value, float) and not math.isfinite(value):
        return True, repr(value)
    if value is None or type(value) in (bool, int, float, str):
        return True, value
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry) for entry in value]
        return all(known for known, _ in entries), [entry for _, entry in entries]
    return False, None
