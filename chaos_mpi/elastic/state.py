"""The training state: everything that makes one member's training go on where another's is.

The state is named once, by :class:`TrainingState`. What is done with it (compared, handed over, written to
disk) is done with the plain tree that :meth:`TrainingState.capture` returns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from chaos_mpi.elastic.current import current_session_or_none
from chaos_mpi.elastic.digest import params_digest
from chaos_mpi.elastic.restoring import (
    check_module,
    check_names,
    check_optimizer,
    is_in_place,
    load_module,
    load_optimizer,
)
from chaos_mpi.elastic.signature import (
    class_name,
    describe_module,
    describe_optimizer,
    dtype_text,
    first_difference,
    persistent_buffers,
)
from chaos_mpi.errors import CheckpointError, ConfigError
from chaos_mpi.replication.tree import pack

__all__ = ["Stateful", "TrainingState", "first_difference"]

#: Where an object stands in the tree: ("model",), ("model", "generator"), ("extras", "scaler").
Place = tuple[str, ...]


class Stateful(Protocol):
    """Has a state that can be saved and loaded: a scheduler, a sampler, a GradScaler, ..."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class AttachesState(Protocol):
    """What the constructor needs of a session."""

    def attach_state(self, state: TrainingState) -> None: ...


class TrainingState:
    """Names everything that makes up the training state; to be made once, when all of it exists.

    Extras that are JSON values or tensors are attributes, to be read and assigned::

        state = chaos_mpi.TrainingState(model=model, optimizer=optimizer, sampler=sampler, epoch=0, best=None)
        for state.epoch in range(state.epoch, 10):
            ...

    Args:
        model: a module, or several as a dict from name to module. The wrapper of data parallel training is
            left out of the names, so that a checkpoint can be loaded without it.
        optimizer: an optimizer, or several as a dict; ``{}`` if its state is kept elsewhere
            (:class:`chaos_mpi.torch.ShardedOptimizer`).
        scheduler, sampler: something with ``state_dict`` and ``load_state_dict``, or several as a dict.
        rng: keep the random number generators of torch (CPU), numpy and Python with the state, too. A checkpoint holds
            those of each rank; on resume a rank goes on from its own, one that is added from rank 0's. A rank that
            joins goes on from those of rank 0: it draws what the others draw if all are seeded alike. This holds
            from the first forward on; what is drawn before, for loading the first batch, is drawn anew.
        session: the session to attach the state to; default: the current one, if there is one.
        extras: further objects with ``state_dict`` and ``load_state_dict``, tensors, or JSON values. A tensor
            keeps its shape and dtype for ever; what grows is to be a list.

    Raises:
        ConfigError: an argument is not of these kinds.
        MismatchError: the state differs between the members of the session.
        CheckpointError: the job is resumed, and the checkpoint does not fit.
    """

    _given: dict[str, Any]
    _objects: dict[Place, Any]
    _values: dict[str, Any]
    _keeps_rng: bool

    def __init__(
        self,
        *,
        model: torch.nn.Module | Mapping[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
        scheduler: Stateful | Mapping[str, Stateful] | None = None,
        sampler: Stateful | Mapping[str, Stateful] | None = None,
        rng: bool = False,
        session: AttachesState | None = None,
        **extras: Any,
    ) -> None:
        given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler}
        objects = {place: _usable(place, thing) for part in given for place, thing in _places(part, given[part])}
        values = {}
        for name, value in extras.items():
            if name.startswith("_") or name in given or hasattr(type(self), name):
                raise ConfigError(f"a TrainingState cannot have an extra named '{name}'; choose another name")
            if _is_stateful(value):
                objects["extras", name] = _usable(("extras", name), value)
            else:
                values[name] = _storable(name, value)
        # Past __setattr__, which is for the extras.
        self.__dict__.update(_given=given, _objects=objects, _values=values, _keeps_rng=rng)
        session = session if session is not None else current_session_or_none()
        if session is not None:
            session.attach_state(self)

    def __getattr__(self, name: str) -> Any:
        # Called only for what is not found otherwise; "_values" itself is missing while the object is copied.
        if not name.startswith("_"):
            for known in (self._values, self._given):
                if name in known:
                    return known[name]
            if ("extras", name) in self._objects:
                return self._objects["extras", name]
        raise AttributeError(_unknown(name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._values:
            old = self._values[name]
            if isinstance(old, torch.Tensor) and not _alike(old, value):
                raise ConfigError(
                    f"{name} is a {_describe(old)} and must stay one, so that it can be restored; let it start "
                    "as None or as a list if it is to change"
                )
            self._values[name] = _storable(name, value)
        elif name in self._given or ("extras", name) in self._objects:
            raise AttributeError(f"the {name} of a TrainingState cannot be replaced; name it when making the state")
        else:
            raise AttributeError(_unknown(name))

    @property
    def keeps_rng(self) -> bool:
        """Whether the random number generators are kept with the state."""
        return self._keeps_rng

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All optimizers, in the order in which they were named."""
        return [thing for place, thing in self._objects.items() if place[0] == "optimizer"]

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of all models."""
        return [parameter for _, module in self._models() for parameter in module.parameters()]

    def capture(self) -> dict[str, Any]:
        """The state as a nested dict. Its tensors are the live ones: pack it with a clone to keep it."""
        tree: dict[str, Any] = {part: {} for part, given in self._given.items() if given is not None}
        tree["extras"] = dict(self._values)
        for place, thing in self._objects.items():
            if len(place) == 1:
                tree[place[0]] = thing.state_dict()
            else:
                tree[place[0]][place[1]] = thing.state_dict()
        return tree

    def restore(self, tree: Mapping[str, Any], *, owned: bool = False) -> None:
        """Take over a captured state, bit for bit. The tree stays independent of what training does next.

        Everything is compared before anything is changed; and if an object refuses its part all the same, those
        that took theirs are put back.

        Args:
            tree: as :meth:`capture` made it.
            owned: its tensors are not used for anything else, so they need not be copied; those of a module may be
                the module's own, with the values already in place.

        Raises:
            CheckpointError: the state does not fit; names the first entry that is missing, unexpected or of
                another shape or dtype.
        """
        self._check(tree)
        # Schedulers before optimizers, because a scheduler may set the learning rate when it is loaded; and the
        # modules last: they have been compared entry by entry, so they do not fail.
        order = sorted(self._objects.items(), key=lambda item: (_is_module(item[1]), item[0][0] == "optimizer"))
        undo: list[tuple[Any, Any]] = []
        for place, thing in order:
            part = _part(tree, place)
            try:
                if _is_module(thing):
                    if not (owned and is_in_place(thing, part)):
                        load_module(thing, part)
                    continue
                if isinstance(thing, torch.optim.Optimizer):
                    # Loading replaces its tensors and does not write into them, so there is nothing to copy.
                    undo.append((thing, thing.state_dict()))
                    load_optimizer(thing, part if owned else copy.deepcopy(part))
                else:
                    undo.append((thing, copy.deepcopy(thing.state_dict())))
                    thing.load_state_dict(copy.deepcopy(part))
            except Exception as error:
                for changed, before in reversed(undo):
                    changed.load_state_dict(before)
                raise CheckpointError(f"{'.'.join(place)} cannot take the state: {error}") from error
        for name, value in self._values.items():
            new = tree["extras"][name]
            if isinstance(value, torch.Tensor):
                with torch.no_grad():
                    value.copy_(new)  # in place, because others may hold the tensor
            else:
                self._values[name] = copy.deepcopy(new)

    def signature(self) -> dict[str, Any]:
        """What the state is made of, without values, in a form fit for JSON; see :func:`first_difference`."""
        signature: dict[str, Any] = {"parameters": {}, "buffers": {}, "tied": []}
        signature |= {"optimizers": {}, "schedulers": {}, "samplers": {}, "extras": {}}
        for prefix, module in self._models():
            for key, described in describe_module(prefix, module).items():
                signature[key] = signature[key] + described if key == "tied" else signature[key] | described
        names = self._parameter_names()
        for place, thing in self._objects.items():
            if place[0] == "optimizer":
                signature["optimizers"][".".join(place)] = describe_optimizer(thing, names)
            elif place[0] == "extras":
                signature["extras"][place[1]] = class_name(thing)
            elif place[0] != "model":
                signature[f"{place[0]}s"][".".join(place)] = class_name(thing)
        for name, value in self._values.items():
            # Not the type of a value: a newcomer's is still what it starts with, as None.
            signature["extras"][name] = _describe(value) if isinstance(value, torch.Tensor) else "value"
        if self._keeps_rng:
            signature["extras"]["rng"] = "set of random number generators"
        return signature

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """All live tensors of models (parameters, then buffers) and optimizers, in the same order everywhere.

        They share the memory of the originals. Buffers that are not saved with the model are left out.
        """
        tensors: list[tuple[str, torch.Tensor]] = []
        for prefix, module in self._models():
            for name, tensor in [*module.named_parameters(), *persistent_buffers(module)]:
                tensors.append((f"model.{prefix}{name}", tensor.detach()))
        names = self._parameter_names()
        for place, optimizer in self._objects.items():
            if place[0] != "optimizer":
                continue
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, parameter in enumerate(parameters):
                name = ".".join((*place, names.get(id(parameter), str(index))))
                tensors.extend(_tensors_in(name, optimizer.state.get(parameter)))
        return tensors

    def digest(self, *, optimizers: bool = True) -> str:
        """Digest over :meth:`named_tensors`: equal for two members exactly when these are bitwise equal.

        Args:
            optimizers: without them only the models count.
        """
        tensors = self.named_tensors()
        return params_digest(tensors if optimizers else [(n, t) for n, t in tensors if n.startswith("model.")])

    def _models(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """The models, each with what stands before its names: nothing if it is the only one."""
        for place, thing in self._objects.items():
            if place[0] == "model":
                yield "".join(f"{name}." for name in place[1:]), thing

    def _parameter_names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for prefix, module in self._models():
            for name, parameter in module.named_parameters():
                names.setdefault(id(parameter), prefix + name)
        return names

    def _check(self, tree: Mapping[str, Any]) -> None:
        check_names("", [part for part, given in self._given.items() if given is not None] + ["extras"], tree)
        for part, given in self._given.items():
            if isinstance(given, Mapping):
                check_names(f"{part}.", list(given), tree[part])
        extras = [place[1] for place in self._objects if place[0] == "extras"]
        check_names("extras.", [*self._values, *extras], tree["extras"])
        for place, thing in self._objects.items():
            if _is_module(thing):
                check_module(".".join(place), thing, _part(tree, place))
            elif isinstance(thing, torch.optim.Optimizer):
                check_optimizer(".".join(place), thing, _part(tree, place))
        for name, value in self._values.items():
            new = tree["extras"][name]
            if isinstance(value, torch.Tensor) and not _alike(value, new):
                found = _describe(new) if isinstance(new, torch.Tensor) else type(new).__name__
                here = _describe(value)
                raise CheckpointError(
                    f"the state to restore does not fit: extras.{name} is a {here} here and a {found} there"
                )


def _places(part: str, given: Any) -> Iterator[tuple[Place, Any]]:
    """Where the one object, or each of several, stands in the tree."""
    if isinstance(given, Mapping):
        if not (given or part == "optimizer") or not all(isinstance(name, str) and name for name in given):
            raise ConfigError(f"{part}: a dict of several must go from names (text) to objects and not be empty")
        yield from (((part, name), thing) for name, thing in given.items())
    elif given is not None:
        yield (part,), given
    elif part in ("model", "optimizer"):
        raise ConfigError(f"{part} must not be None")


def _part(tree: Mapping[str, Any], place: Place) -> Any:
    return tree[place[0]] if len(place) == 1 else tree[place[0]][place[1]]


def _usable(place: Place, thing: Any) -> Any:
    """The object whose state is kept: the thing itself, or the module inside a wrapper."""
    name = ".".join(place)
    if place[0] in ("model", "extras"):
        thing = _unwrapped(thing)
    if place[0] == "model" and not _is_module(thing):
        raise ConfigError(f"{name} must be a torch.nn.Module, not {class_name(thing)}")
    if place[0] == "optimizer" and not isinstance(thing, torch.optim.Optimizer):
        raise ConfigError(f"{name} must be a torch.optim.Optimizer, not {class_name(thing)}")
    if not _is_stateful(thing):
        raise ConfigError(f"{name} needs state_dict() and load_state_dict(), which {class_name(thing)} lacks")
    return thing


def _unwrapped(model: Any) -> Any:
    """Without the wrappers of data parallel training and torch.compile.

    A module that has a part named ``module`` and parameters or buffers besides is no wrapper.
    """
    if not _is_module(model):
        return model
    for attribute in ("module", "_orig_mod"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, torch.nn.Module):
            inside = {id(tensor) for tensor in [*inner.parameters(), *inner.buffers()]}
            if all(id(tensor) in inside for tensor in [*model.parameters(), *model.buffers()]):
                return _unwrapped(inner)
    return model


def _is_module(thing: Any) -> bool:
    return isinstance(thing, torch.nn.Module)


def _is_stateful(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _storable(name: str, value: Any) -> Any:
    try:
        pack({name: value}, clone=False)
    except CheckpointError as error:
        raise ConfigError(f"this extra cannot be part of the training state: {error}") from None
    return value


def _alike(tensor: torch.Tensor, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and other.shape == tensor.shape and other.dtype == tensor.dtype


def _describe(tensor: torch.Tensor) -> str:
    return f"tensor of shape {list(tensor.shape)} and dtype {dtype_text(tensor.dtype)}"


def _unknown(name: str) -> str:
    return f"this TrainingState has no '{name}'; name it when making it: TrainingState(..., {name}=...)"


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the state that an optimizer keeps for one parameter, which may be nested."""
    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):  # the order of their making can differ after a restore
            yield from _tensors_in(f"{name}.{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _tensors_in(f"{name}.{index}", entry)
