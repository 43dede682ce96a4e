"""The process groups of the ``chaos`` backend: ``torch.distributed``'s calls, carried out by the session.

torch calls the methods here under its own names and with its own option objects. The default group is the session: its
calls survive the death of a member, with the result of those that are left. Groups of some ranks end with any of them.
"""

# mypy: disable-error-code="override,assignment"
# (torch declares its methods as overloads; what it calls are these.)
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work

from chaos_mpi.elastic.exchanges import AllGather, AllReduce, Barrier, Exchange
from chaos_mpi.elastic.ranked import AllToAllParts, BroadcastFrom, GatherTo, ReduceScatterParts, ReduceTo, ScatterFrom
from chaos_mpi.errors import ConfigError
from chaos_mpi.membership import View
from chaos_mpi.torch.arguments import averaged, checked_tag, fill, reduction, usable
from chaos_mpi.torch.callers import carries_objects
from chaos_mpi.torch.carriers import Carrier
from chaos_mpi.torch.monitoring import monitored_barrier
from chaos_mpi.torch.registered import RegisteredGroup
from chaos_mpi.torch.work import CollectiveWork, MessageWork, finished

log = logging.getLogger("chaos_mpi.torch")

Tensors = list[torch.Tensor]


class ChaosProcessGroup(RegisteredGroup):
    """A group of ranks. Made by ``init_process_group("chaos")`` and ``new_group``.

    Where a member of the default group dies during a call, the result is that of those that are left: sums leave it
    out, averages are over those that contributed, and its entries in gathered lists repeat another one.

    Args:
        carrier: carries the calls out.
        timeout: longest wait for the other side of a message, and for a monitored barrier.
    """

    def __init__(self, carrier: Carrier, timeout: timedelta) -> None:
        super().__init__(carrier.rank, carrier.view.size)
        self.carrier = carrier
        self._timeout = timeout
        self._alone = False
        self._warned = False
        self._views = [carrier.view]

    # -- who takes part ------------------------------------------------------------------------------

    def rank(self) -> int:
        """This process's rank; in the default group it changes when members come and go."""
        self.note_ranks()
        return self.carrier.rank

    def size(self) -> int:
        """Number of ranks; in the default group it changes when members come and go."""
        self.note_ranks()
        return self.carrier.view.size

    def getRank(self) -> int:  # noqa: N802
        """For callers in C++."""
        return self.rank()

    def getSize(self) -> int:  # noqa: N802
        """For callers in C++."""
        return self.size()

    @property
    def members(self) -> tuple[str, ...]:
        """The members' ids, in rank order."""
        return self.carrier.view.members

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it, broadcasts leave every rank with its own tensors."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def set_timeout(self, timeout: timedelta) -> None:
        """Longest wait for the other side of a message, and for a monitored barrier."""
        self._timeout = timeout

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """End the group; called by ``destroy_process_group``."""
        self.carrier.close()

    def abort(self) -> None:
        """End the group without the others."""

    # -- reductions ----------------------------------------------------------------------------------

    def allreduce(self, tensors: Tensors | torch.Tensor, opts: Any = None, *_: Any, **more: Any) -> Work:
        """Every rank gets the reduction of all ranks' tensors, in place."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        return self._reduce_everywhere("all_reduce", tensors, opts, **more)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Work:
        """The same for several tensors."""
        return self._reduce_everywhere("all_reduce_coalesced", list(tensors), opts)

    def _reduce_everywhere(self, call: str, tensors: Tensors, opts: Any, op: Any = None) -> Work:
        chosen, average = reduction(call, opts if op is None else op)
        operation = AllReduce(call, usable(call, tensors), chosen)

        def deliver() -> None:
            for tensor, result in zip(tensors, operation.results(), strict=True):
                tensor.copy_(averaged(result, operation, average))

        return self._carry_out(call, operation, deliver, tensors, opts)

    def reduce(self, tensors: Tensors, opts: Any = None) -> Work:
        """One rank gets the reduction of all ranks' tensors, in place."""
        op, average = reduction("reduce", opts)
        operation = ReduceTo("reduce", self._view, usable("reduce", tensors), op, opts.rootRank)

        def deliver() -> None:
            for tensor, result in zip(tensors, operation.reduced, strict=False):
                tensor.copy_(averaged(result, operation, average))

        return self._carry_out("reduce", operation, deliver, tensors, opts)

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> Work:
        """Each rank gets its own of the reductions of all ranks' lists of tensors."""
        return self._reduce_scatter("reduce_scatter", outputs, inputs, opts)

    def _reduce_scatter_base(self, output: torch.Tensor, whole: torch.Tensor, opts: Any = None) -> Work:
        """Each rank gets its own part of the reduction of all ranks' tensors."""
        return self._reduce_scatter("reduce_scatter_tensor", [output], [self._parts(whole)], opts)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """The same for several tensors."""
        parts = [self._parts(whole) for whole in inputs]
        return self._reduce_scatter("reduce_scatter_tensor_coalesced", outputs, parts, opts)

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def _reduce_scatter(self, call: str, outputs: Tensors, inputs: Sequence[Tensors], opts: Any) -> Work:
        op, average = reduction(call, opts)
        operations = [ReduceScatterParts(call, self._view_of(len(p)), usable(call, p), op) for p in inputs]

        def deliver() -> None:
            for output, operation in zip(outputs, operations, strict=True):
                fill(call, output, averaged(operation.result, operation, average))

        return self._carry_out(call, operations, deliver, outputs, opts)

    # -- the same tensors everywhere -----------------------------------------------------------------

    def broadcast(self, tensors: Tensors | torch.Tensor, opts: Any = None, *_: Any, root: int | None = None) -> Work:
        """Every rank gets one rank's tensors."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if self._alone:
            return CollectiveWork("broadcast", finished(), tensors)
        source = root if root is not None else opts if isinstance(opts, int) else opts.rootRank if opts else 0
        operation = BroadcastFrom("broadcast", self._view, usable("broadcast", tensors), source)
        operation.has_successor = not carries_objects()
        return self._carry_out("broadcast", operation, operation.deliver, tensors, opts)

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        """Every rank gets all ranks' tensors, which may differ in size."""
        return self._gather_everywhere("all_gather", outputs, inputs, opts)

    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        """The same for several tensors: ``outputs`` has a list of them for each rank."""
        by_input = [[each[i] for each in outputs] for i in range(len(inputs))]
        return self._gather_everywhere("all_gather_coalesced", by_input, inputs, opts)

    def _allgather_base(self, output: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> Work:
        """Every rank gets all ranks' tensors in one."""
        return self._gather_everywhere("all_gather_into_tensor", [self._parts(output)], [mine], opts, [output])

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """The same for several tensors."""
        parts = [self._parts(output) for output in outputs]
        return self._gather_everywhere("all_gather_into_tensor_coalesced", parts, inputs, opts, outputs)

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def _gather_everywhere(
        self, call: str, outputs: list[Tensors], inputs: Tensors, opts: Any, value: list[Any] | None = None
    ) -> Work:
        called = self._view_of(len(outputs[0]) if outputs else self.size())
        flat = [t.detach().reshape(-1) for t in usable(call, inputs)]
        operations = [AllGather(call, t) for t in flat]

        def deliver() -> None:
            for each, operation in zip(outputs, operations, strict=True):
                parts = torch.split(operation.result, operation.lengths)
                ranks = [called.members.index(member) for member in operation.contributors]
                self._fill_all(call, each, dict(zip(ranks, parts, strict=True)))

        return self._carry_out(call, operations, deliver, outputs if value is None else value, opts)

    # -- different tensors ---------------------------------------------------------------------------

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        """One rank gets all ranks' tensors."""
        called = self._view
        listed = self._view_of(len(outputs[0])) if outputs else called
        operation = GatherTo("gather", called, usable("gather", inputs)[0], opts.rootRank)

        def deliver() -> None:
            if outputs and operation.parts:
                ranks = {rank: listed.members.index(called.members[rank]) for rank in operation.parts}
                self._fill_all("gather", outputs[0], {ranks[rank]: part for rank, part in operation.parts.items()})

        return self._carry_out("gather", operation, deliver, outputs, opts)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> Work:
        """Each rank gets its own of one rank's tensors."""
        called, parts = self._view, usable("scatter", inputs[0]) if inputs else []
        if parts:
            listed = self._view_of(len(parts))
            if len(parts) != listed.size:
                raise ConfigError(f"scatter takes a tensor for each of the {called.size} ranks, not {len(parts)}")
            parts = [parts[listed.members.index(member)] for member in called.members]
        operation = ScatterFrom("scatter", called, usable("scatter", outputs)[0], parts, opts.rootRank)
        return self._carry_out("scatter", operation, lambda: outputs[0].copy_(operation.result), outputs, opts)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """Each rank sends a tensor to every rank, and gets one of each."""
        return self._exchange("all_to_all", list(outputs), list(inputs), opts, list(outputs))

    def alltoall_base(
        self, output: torch.Tensor, whole: torch.Tensor, received: list[int], sent: list[int], opts: Any = None
    ) -> Work:
        """The same with parts of one tensor, along the first dimension; equal ones if no sizes are given."""
        outputs = list(torch.split(output, received)) if received else self._parts(output)
        inputs = list(torch.split(whole, sent)) if sent else self._parts(whole)
        return self._exchange("all_to_all_single", outputs, inputs, opts, [output])

    all_to_all_single = alltoall_base

    def _exchange(self, call: str, outputs: Tensors, inputs: Tensors, opts: Any, value: list[Any]) -> Work:
        operation = AllToAllParts(call, self._view_of(len(inputs)), usable(call, inputs))
        return self._carry_out(
            call, operation, lambda: self._fill_all(call, outputs, operation.parts, repeat=False), value, opts
        )

    # -- waiting for each other ----------------------------------------------------------------------

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Work:
        """Ends when all ranks have called it. With a timeout, it is a monitored barrier."""
        limit = timeout if timeout is not None else getattr(opts, "timeout", None)
        if limit is not None and limit.total_seconds() > 0:
            self.monitored_barrier(limit)
            return CollectiveWork("barrier", finished(), [])
        return self._carry_out("barrier", Barrier(), lambda: None, [], opts)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that says who did not come. See :func:`chaos_mpi.torch.monitored_barrier`."""
        limit = timeout if timeout is not None else self._timeout
        monitored_barrier(self.carrier, limit.total_seconds(), wait_all_ranks)

    # -- messages ------------------------------------------------------------------------------------

    def send(self, tensors: Tensors, to: int, tag: int) -> Work:
        """Send a tensor to a rank."""
        (tensor,) = usable("send", tensors)
        sent = tensor.detach().contiguous()
        message = self.carrier.messages().send(sent, self.carrier.line(to), checked_tag(tag))
        return MessageWork(message, self._timeout.total_seconds(), tensors, lambda: None)

    def recv(self, tensors: Tensors, source: int, tag: int) -> Work:
        """Receive a tensor from a rank."""
        return self._receive(tensors, self.carrier.line(source), tag)

    def recv_anysource(self, tensors: Tensors, tag: int) -> Work:
        """Receive a tensor from whichever rank sends one first."""
        return self._receive(tensors, None, tag)

    def _receive(self, tensors: Tensors, source: int | None, tag: int) -> Work:
        (tensor,) = usable("recv", tensors)
        target = (
            tensor.detach() if tensor.is_contiguous() else torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        )
        message = self.carrier.messages().receive(target, source, checked_tag(tag))

        def finish() -> None:
            message.source = self.carrier.rank_of_line(message.source)
            if not tensor.is_contiguous():
                tensor.detach().copy_(target)

        return MessageWork(message, self._timeout.total_seconds(), tensors, finish)

    # -- parts of all calls --------------------------------------------------------------------------

    @property
    def _view(self) -> View:
        view = self.carrier.view
        if view != self._views[-1]:
            self._views.append(view)
        return view

    def _view_of(self, size: int) -> View:
        """The view that a list of this length was made for: the present one, or an earlier one if ranks died since."""
        view = self._view
        here = set(view.members)
        fitting = [known for known in self._views if known.size == size and here <= set(known.members)]
        return fitting[-1] if fitting else view

    def _carry_out(
        self,
        call: str,
        operation: Exchange | Sequence[Exchange],
        deliver: Callable[[], object],
        outputs: list[Any],
        opts: Any,
    ) -> Work:
        operations = [operation] if isinstance(operation, Exchange) else operation

        inference = torch.is_inference_mode_enabled()

        def run() -> None:
            with torch.inference_mode(inference):  # in the background, too: no other code may write to its tensors
                for each in operations:
                    self.carrier.execute(each)
                    each.finish()
                with torch.no_grad():
                    deliver()

        # In torch's own calls from C++, and in versions that do not tell, it may be awaited later.
        if getattr(opts, "asyncOp", True):
            return CollectiveWork(call, self.carrier.submit(run), outputs)
        run()
        return CollectiveWork(call, finished(), outputs)

    def _parts(self, whole: torch.Tensor) -> Tensors:
        size = self.size()
        flat = whole.detach()
        if not flat.is_contiguous() or flat.numel() % size:
            raise ConfigError(
                f"a tensor of shape {tuple(whole.shape)} cannot be shared out to {size} ranks: it must be contiguous, "
                "and its number of elements a multiple of theirs"
            )
        return list(torch.split(flat.view(-1), flat.numel() // size)) if flat.numel() else [flat.view(-1)] * size

    def _fill_all(self, call: str, outputs: Tensors, parts: Mapping[int, torch.Tensor], repeat: bool = True) -> None:
        """Write each rank's part into its output.

        What is of nobody repeats the part of the lowest rank there is, if it fits, and is zero otherwise: whoever reads
        sizes, objects or shapes from it finds what it can work with.
        """
        if parts and max(parts) >= len(outputs):
            raise ConfigError(f"{call} got tensors of ranks up to {max(parts)}, and has room for {len(outputs)}")
        stand_in = parts[min(parts)] if parts and repeat else torch.empty(0, device="cpu")
        for rank, output in enumerate(outputs):
            if rank in parts:
                fill(call, output, parts[rank])
            elif stand_in.numel() == output.numel():
                fill(call, output, stand_in)
            else:
                output.zero_()
        if len(parts) < len(outputs) and not self._warned:
            self._warned = True
            log.warning(
                "%s: %d ranks are left; %d entries of the output %s", call, len(parts), len(outputs) - len(parts),
                "repeat another one" if repeat else "are zero",
            )  # fmt: skip
