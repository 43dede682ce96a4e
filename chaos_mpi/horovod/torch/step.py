"""The gradients of one optimizer: reduced over all ranks while backward is still running, step by step.

Before any gradient moves, the ranks tell each other what they are about to do, as in every other call; so a rank that
comes with another call, or that has joined, is found out and dealt with, and not taken for a part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch

from chaos_mpi.elastic.comparison import Comparison, refuse_mismatch, refuse_moved
from chaos_mpi.elastic.exchanges import described
from chaos_mpi.errors import EngineError, MismatchError, ViewChangedError
from chaos_mpi.horovod.common.exceptions import HorovodInternalError
from chaos_mpi.horovod.torch.negotiation import Asked
from chaos_mpi.horovod.torch.requests import Group, Request
from chaos_mpi.membership import View
from chaos_mpi.mpi.world import Pending, World
from chaos_mpi.torch.buckets import BufferSet, GradientStep, make_buckets, make_staging

if TYPE_CHECKING:
    from chaos_mpi.horovod.torch.compression import Compressor
    from chaos_mpi.horovod.torch.job import Job

#: Size of a bucket, as torch's own DDP has it.
BUCKET_BYTES = 25 << 20


class AnnouncedStep(GradientStep):
    """A gradient step whose members compare it with what others call, before they start to sum.

    Args:
        call: what is called, the same at every rank.
        steps: whose gradients.
        memory: the transport memory to use.
        zeros: this rank has joined: it takes part with zeros.
    """

    def __init__(self, call: str, steps: Steps, memory: BufferSet, zeros: bool) -> None:
        super().__init__(steps.params, steps.buckets, [], memory, True, steps.proposes, steps.number)
        self.label = "collective call"  # as of all calls that are compared
        self.call = call
        self._steps, self._zeros = steps, zeros
        if zeros:
            self.model = 0  # no step of this rank's optimizer follows
        self._announced: Pending | None = None
        self._comparison = Comparison(call)
        self._differs = self._complete = False

    @property
    def phase(self) -> str:
        return self.call

    @property
    def launched(self) -> bool:
        return self._announced is not None

    def begin(self, world: World) -> None:
        """Tell the others in the middle of backward; the buckets follow as they fill."""
        with self._failure_kept():
            self._announce(world)

    def launch(self, world: World, view: View) -> None:
        """Start on this communicator, with all gradients there."""
        self.failure = None
        self._announce(world)

    def ready(self, bucket: int) -> None:
        """One more gradient of this bucket is final; start every bucket whose turn has come."""
        self._count(bucket)
        if self.failure is not None or self._announced is None:
            return
        with self._failure_kept():
            if self._pending is None and not self._agreed():
                return
            assert self._pending is not None
            self._start_ready(self._pending)

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        """Wait until the sums are there.

        Raises:
            MismatchError: other ranks come with other calls; the same at every rank.
            ViewChangedError: others come with calls that were made for other ranks; the same at every rank.
            PeerFailedError, WaitTimeoutError: as :meth:`chaos_mpi.mpi.world.Pending.wait`.
        """
        if self.failure is not None:
            raise self.failure
        if self._announced is None or self._world is None:
            raise EngineError(f"'{self.call}' was awaited before it was launched")
        self._announced.wait(what, limit_s)
        if self._pending is None and not self._agreed():
            if self._comparison.anyone_moved:
                self._differs, self._announced = True, None
                message = f"a call that others make, and not '{self.call}', is for other ranks than there are"
                refuse_moved(self._world, message, what, limit_s)
            self._refuse_mismatch(what, limit_s)
        assert self._pending is not None
        self._start_all(self._pending)
        self._pending.wait(what, limit_s)
        self._pending = self._announced = None
        self._complete = True

    def withdraw(self) -> None:
        """Leave a revoked communicator; the gradients are kept."""
        for pending in (self._announced, self._pending):
            if pending is not None:
                pending.drain()
        if self._pending is not None:
            self.renew_buffers()
        self._announced = self._pending = self.failure = None
        self._staged = self._next = 0

    def renew_buffers(self) -> None:
        """Replace the transport buffers, for all steps to come as well."""
        old = self.memory
        super().renew_buffers()
        self._steps.replace(old, self.memory)

    def results(self) -> list[torch.Tensor]:
        """The sums; nothing that others could take for them when the calls differ."""
        return [] if self._differs else super().results()

    def finish(self) -> None:
        """To be called when the step is finished, before its result is used.

        Raises:
            MismatchError: a member has found that the calls differ, and then another one died.
        """
        if self._differs:
            raise MismatchError(f"ranks make different collective calls; this rank: {self.call}")

    def _announce(self, world: World) -> None:
        self._world, self._pending = world, None
        self._staged = self._next = 0
        self._differs = False  # who called something else may have died
        self._announced = world.pending()
        self._comparison.start(self._announced)

    def _agreed(self) -> bool:
        """Whether all are known to do the same; then the sums can begin."""
        assert self._announced is not None
        assert self._world is not None
        if not self._announced.test():
            return False
        if self._comparison.anyone_moved or self._comparison.differs:
            return False
        self._pending = self._world.pending()
        return True

    def _refuse_mismatch(self, what: Callable[[], str], limit_s: float) -> NoReturn:
        assert self._world is not None
        self._differs = True
        self._announced = None
        refuse_mismatch(self._world, self.call, what, limit_s)

    def _given(self, param: torch.nn.Parameter) -> torch.Tensor | None:
        return None if self._zeros else self._steps.given(param)


class Steps:
    """The steps of one optimizer.

    Args:
        job: the open job.
        optimizer: whose gradients.
        params: those that are trained.
        averages: whether gradients are averaged, or only summed.
        predivide: what they are divided by before they are summed, and multiplied by afterwards.
        compression: what rounds them.

    Attributes:
        number: of the optimizer, the same at every rank.
    """

    def __init__(
        self,
        job: Job,
        optimizer: torch.optim.Optimizer,
        params: Sequence[torch.nn.Parameter],
        averages: bool,
        predivide: float,
        compression: type[Compressor],
    ) -> None:
        self.params = list(params)
        self.buckets = make_buckets(self.params, BUCKET_BYTES)
        self.number = job.number_optimizer()
        self._job, self._optimizer = job, optimizer
        self._averages, self._predivide, self._compression = averages, predivide, compression
        self._bucket_of = {id(self.params[i]): b for b, bucket in enumerate(self.buckets) for i in bucket.params}
        self._staged = make_staging(self.buckets, self.params)
        self._memory = [BufferSet(self.buckets, self.params, 0, self._staged) for _ in range(2)]
        op = "average" if averages else "sum"
        self._call = f"gradient step of optimizer {self.number}[{op}, {described(self.params)}]"
        self._request: Request | None = None
        self._begun: AnnouncedStep | None = None
        self._is_past_boundary = self._is_open = self._is_discarded = False
        job.steps[self.number] = self

    def make(self, *, zeros: bool = False) -> AnnouncedStep:
        """One more step."""
        # The other set holds the sums of the last finished step, which a survivor may still have to be given.
        self._memory.reverse()
        return AnnouncedStep(self._call, self, self._memory[0], zeros)

    def replace(self, old: BufferSet, new: BufferSet) -> None:
        """The old memory may still be written to."""
        self._memory = [new if memory is old else memory for memory in self._memory]

    @property
    def proposes(self) -> Callable[[], bool]:
        """Whether this rank has something to propose to the others."""
        return self._job.session.wants_to_talk

    @property
    def under_way(self) -> bool:
        """Whether a step has begun and is not delivered."""
        return self._request is not None

    def begin(self) -> None:
        """The first gradient of a step is final: begin, unless other calls come first."""
        self._job.boundary()
        self._is_past_boundary = True
        if self._job.in_graph:
            return  # this backward makes calls of its own
        self._is_open = True
        request = self._new_request()
        begun = self._job.queue.begin(request, self._job.session)
        if begun is not None:
            assert isinstance(begun, AnnouncedStep)
            self._request, self._begun = request, begun

    def ready(self, param: torch.nn.Parameter) -> None:
        """One more gradient is final."""
        if self._request is not None and self._request.done:
            raise RuntimeError(
                "a gradient was computed after a collective call had ended the step that it belongs to. Make the call "
                "after optimizer.step(), or before the first backward of the step; in the backward of an autograd "
                "function of your own, use the gradient that hvd.allgather and the like have themselves; with "
                "hvd.SyncBatchNorm and torch.utils.checkpoint, use_reentrant=False"
            )
        if self._begun is not None:
            self._begun.ready(self._bucket_of[id(param)])

    def settle(self) -> None:
        """All gradients are there: put what they make together into ``param.grad``.

        Raises:
            HorovodInternalError: the ranks make different calls.
        """
        if not self._is_past_boundary:
            self._job.boundary()
        self._is_past_boundary = self._is_open = False
        if self._request is None:
            self._await_device()  # it may be made in another thread, which has another stream
            self._request = self._job.queue.put(self._new_request())
        else:
            self._job.queue.settle()
        request, self._request, self._begun = self._request, None, None
        self._job.forget_graphs()
        self._job.waiting.wait(request)

    def discard(self) -> None:
        """Finish the step that has begun, if one has, and leave the gradients as they are; by all ranks.

        Some of its gradients are with the others already, or theirs with this rank, if it has pending calls and they
        have not: those of the next step must not be added to them.

        Raises:
            HorovodInternalError: the ranks make different calls.
        """
        if not self._is_open:
            self._is_past_boundary = False
            return
        self._is_discarded = True
        try:
            self.settle()
        finally:
            self._is_discarded = False

    def forget(self) -> None:
        """All ranks begin anew, and no call is pending: what has begun has come to its end, or to nothing."""
        self._request = self._begun = None
        self._is_past_boundary = self._is_open = False

    def given(self, param: torch.nn.Parameter) -> torch.Tensor | None:
        """What this rank adds to the sum."""
        if param.grad is None:
            return None
        gradient = param.grad.detach()  # it has a graph after backward(create_graph=True)
        gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
        smaller, context = self._compression.compress(gradient)
        gradient = self._compression.decompress(smaller, context)
        return gradient / self._predivide if self._predivide != 1.0 else gradient

    def share_from(self, members: Sequence[str]) -> None:
        """Take the parameters and the optimizer's state from the first of these, or the next if it dies; by all.

        Raises:
            HorovodInternalError: the ranks make different calls.
        """
        from chaos_mpi.horovod.torch.functions import give_optimizer_state, give_tensors

        for member in members:
            try:
                give_tensors([(f"joined.{i}", p) for i, p in enumerate(self.params)], member)
                give_optimizer_state(self._optimizer, member)
            except HorovodInternalError as error:
                if not isinstance(error.__cause__, ViewChangedError):
                    raise
            else:
                return

    def _new_request(self) -> Request:
        asked = Asked(self._call, self._call, {"step": self.number})
        return Request(asked, lambda _: self.make(), self._deliver)

    def _deliver(self, step: AnnouncedStep, _: Group) -> None:
        if self._is_discarded:
            return
        count = len(step.contributors) if self._averages else 1
        for bucket, views in zip(self.buckets, step.memory.sums(), strict=True):
            for index, view in zip(bucket.params, views, strict=True):
                self._put(self.params[index], view, count)
        self._await_device()

    def _await_device(self) -> None:
        for staged in self._staged[:1]:
            staged.await_present_stream()

    def _put(self, param: torch.nn.Parameter, total: torch.Tensor, count: int) -> None:
        if param.grad is None:
            param.grad = torch.empty_like(param)
        if param.grad.layout == torch.strided and self._predivide == 1.0:
            torch.div(total, count, out=param.grad)
            return
        value = total / count * self._predivide
        if param.grad.layout == torch.strided:
            param.grad.copy_(value)
        else:
            param.grad = value.to(param.dtype).to_sparse(param.grad.sparse_dim())
