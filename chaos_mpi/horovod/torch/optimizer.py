"""The optimizer that steps with the gradients of all ranks."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from chaos_mpi.horovod.torch.adasum import Adaptive
from chaos_mpi.horovod.torch.compression import Compression, Compressor
from chaos_mpi.horovod.torch.job import job
from chaos_mpi.horovod.torch.negotiation import Asked
from chaos_mpi.horovod.torch.process_sets import ProcessSet, global_process_set
from chaos_mpi.horovod.torch.reduce_ops import Adasum, Average, ReduceOp, Sum
from chaos_mpi.horovod.torch.reducing import grouped_allreduce
from chaos_mpi.horovod.torch.requests import Group, Request
from chaos_mpi.horovod.torch.step import Steps

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]

_numbers = itertools.count()
#: Those that there are, in the order in which they were made, which is the same at every rank.
_living: weakref.WeakValueDictionary[int, Distributed] = weakref.WeakValueDictionary()


class Distributed:
    """What :func:`DistributedOptimizer` adds to an optimizer, which is the other base of the class that it makes."""

    param_groups: list[dict[str, Any]]
    state: dict[Any, Any]
    _parameter_names: dict[torch.nn.Parameter, str]

    def set_up(
        self,
        wrapped: torch.optim.Optimizer,
        named_parameters: NamedParameters | None,
        compression: type[Compressor],
        backward_passes_per_step: int,
        op: ReduceOp,
        predivide: float,
        process_set: ProcessSet,
    ) -> None:
        """Find the parameters, and follow their gradients."""
        self._wrapped = wrapped
        named = _checked_names(self.param_groups, named_parameters)
        self._parameter_names = {param: name for name, param in named}
        own = {param for group in self.param_groups for param in group["params"]}
        for earlier in list(_living.values()):
            if not own.isdisjoint(earlier._trained):
                earlier.let_go()
        self.backward_passes_per_step = backward_passes_per_step
        self.op, self.process_set = op, process_set
        if op == Adasum:  # each rank steps with its own gradients, and what its optimizer keeps is of these
            job().session.optimizers_differ = True
        self._compression, self._predivide = compression, predivide
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        self._trained: list[torch.nn.Parameter] = list(dict.fromkeys(params))
        self._passes: dict[torch.nn.Parameter, int]
        self.begin_anew()
        self._should_synchronize = True
        self._steps: Steps | None = None
        if process_set is global_process_set and op in (Average, Sum) and self._trained:
            self._steps = Steps(job(), self, self._trained, op == Average, predivide, compression)  # type: ignore[arg-type]
        this = weakref.ref(self)  # parameters outlive optimizers

        def gradient_is_there(param: torch.nn.Parameter) -> None:
            if (optimizer := this()) is not None:
                optimizer._gradient_is_there(param)

        self._hooks = [
            param.register_post_accumulate_grad_hook(gradient_is_there)  # type: ignore[no-untyped-call]
            for param in self._trained
        ]
        weakref.finalize(self, _remove, self._hooks).atexit = False
        _living[next(_numbers)] = self

    def let_go(self) -> None:
        """Another one has parameters of this one: follow no gradients any more, and reduce them when a step is taken.

        Raises:
            HorovodInternalError: a step had begun, and the ranks make different calls.
        """
        _remove(self._hooks)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Gradients that are there already belong to no step."""
        if self._steps is not None:
            self._steps.discard()
        self.begin_anew()

    def begin_anew(self) -> None:
        """No step is under way: the next gradient is the first of one."""
        self._passes = dict.fromkeys(self._trained, 0)
        self._synchronized = self._step_begun = False

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes make a step."""
        self.backward_passes_per_step = passes
        if not self._step_begun:
            self._passes = dict.fromkeys(self._trained, 0)

    def load_state_dict(self, state_dict: Any) -> None:
        """Take a state, as any optimizer; gradients that are there already belong to no step.

        Raises:
            HorovodInternalError: it is called between backward and :meth:`step`, and not by all ranks.
        """
        self._forget_gradients()
        self._should_synchronize = True
        groups, state = self.param_groups, self.state
        super().load_state_dict(state_dict)  # type: ignore[misc]
        # In place, because a scheduler may hold the optimizer that this one shares them with.
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.clear()
            group.update(loaded)
        loaded_state = dict(self.state)
        state.clear()
        state.update(loaded_state)
        self.param_groups, self.state = groups, state

    def synchronize(self) -> None:
        """Put the gradients of all ranks into ``param.grad``; :meth:`step` does it, unless it is told not to.

        Raises:
            HorovodInternalError: the ranks make different calls.
            ValueError: the process set has ended, or a parameter has a gradient that is not reduced.
        """
        self._passes = dict.fromkeys(self._trained, 0)
        self._synchronized, self._step_begun = True, False
        if not self._takes_part() or not self._trained:
            return
        for param in self._trained:
            if param.grad is None:  # other ranks may have used it
                param.grad = torch.zeros_like(param)
        if self.op == Adasum:
            return
        if self._steps is not None:
            self._steps.settle()
            return
        given = [
            p.grad if p.grad.layout == torch.strided else p.grad.to_dense() for p in self._trained if p.grad is not None
        ]
        if self._predivide != 1.0:
            given = [gradient / self._predivide for gradient in given]
        totals = grouped_allreduce(
            given, compression=self._compression, op=self.op, postscale_factor=self._predivide,
            process_set=self.process_set,
        )  # fmt: skip
        for param, total in zip(self._trained, totals, strict=True):
            assert param.grad is not None
            sparse = param.grad.layout != torch.strided
            param.grad = total.to_sparse(param.grad.sparse_dim()) if sparse else total

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within it, :meth:`step` takes the gradients as :meth:`synchronize` and the script have left them."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize, and take the step.

        Args:
            closure: computes the loss and its gradients, once, before they are reduced. Within
                :meth:`skip_synchronize`, and with Adasum, it is the optimizer that calls it.

        Returns:
            What ``closure`` returns.
        """
        loss = None
        if closure is not None and self._should_synchronize and self.op != Adasum:
            with torch.enable_grad():
                loss = closure()
            closure = None
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(
                    "optimizer.step() called without optimizer.skip_synchronize() context after "
                    "optimizer.synchronize(): the gradients are reduced once more",
                    stacklevel=2,
                )
            self.synchronize()
        else:
            self._takes_part()
        self._synchronized = False
        self._wrapped._opt_called = True  # type: ignore[attr-defined]  # for a scheduler that was made before
        if self.op == Adasum and self._trained:
            return self._adaptive_step(closure)
        stepped = super().step() if closure is None else super().step(closure)  # type: ignore[misc]
        return loss if loss is not None else stepped

    # torch would call the hooks of a step for this one, and again for the one inside it.
    step.hooked = True  # type: ignore[attr-defined]

    def local_step(self) -> None:
        """A step of this rank alone."""
        super().step()  # type: ignore[misc]

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As any optimizer, but not while gradients are under way.

        Raises:
            AssertionError: between backward and :meth:`step` or :meth:`synchronize`.
        """
        if any(self._passes.values()):
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(): the gradients that it would clear are being reduced"
            )
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]

    def _takes_part(self) -> bool:
        """Whether gradients of this rank are reduced; none is to be stepped with that should be and is not."""
        if not self.process_set.takes_part():
            return False
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.requires_grad and param not in self._passes:
                    raise ValueError(
                        f"a parameter of shape {tuple(param.shape)} has a gradient that is not reduced over the ranks, "
                        "since it was frozen, or not in the optimizer, when hvd.DistributedOptimizer was called. Have "
                        "all parameters there at that time, or call it anew with the optimizer that was given to it"
                    )
        return True

    def _gradient_is_there(self, param: torch.nn.Parameter) -> None:
        if self.process_set.process_set_id is None:
            return  # it has ended: another optimizer may have the parameter, and a step of this one is refused
        if job().is_alone:
            return  # nothing is under way before step(): a script that is tried out may do with gradients what it likes
        self._passes[param] += 1
        if self._passes[param] > self.backward_passes_per_step:
            raise AssertionError(
                "gradients were computed more than backward_passes_per_step times before step(); increase "
                "backward_passes_per_step to accumulate gradients locally"
            )
        if self._steps is None or self._passes[param] < self.backward_passes_per_step:
            return
        if not self._step_begun:
            self._step_begun = True
            self._steps.begin()
        self._steps.ready(param)

    def _adaptive_step(self, closure: Callable[[], Any] | None) -> Any:
        """Each rank steps by itself, and what the steps have changed is combined."""
        here = job()
        here.boundary()
        before = [p.detach().clone() for p in self._trained]
        loss = super().step(closure)  # type: ignore[misc]
        deltas = [p.detach() - b for p, b in zip(self._trained, before, strict=True)]
        smaller = [self._compression.compress(delta) for delta in deltas]
        call = f"adasum step[{len(deltas)} tensors]"
        given = [tensor.cpu() for tensor, _ in smaller]

        def make(_: Group) -> Adaptive:
            return Adaptive(call, given, is_step=True, proposes=here.session.wants_to_talk())

        request = Request(Asked(call, call), make, lambda done, _: done.sums())
        sums = here.waiting.wait(here.queue.put(request))
        with torch.no_grad():
            for param, start, total, (_, context) in zip(self._trained, before, sums, smaller, strict=True):
                param.copy_(start + self._compression.decompress(total.to(param.device), context))
        return loss


def DistributedOptimizer(  # noqa: N802
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> torch.optim.Optimizer:
    """An optimizer of the same class, sharing the given one's state, that steps with the gradients of all ranks.

    They are reduced while backward is still running. When a rank dies meanwhile, they are reduced again among those
    that are left, from the local gradients: the step is not lost, and the parameters stay the same everywhere. With a
    process set, or Adasum, they are reduced when the step is taken.

    Args:
        optimizer: over the parameters that are trained.
        named_parameters: all of them with unique names; default: numbered.
        compression: rounds gradients before they are summed.
        backward_passes_per_step: backward passes that a step accumulates.
        op: Average, Sum or Adasum.
        gradient_predivide_factor: what gradients are divided by before they are summed, and the average multiplied by.
        num_groups, groups: checked, and not needed: gradients travel in buckets.
        sparse_as_dense: accepted; sparse gradients travel dense in any case, and are sparse again afterwards.
        process_set: whose gradients; a set is not elastic.

    Raises:
        ValueError: an argument cannot be used, or names are missing or there twice; the optimizer is LBFGS, which
            computes gradients several times in a step.
    """
    op = ReduceOp(op)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "DistributedOptimizer cannot have torch.optim.LBFGS, whose step computes gradients as often as it likes: "
            "each rank would search along its own gradients. Give LBFGS a closure that calls hvd.allreduce on the loss "
            "and on every param.grad, and no DistributedOptimizer"
        )
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor goes with op=Average only")
    if op not in (Average, Sum, Adasum):
        raise ValueError(f"DistributedOptimizer knows Average, Sum and Adasum, not {op.name}")
    if op == Adasum and process_set is not global_process_set:
        raise NotImplementedError("Adasum is there for all ranks only, not for a process set")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    if num_groups != 0:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    _check_groups(groups)
    job()
    kind = type(optimizer.__class__.__name__, (Distributed, optimizer.__class__), {})
    distributed: Any = object.__new__(kind)
    # A scheduler that the optimizer has already has put a step of its own there.
    distributed.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    distributed.set_up(
        optimizer, named_parameters, compression, backward_passes_per_step, op, gradient_predivide_factor, process_set
    )
    return distributed  # type: ignore[no-any-return]


def is_in_step() -> bool:
    """Whether gradients of a step are there, or some of them, and the step is not taken."""
    return any(any(optimizer._passes.values()) for optimizer in list(_living.values()))


def forget_passes() -> None:
    """All ranks begin anew: no optimizer is in the middle of a step."""
    for optimizer in list(_living.values()):
        optimizer.begin_anew()


def _remove(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _checked_names(
    groups: Sequence[dict[str, Any]], named_parameters: NamedParameters | None
) -> list[tuple[str, torch.nn.Parameter]]:
    if named_parameters is None:
        return [(f"noname.{i}.{j}", p) for i, group in enumerate(groups) for j, p in enumerate(group["params"])]
    named = list(named_parameters)
    if any(not isinstance(entry, tuple) for entry in named):
        raise ValueError("named_parameters is to be pairs of name and parameter, as from model.named_parameters()")
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names in named_parameters have to be unique; there more than once: {', '.join(twice)}")
    known = {id(param) for _, param in named}
    missing = sum(id(param) not in known for group in groups for param in group["params"])
    if missing:
        raise ValueError(f"named_parameters lacks {missing} of the optimizer's parameters")
    return named


def _check_groups(groups: int | Sequence[Sequence[torch.Tensor]] | None) -> None:
    if groups is None:
        return
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError("groups is to be a number that is not negative, or lists of parameters")
        return
    members = [param for group in groups for param in group]
    if not all(isinstance(param, torch.Tensor) for param in members):
        raise ValueError("groups is to consist of lists of parameters")
    if len({id(param) for param in members}) != len(members):
        raise ValueError("a parameter can be in one group only")
