"""``hvd.DistributedOptimizer`` with a second chance: its gradients are kept until all members have them reduced.

Horovod reduces ``param.grad`` in place, so a reduction that broke midway leaves nothing to begin again with. Therefore
each local gradient is copied when backward has finished it, just before Horovod starts on it.
"""

from __future__ import annotations

import os
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.errors import ConfigError, PeerFailedError, WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chaos_mpi.horovod.runtime import HorovodRuntime
    from chaos_mpi.mpi.world import World

#: Horovod works in a thread of its own, with a cycle of one millisecond; to look more often gains nothing.
_POLL_S = 0.0002
_LIVENESS_PERIOD_S = 0.002
#: What Horovod raises when the reduction cannot be submitted, or has failed (its own error is a RuntimeError, too).
_HOROVOD_ERRORS = (RuntimeError, ValueError)


class KeptGradients:
    """The gradients of one step: the local ones, kept, and what Horovod makes of them in ``param.grad``.

    Args:
        optimizer: made by ``hvd.DistributedOptimizer``.
        runtime: the Horovod it runs on.
    """

    def __init__(self, optimizer: Any, runtime: HorovodRuntime) -> None:
        self._optimizer, self._runtime = optimizer, runtime
        self._params: list[torch.nn.Parameter] = [
            p for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        self._known = frozenset(self._params)
        self._copies: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._kept: set[torch.nn.Parameter] = set()
        self._reached: set[torch.nn.Parameter] = set()
        self._start = runtime.starts
        self._failure: Exception | None = None

    def left_out(self) -> torch.nn.Parameter | None:
        """A parameter that is to be stepped by a gradient which nobody reduces; None if there is none."""
        return next(
            (
                p
                for group in self._optimizer.param_groups
                for p in group["params"]
                if p.grad is not None and p not in self._known
            ),
            None,
        )

    def keep(self, param: torch.nn.Parameter) -> None:
        """Backward has finished the local gradient of ``param``."""
        if not self._reached:
            self._start = self._runtime.starts
        self._reached.add(param)
        self._copy(param)

    def is_final(self, param: torch.nn.Parameter) -> bool:
        """Whether the present backward pass is the last one before Horovod reduces this gradient."""
        return bool(self._optimizer._allreduce_delay.get(param) == 1)

    def attempt(self, submit: Callable[[], Any]) -> Any:
        """Submit something to Horovod; a failure is kept for :meth:`submit`, so that backward can go on.

        If Horovod was started anew since the first gradient of this step, all are submitted at the end of backward.
        """
        if self._failure is None and self._start == self._runtime.starts:
            try:
                return submit()
            except _HOROVOD_ERRORS as error:
                self._failure = error
        return None, None

    def submit(self) -> None:
        """Have all gradients under way, those that backward did not reach included; from the kept ones if need be.

        Raises:
            PeerFailedError: Horovod does not take them.
        """
        for param in self._params:
            if param not in self._kept:
                self._copy(param)
        if self._failure is not None or self._start != self._runtime.starts:
            self._restore()
        optimizer, handles = self._optimizer, self._optimizer._handles
        # In the same way as the hooks do it, because a member that was behind may still do it there.
        for group in dict.fromkeys(optimizer._p_to_group.values()):
            if group not in handles and self._reached.issuperset(group):
                handles[group] = optimizer._grouped_allreduce_grad_async(group)
        grouped = {param for key in handles if isinstance(key, tuple) for param in key}
        for param in self._params:
            if param not in grouped and handles.get(param, (None, None))[0] is None:
                handles[param] = optimizer._allreduce_grad_async(param)
        self._raise_failure()

    def finish(self, world: World, what: Callable[[], str], limit_s: float) -> None:
        """Wait until all gradients are reduced.

        Raises:
            PeerFailedError: a member died, or the communicator was revoked.
            WaitTimeoutError: not all were reduced within the limit.
        """
        begun = looked = time.monotonic()
        poll = self._runtime.hvd.poll
        for handle, _ in list(self._optimizer._handles.values()):
            while not poll(handle):
                time.sleep(_POLL_S)
                now = time.monotonic()
                if now - looked > _LIVENESS_PERIOD_S:
                    looked = now
                    if world.is_broken():
                        raise PeerFailedError("a member of this communicator has failed")
                    if now - begun > limit_s:
                        raise WaitTimeoutError(f"waited {limit_s:.0f} s for {what()}")
        try:
            self._optimizer.take_reduced()
        except _HOROVOD_ERRORS as error:
            self._failure = error
            self._raise_failure()

    def scale(self, factor: float) -> None:
        """Multiply what was reduced."""
        for param in self._params:
            if param.grad is not None:
                param.grad.mul_(factor)

    def forget(self) -> None:
        """The step is finished at all members."""
        self._kept.clear()
        self._reached.clear()
        self._failure = None

    def _copy(self, param: torch.nn.Parameter) -> None:
        if param not in self._copies:
            self._copies[param] = torch.empty_like(param)
        copy = self._copies[param]
        if param.grad is None:
            copy.zero_()
        elif param.grad.is_sparse:
            raise ConfigError("sparse gradients cannot be kept for a second try; set sparse=False in the module")
        else:
            copy.copy_(param.grad)
        self._kept.add(param)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise PeerFailedError(f"Horovod: {self._failure}") from self._failure

    def _restore(self) -> None:
        """Begin again: local gradients everywhere, and nothing submitted."""
        self._failure, self._start = None, self._runtime.starts
        optimizer = self._optimizer
        optimizer._handles.clear()
        optimizer._synchronized = False
        for group in optimizer._group_counts:
            optimizer._group_counts[group] = 0
        for param in self._params:
            optimizer._allreduce_delay[param] = optimizer.backward_passes_per_step
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.copy_(self._copies[param])


def make_optimizer(
    plain: torch.optim.Optimizer, runtime: HorovodRuntime, reduce: Callable[[], None], **options: Any
) -> Any:
    """``hvd.DistributedOptimizer(plain, **options)``, made so that a reduction can be done again.

    What it steps with, and where the optimizer's state is, remains ``plain``: both show the same.

    Args:
        reduce: brings the gradients together, whatever happens to other members.

    Raises:
        ConfigError: an option cannot be used here.
    """
    hvd = runtime.hvd
    if options.get("op", hvd.Average) == hvd.Adasum:
        raise ConfigError(
            "op=hvd.Adasum is not supported by ChaosCallback, because Horovod then reduces changes of the parameters "
            "and not gradients; use hvd.Average or hvd.Sum"
        )
    if options.get("process_set", hvd.global_process_set) is not hvd.global_process_set:
        raise ConfigError("process_set must be left out: all members of the session take part")
    if options.get("sparse_as_dense"):
        raise ConfigError("sparse_as_dense is not supported by ChaosCallback; set sparse=False in the module")
    with _hooks_even_alone():
        optimizer = hvd.DistributedOptimizer(plain, **options)
    optimizer.__class__ = _elastic_class(type(optimizer), plain, reduce)
    for name in ("param_groups", "state", "defaults"):
        optimizer.__dict__.pop(name, None)  # from here on those of the plain one
    optimizer.kept = KeptGradients(optimizer, runtime)
    return optimizer


@contextmanager
def _hooks_even_alone() -> Iterator[None]:
    """Horovod hooks gradients only if there are several ranks, or may be; it asks the environment for that."""
    before = os.environ.get("HOROVOD_ELASTIC")
    os.environ["HOROVOD_ELASTIC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOROVOD_ELASTIC"]
        else:
            os.environ["HOROVOD_ELASTIC"] = before


def _elastic_class(horovods: type, plain: torch.optim.Optimizer, reduce: Callable[[], None]) -> type:
    """A class like Horovod's, whose methods that call ``super(self.__class__, self)`` are all replaced."""

    class Elastic(horovods):  # type: ignore[misc]
        param_groups = property(lambda self: plain.param_groups)
        state = property(lambda self: plain.state)
        defaults = property(lambda self: plain.defaults)
        kept: KeptGradients

        def take_reduced(self) -> None:
            """Take what Horovod has reduced into ``param.grad``."""
            horovods.synchronize(self)  # type: ignore[attr-defined]

        def synchronize(self) -> None:
            """Have the gradients of all members in ``param.grad``."""
            reduce()

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Reduce the gradients, if that has not been done, and apply them; ``closure`` is called before, once."""
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if self._should_synchronize:
                if self._synchronized:
                    warnings.warn(
                        "optimizer.step() after optimizer.synchronize(): the gradients are not reduced once more. Say "
                        "so with 'with optimizer.skip_synchronize(): optimizer.step()'.",
                        stacklevel=2,
                    )
                else:
                    self.synchronize()
            self._synchronized: bool = False
            plain.step()
            return loss

        def zero_grad(self, set_to_none: bool = True) -> None:
            """Forget the gradients; not between backward and step."""
            if self._handles:
                raise ConfigError("zero_grad() was called after backward() and before step(); call it after step()")
            plain.zero_grad(set_to_none)

        def state_dict(self) -> dict[str, Any]:
            return plain.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            plain.load_state_dict(state_dict)

        def _allreduce_grad_async(self, p: torch.nn.Parameter) -> Any:
            return self.kept.attempt(lambda: horovods._allreduce_grad_async(self, p))  # type: ignore[attr-defined]

        def _grouped_allreduce_grad_async(self, ps: Any) -> Any:
            return self.kept.attempt(lambda: horovods._grouped_allreduce_grad_async(self, ps))  # type: ignore[attr-defined]

    Elastic.__name__ = Elastic.__qualname__ = type(plain).__name__
    return Elastic
