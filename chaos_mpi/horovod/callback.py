"""The callback that makes a Horovod script elastic, with real Horovod underneath."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

import chaos_mpi
from chaos_mpi.elastic.current import current_session_or_none
from chaos_mpi.elastic.lifecycle import tidy_uncaught
from chaos_mpi.elastic.session import Session, SessionResult
from chaos_mpi.elastic.state import Stateful, TrainingState
from chaos_mpi.errors import ConfigError
from chaos_mpi.horovod.optimizer import make_optimizer
from chaos_mpi.horovod.runtime import HorovodRuntime, load_horovod
from chaos_mpi.horovod.step import HorovodStep
from chaos_mpi.torch.modules import StableBuffers, refuse_unusable_module
from chaos_mpi.torch.rounds import Rounds

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What Horovod 0.28.1 reduces over MPI, of what can have a gradient.
_REDUCIBLE = (torch.float16, torch.float32, torch.float64)
_runtimes: weakref.WeakKeyDictionary[Session, HorovodRuntime] = weakref.WeakKeyDictionary()
_with_callback: weakref.WeakSet[Session] = weakref.WeakSet()


def init(**settings: Any) -> Session:
    """In place of ``hvd.init()``: join the job, and start Horovod on its communicator.

    From here on ``hvd.rank()``, ``hvd.size()`` and the like can be asked; they change with the members. Called again,
    or after :func:`chaos_mpi.init`, it goes on with the open session.

    Args:
        settings: as for :func:`chaos_mpi.init`.

    Raises:
        ConfigError: Horovod is not installed, was built without MPI, or was started already.
        EngineError: see :func:`chaos_mpi.init`.
    """
    session = current_session_or_none()
    if session is None:
        tidy_uncaught()  # before anything that can fail
    load_horovod()  # refused before MPI is started
    if session is None:
        session = chaos_mpi.init(**settings)
    elif settings:
        raise ConfigError("a session is open already; give the settings to the first call")
    _runtime_of(session)
    return session


def _runtime_of(session: Session) -> HorovodRuntime:
    runtime = _runtimes.get(session)
    if runtime is None:
        runtime = HorovodRuntime(session.settings.timeout_s)
        session.attach_companion(runtime)
        _runtimes[session] = runtime
        session.barrier()  # if a rank died while Horovod started, it is started anew here
    return runtime


class ChaosCallback:
    """Keeps a Horovod script training when ranks die, join and leave.

    In place of ``hvd.DistributedOptimizer``, ``hvd.broadcast_parameters`` and ``hvd.broadcast_optimizer_state``::

        chaos_mpi.horovod.init()  # was: hvd.init()
        ...
        callback = chaos_mpi.horovod.ChaosCallback(model, optimizer, sampler=sampler, epoch=0)
        optimizer, state = callback.optimizer, callback.state
        for state.epoch in range(state.epoch, 10):
            ...  # the training loop as it was
        callback.close()

    Made when model, optimizer, scheduler and sampler exist; then all ranks have rank 0's parameters and buffers, and a
    rank that was started to join the job has the job's training state, which it gets from several members at once.
    The averages that Horovod makes are over the members that took part. When a member dies, Horovod is started
    anew among the survivors, and the step in flight is reduced again from the local gradients, which are kept.

    Members join and leave between two steps, when the model is called in training mode, or at :meth:`on_batch_end`.

    Args:
        model: its parameters are on the CPU.
        optimizer: not wrapped yet.
        scheduler, sampler, rng, extras: see :class:`chaos_mpi.TrainingState`.
        named_parameters, compression, backward_passes_per_step, op, gradient_predivide_factor, groups: as for
            ``hvd.DistributedOptimizer``; the names default to those of the model.
        broadcast_buffers: after every step, and at the end, module buffers (BatchNorm statistics, for one) are those
            of rank 0. Horovod lets them differ, and then the replicas are not identical at the end.

    Attributes:
        session: the session, for ``record``, ``evaluate``, ``all_reduce`` and the like.
        optimizer: the optimizer to train with, of Horovod's kind.
        state: the :class:`chaos_mpi.TrainingState`.

    Raises:
        ConfigError: Horovod cannot be used, or an argument cannot.
        MismatchError: model or optimizer differ between ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Stateful | Mapping[str, Stateful] | None = None,
        sampler: Stateful | Mapping[str, Stateful] | None = None,
        rng: bool = False,
        named_parameters: Any = None,
        compression: Any = None,
        backward_passes_per_step: int = 1,
        op: Any = None,
        gradient_predivide_factor: float = 1.0,
        groups: Any = None,
        broadcast_buffers: bool = True,
        **extras: Any,
    ) -> None:
        self.session = init()
        if self.session in _with_callback:
            raise ConfigError(
                "a job can have one ChaosCallback, of one model and one optimizer; for several (a GAN, for one) use "
                "chaos_mpi.horovod.torch or chaos_mpi.DistributedDataParallel"
            )
        self._runtime = _runtime_of(self.session)
        hvd = self._runtime.hvd
        _refuse_unusable(model, optimizer)
        _refuse_dtypes(model, compression if compression is not None else hvd.Compression.none)
        self._averaged = op is None or op == hvd.Average
        self.optimizer = make_optimizer(
            optimizer,
            self._runtime,
            self._reduce,
            named_parameters=named_parameters if named_parameters is not None else _names(model, optimizer),
            compression=compression if compression is not None else hvd.Compression.none,
            backward_passes_per_step=backward_passes_per_step,
            op=op if op is not None else hvd.Average,
            gradient_predivide_factor=gradient_predivide_factor,
            groups=groups,
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        self._model = model
        self._rounds = Rounds(self.session, trained)
        self._in_backward = self._end_queued = self._begun = False
        everything = [p.detach() for p in model.parameters()] + [b.detach() for b in model.buffers()]
        self.session.share("initial parameters", everything)
        self._synced = StableBuffers(self.session, model if broadcast_buffers else None)
        self.state = TrainingState(
            model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, rng=rng, session=self.session,
            **extras,
        )  # fmt: skip
        for param in trained:
            param.register_hook(self._unless_ghost)  # type: ignore[no-untyped-call]
            param.register_post_accumulate_grad_hook(self._gradient_is_final)  # type: ignore[no-untyped-call]
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)
        _with_callback.add(self.session)

    # -- for training loops ----------------------------------------------------------------------------

    def on_batch_end(self, batch: int | None = None, logs: Any = None) -> None:
        """Between two steps, when optimizer, scheduler and counters are up to date; all members call it, or none."""
        self.session.meet(talk=False)

    #: Under Keras's other name.
    on_train_batch_end = on_batch_end

    def on_batch_begin(self, batch: int | None = None, logs: Any = None) -> None:
        """Nothing; for loops that call all hooks of Keras's kind."""

    on_train_batch_begin = on_batch_begin

    def on_train_begin(self, logs: Any = None) -> None:
        """Nothing; for loops that call all hooks of Keras's kind."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Nothing; for loops that call all hooks of Keras's kind."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Have the samplers go to this epoch, as for a loop that takes callbacks of Keras's kind."""
        if hasattr(self.state, "epoch"):
            self.state.epoch = epoch
        for sampler in self.session.samplers:
            sampler.set_epoch(epoch)

    def on_train_end(self, logs: Any = None) -> None:
        """The same as :meth:`close`."""
        self.close()

    def close(self) -> SessionResult:
        """End in good order, in place of :func:`chaos_mpi.finalize`."""
        return self.session.close()

    # -- for trainers that own the loop ----------------------------------------------------------------

    def before_forward(self) -> None:
        """The place between two steps; when the model is called, it is come to by itself."""
        self._rounds.begin()
        self._begun = True
        self._end_queued = self._in_backward

    def before_backward(self, loss: torch.Tensor) -> None:
        """Backward is about to begin at ``loss``; when the model is called, its outputs tell of it."""
        if loss.requires_grad:
            loss.register_hook(self._output_gradient)  # type: ignore[no-untyped-call]

    def reduce(self) -> None:
        """Have the averages of all members in ``param.grad``, for who then steps with the plain optimizer."""
        self.optimizer.synchronize()
        self.optimizer._synchronized = False

    # -- the step --------------------------------------------------------------------------------------

    def _reduce(self) -> None:
        """What ``optimizer.synchronize()`` does.

        Raises:
            ConfigError: a parameter has a gradient that Horovod does not reduce.
        """
        kept = self.optimizer.kept
        if (left_out := kept.left_out()) is not None:
            name = next((name for name, p in self._model.named_parameters() if p is left_out), "unnamed")
            raise ConfigError(
                f"'{name}' has a gradient, and was not trained when the callback was made, so Horovod does not reduce "
                "it: give the optimizer all parameters at the start, with requires_grad=True; for one that is to learn "
                "later, a parameter group whose learning rate is 0 until then"
            )
        step = HorovodStep(
            kept,
            self._synced.live,
            self._rounds.contributes,
            self.session.wants_to_talk,
            self._runtime.stop,
        )
        self.session.execute(step)
        step.deliver(averaged=self._averaged)
        kept.forget()
        self._synced.keep()
        self.optimizer._handles.clear()
        self.optimizer._synchronized = True

    # -- forward and backward --------------------------------------------------------------------------

    def _before_forward(self, model: torch.nn.Module, _: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self.before_forward()

    def _after_forward(self, model: torch.nn.Module, _: Any, output: Any) -> None:
        if model.training and torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                # A parameter that the model returns has a hook already, and would keep one more of each call.
                if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                    tensor.register_hook(self._output_gradient)  # type: ignore[no-untyped-call]

    def _output_gradient(self, _: torch.Tensor) -> None:
        # Here the outermost backward is running, and not one nested in it (reentrant activation checkpointing).
        self._queue_end()

    def _queue_end(self) -> None:
        if not self._end_queued:
            self._end_queued = True
            Variable._execution_engine.queue_callback(self._backward_ends)

    def _unless_ghost(self, gradient: torch.Tensor) -> torch.Tensor | None:
        # A model that is entered by another way than a call (model.loss(x)) does not tell that a round begins, which
        # would have muted one that only repeats a sample.
        if self._begun or not any(sampler.ghost_round() for sampler in self.session.samplers):
            return None
        return torch.zeros_like(gradient)

    def _gradient_is_final(self, param: torch.nn.Parameter) -> None:
        self._in_backward = True
        self._queue_end()
        if self.optimizer.kept.is_final(param):
            self.optimizer.kept.keep(param)

    def _backward_ends(self) -> None:
        self._end_queued = False
        if not self._in_backward:
            return  # torch.autograd.grad, which reaches no parameter
        self._in_backward = self._begun = False
        self._rounds.note_backward()
        self._rounds.unmute()


def _names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    """Names for all parameters that the optimizer has."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(known.get(id(p), f"unnamed.{i}"), p) for i, p in enumerate(parameters)]


def _refuse_unusable(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if hasattr(optimizer, "skip_synchronize"):
        raise ConfigError(
            "the optimizer is an hvd.DistributedOptimizer already: give ChaosCallback the plain one, and train with "
            "callback.optimizer"
        )
    refuse_unusable_module(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ConfigError(
                f"'{name}' is on {tensor.device}, and ChaosCallback takes models on the CPU only; "
                "chaos_mpi.DistributedDataParallel and chaos_mpi.horovod.torch take models on a GPU"
            )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if left_out := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained]:
        raise ConfigError(
            f"the optimizer leaves out '{left_out[0]}', so Horovod does not reduce its gradient; give the optimizer "
            "all parameters, or set requires_grad=False"
        )
    of_model = {id(p) for p in model.parameters()}
    if any(p.requires_grad and id(p) not in of_model for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "the optimizer has a parameter that is not in the model, so a rank that joins would not get it; if a loss "
            "has parameters of its own, put both into one module (torch.nn.ModuleDict, for one), and give that"
        )


def _refuse_dtypes(model: torch.nn.Module, compression: Any) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype in _REDUCIBLE:
            continue
        sent, _ = compression.compress(torch.zeros(1, dtype=parameter.dtype, device="cpu"))
        if sent.dtype not in _REDUCIBLE:
            remedy = (
                "keep it as a real parameter, and use torch.view_as_complex"
                if parameter.dtype.is_complex
                else "keep the weights in float32 (model.float(), or from_pretrained(..., dtype=torch.float32)), and "
                "compute in bfloat16 by torch.autocast around the forward pass, or Lightning's precision='bf16-mixed'"
            )
            raise ConfigError(f"'{name}' is of {parameter.dtype}, which Horovod cannot reduce: {remedy}")
