"""Data parallel training that goes on when ranks die: the counterpart of torch's ``DistributedDataParallel``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from chaos_mpi.elastic.current import current_session
from chaos_mpi.elastic.session import Session
from chaos_mpi.errors import ConfigError, MismatchError
from chaos_mpi.torch.buckets import GradientStep, make_buckets
from chaos_mpi.torch.modules import ignored_names, refuse_unfrozen, refuse_unusable_module
from chaos_mpi.torch.reducer import Reducer

#: The steps of modules in one backward end one after the other; one that does not, after an error, never will.
_MOST_WAITS = 1000
#: Those of this process.
_wrappers: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


class DistributedDataParallel(torch.nn.Module):
    """Averages the gradients of ``module`` over all members, at the end of every ``backward()``.

    Takes the arguments of :class:`torch.nn.parallel.DistributedDataParallel` and can stand in for it. While
    backward runs, full buckets are reduced with non-blocking MPI allreduce. When a member dies, the reduction is
    done again among the survivors from the local gradients, which are kept until it is finished; the training
    loop sees nothing but a longer step. The average is over the members that took part.

    At construction, all ranks get rank 0's parameters and buffers. After every step, and at the end, buffers
    (BatchNorm statistics, for one) are those of rank 0, unless ``broadcast_buffers`` is false. Where the module names
    some that torch's is to ignore (``_ddp_params_and_buffers_to_ignore``), these are each rank's own.

    A module that is wrapped once more has the newer wrapper only. Parameters that are frozen now are never averaged.

    Args:
        module: its parameters are on one device, of dtype float16, bfloat16, float32 or float64. Half-precision
            gradients are summed in float32 and rounded once. Those of a GPU are summed in the memory of the host.
        device_ids, output_device: None, or the device of the module. With ``device_ids`` inputs are moved there.
        dim: as in torch.
        broadcast_buffers: keep module buffers equal to rank 0's; default: yes. Newer releases of torch call it
            ``forward_sync_buffers``, which counts if both are given.
        init_sync: give all ranks rank 0's parameters and buffers now.
        process_group: must be None: the session is the group.
        bucket_cap_mb: size of a bucket, MiB.
        find_unused_parameters, static_graph, gradient_as_bucket_view, check_reduction: accepted; nothing has
            to be chosen here. Parameters that backward did not reach are always found, at no cost, and local
            gradients need memory of their own.
        session: default: the open session.

    Raises:
        ConfigError: an argument or a parameter is of a kind that cannot be used; in backward: a parameter that was
            frozen at first has a gradient.
        MismatchError: the module differs between ranks; the message names the first difference.
        NoSessionError: :func:`chaos_mpi.init` has not been called.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        device_ids: list[int | torch.device] | None = None,
        output_device: int | torch.device | None = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: object = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        *,
        forward_sync_buffers: bool | None = None,
        session: Session | None = None,
    ) -> None:
        super().__init__()
        _refuse_unusable(module, device_ids, output_device, process_group, bucket_cap_mb)
        self.module = module
        self._device = next(module.parameters()).device if device_ids else None
        self.dim = dim
        chosen = forward_sync_buffers if forward_sync_buffers is not None else broadcast_buffers
        self.broadcast_buffers = chosen if chosen is not None else True
        self.find_unused_parameters = find_unused_parameters
        self.require_backward_grad_sync = True
        self._session = session if session is not None else current_session()
        self._params = [p for p in module.parameters() if p.requires_grad]
        self._frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        self._buckets = make_buckets(self._params, int((bucket_cap_mb or 25) * (1 << 20)))
        self._refuse_differences()
        if init_sync:
            self._session.share("initial parameters", [tensor.detach() for _, tensor in self._common()])
        self._reducer = Reducer(self._session, self._params, self._buckets, module if self.broadcast_buffers else None)
        self._in_backward = False
        self._end_queued = False
        self._reached: set[int] = set()
        self._is_late, self._waits = False, 0
        self._step: GradientStep | None = None
        self._is_retired = self._is_part = False
        self._take_over()
        self._handles: list[RemovableHandle] = [
            self._params[index].register_post_accumulate_grad_hook(self._hook(position, index))  # type: ignore[no-untyped-call]
            for position, bucket in enumerate(self._buckets)
            for index in bucket.params
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        if self._device is not None:
            args, kwargs = tree_map(self._moved, (args, kwargs))
        if not torch.is_grad_enabled() or self._is_part:
            return self.module(*args, **kwargs)
        if self._is_retired:
            raise ConfigError(
                "this module was wrapped once more, and its gradients are averaged by the newer "
                "DistributedDataParallel: call that one"
            )
        if self._in_backward and torch._C._current_graph_task_id() == -1:
            self._abandon_backward()
        self._reducer.rounds.begin()
        self._end_queued = self._in_backward
        output = self.module(*args, **kwargs)
        for tensor in tree_leaves(output):
            # Not a leaf: a parameter that the model returns has its own hook, and would keep one more of each call.
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(self._output_gradient)  # type: ignore[no-untyped-call]
        return output

    def __reduce_ex__(self, protocol: object) -> Any:
        raise ConfigError("a module that is wrapped belongs to this process and its session: copy or save model.module")

    def _moved(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, ``backward()`` accumulates gradients locally; the first one after it averages the total."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def _take_over(self) -> None:
        """Retire earlier wrappers of these parameters: each would make a step of its own of every backward pass."""
        mine, parts = {id(p) for p in self._params}, set(self.module.modules())
        for earlier in list(_wrappers):
            earlier._frozen = [(name, p) for name, p in earlier._frozen if id(p) not in mine]
            if earlier.module is self.module or mine.issuperset(map(id, earlier._params)):
                earlier._retire(is_part=earlier in parts)
        _wrappers.add(self)

    def _retire(self, *, is_part: bool) -> None:
        """Have another one, which contains this one if ``is_part``, do all from now on."""
        while self._handles:
            self._handles.pop().remove()
        self._reducer.close()
        self._is_retired, self._is_part = True, is_part

    # -- backward ------------------------------------------------------------------------------------

    def _output_gradient(self, _: torch.Tensor) -> None:
        # Here the outermost backward is running. Parameters may get their gradients in backwards nested in
        # it (reentrant activation checkpointing), whose end is not the end of the step.
        self._queue_end()

    def _queue_end(self) -> None:
        if not self._end_queued:
            self._end_queued = True
            Variable._execution_engine.queue_callback(self._backward_ends)

    def _hook(self, bucket: int, index: int) -> Callable[[torch.Tensor], None]:
        def gradient_is_final(param: torch.Tensor) -> None:
            if not self._in_backward:
                self._backward_begins()
            if self._step is None:
                self._reached.add(index)
                return
            if index in self._reached:  # it was not final
                self._step.more(bucket)
                return
            self._reached.add(index)
            self._step.ready(bucket)

        return gradient_is_final

    def _backward_begins(self) -> None:
        self._in_backward = True
        self._reached.clear()
        self._queue_end()
        if not self.require_backward_grad_sync:
            return
        # Another wrapped module may be in the same backward (a GAN's); this one's turn comes when that is done.
        self._is_late = self._session.gradient_step_is_open
        if not self._is_late:
            self._step = self._reducer.begin()

    def _abandon_backward(self) -> None:
        """The last backward pass has ended by an error, and a new forward pass begins."""
        if self._step is not None or self._is_late:
            raise ConfigError(
                "the last backward pass of this model did not come to its end, because of an error that the script has "
                "caught: this rank cannot finish the step that the others are in, nor leave it out. Let the error end "
                f"it; the others train on (rank {self._session.rank}, step {self._session.step})"
            )
        # Within no_sync nothing is under way. What the script does with half a gradient is up to it, as without us.
        self._in_backward = False
        self._reducer.rounds.unmute()

    def _begin_late(self) -> None:
        self._is_late, self._waits = False, 0
        self._step = self._reducer.begin()
        for position, bucket in enumerate(self._buckets):
            for _ in self._reached.intersection(bucket.params):
                self._step.ready(position)

    def _backward_ends(self) -> None:
        if self._is_late and self._session.gradient_step_is_open and self._waits < _MOST_WAITS:
            self._waits += 1
            Variable._execution_engine.queue_callback(self._backward_ends)
            return
        if self._is_late:
            self._begin_late()
        step, self._step = self._step, None
        self._end_queued = False
        if not self._in_backward:
            refuse_unfrozen(self._frozen)
            return  # torch.autograd.grad, which reaches no parameter
        self._in_backward = False
        self._reducer.rounds.note_backward()
        self._reducer.rounds.unmute()
        if step is None:
            refuse_unfrozen(self._frozen)
            return
        self._reducer.settle(step)
        refuse_unfrozen(self._frozen)
        if step.too_early:
            raise ConfigError(
                "a parameter got gradients at two times of one backward pass, and the first were sent already: it is "
                "used in several parts of the model that torch.utils.checkpoint recomputes with use_reentrant=True; "
                "call it with use_reentrant=False"
            )
        step.deliver()
        self._reducer.delivered()

    # -- equal modules -------------------------------------------------------------------------------

    def _common(self) -> list[tuple[str, torch.Tensor]]:
        """Parameters and buffers that all ranks are to have alike, with their names."""
        ignored = ignored_names(self.module)
        everything = [*self.module.named_parameters(), *self.module.named_buffers()]
        return [(name, tensor) for name, tensor in everything if name not in ignored]

    def _refuse_differences(self) -> None:
        signature = {"module": [[name, list(t.shape), str(t.dtype), t.requires_grad] for name, t in self._common()]}
        signatures = self._session.gather(signature)
        for rank, other in enumerate(signatures[1:], start=1):
            for here, there in _pairs(signatures[0]["module"], other["module"]):
                if here != there:
                    # Not before all have the same signatures: the others would take this rank for dead, and go on.
                    self._session.barrier()
                    raise MismatchError(
                        f"the model differs between ranks: rank 0 has {_words(here)}, rank {rank} has {_words(there)}"
                    )


def _pairs(here: list[Any], there: list[Any]) -> Iterator[tuple[Any, Any]]:
    for i in range(max(len(here), len(there))):
        yield (here[i] if i < len(here) else None), (there[i] if i < len(there) else None)


def _words(entry: list[Any] | None) -> str:
    if entry is None:
        return "no further parameter"
    name, shape, dtype, requires_grad = entry
    return f"'{name}' of shape {tuple(shape)}, {dtype.removeprefix('torch.')}{'' if requires_grad else ', not trained'}"


def _is_that(chosen: int | str | torch.device, device: torch.device) -> bool:
    """Whether somebody means this device."""
    if isinstance(chosen, int):
        return device.type != "cpu" and device.index == chosen
    named = torch.device(chosen)
    return named.type == device.type and named.index in (None, device.index)


def _refuse_unusable(
    module: torch.nn.Module,
    device_ids: list[int | torch.device] | None,
    output_device: int | torch.device | None,
    process_group: object,
    bucket_cap_mb: float | None,
) -> None:
    if process_group is not None:
        raise ConfigError("process_group must be None: all members of the session take part")
    if bucket_cap_mb is not None and bucket_cap_mb <= 0:
        raise ConfigError(f"bucket_cap_mb is {bucket_cap_mb}; it must be positive")
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError("the module has no parameter that requires a gradient; it needs no DistributedDataParallel")
    devices = {tensor.device for tensor in [*module.parameters(), *module.buffers()]}
    there = ", ".join(sorted(map(str, devices)))
    if len(devices) > 1:
        raise ConfigError(f"the module is spread over {there}; each rank trains a module that is on one device")
    for name, chosen in [*(("device_ids", each) for each in device_ids or ()), ("output_device", output_device)]:
        if chosen is not None and not _is_that(chosen, *devices):
            raise ConfigError(f"{name} names {chosen}, but the module is on {there}; leave {name} out")
    ignored = ignored_names(module)
    if trained := [name for name, p in module.named_parameters() if p.requires_grad and name in ignored]:
        raise ConfigError(
            f"'{trained[0]}' is trained, and named in _ddp_params_and_buffers_to_ignore: each rank would come to other "
            "values; freeze it, or leave it out there"
        )
    refuse_unusable_module(module)
