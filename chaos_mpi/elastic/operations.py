"""Collective operations that survive the death of a member while they are under way.

An operation keeps its local input untouched until it is finished, reduces in a buffer of its own, and keeps
the result until the next operation is finished. So it can be done again among the survivors, and a survivor
that has the result can hand it to one that has not.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch

from chaos_mpi.elastic.comparison import refuse_mismatch
from chaos_mpi.elastic.digest import byte_view
from chaos_mpi.errors import EngineError, PeerFailedError, RecoveryError
from chaos_mpi.membership import View
from chaos_mpi.mpi.memory import transportable
from chaos_mpi.mpi.world import Pending, World

_LENGTH_BYTES = 8
#: Dtypes that are reduced in another one, which holds all of their values.
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.bool: torch.int64,
    torch.int8: torch.int64,
    torch.int16: torch.int64,
}


class Operation(ABC):
    """One place in the sequence of collective operations that all members execute.

    Attributes:
        label: what it is, the same at every member.
        contributors: members whose input is in the result; empty until the operation is finished.
    """

    #: Whether this member's input counts for something.
    contributes = True
    #: Whether it ends a training step.
    is_gradient_step = False
    #: The number, from 1, of the model whose gradients it reduces, if they are to be applied after it; else 0.
    model = 1
    #: Whether to find out that members are in different calls which MPI cannot tell apart, because they have one size.
    checks_label = True

    def __init__(self, label: str) -> None:
        self.label = label
        self.contributors: tuple[str, ...] = ()
        self.failure: PeerFailedError | None = None
        self._pending: Pending | None = None
        self._world: World | None = None
        self._label_bounds = torch.empty(0, dtype=torch.int64, device="cpu")

    @property
    def phase(self) -> str:
        """What is told of it to people."""
        return self.label

    @abstractmethod
    def start(self, pending: Pending, view: View, rank: int) -> None:
        """Fill the transport buffers from the kept input and start reducing all of them."""

    @abstractmethod
    def results(self) -> list[torch.Tensor]:
        """The transport buffers, in the same order and shapes at every member that started on the same view."""

    @abstractmethod
    def renew_buffers(self) -> None:
        """Replace the transport buffers: a broken collective may still write into the old ones."""

    def anyone_proposes(self) -> bool:
        """Whether some member said along with its input that it has something to propose."""
        return False

    @property
    def launched(self) -> bool:
        """Whether the operation is under way on the present communicator."""
        return self._pending is not None

    def launch(self, world: World, view: View) -> None:
        """Start on this communicator, from the kept input.

        Raises:
            PeerFailedError: the communicator is broken.
        """
        self.failure = None
        self._pending, self._world = world.pending(), world
        self.start(self._pending, view, world.rank)
        if self.checks_label:
            # After it, because calls of different sizes fail by themselves, and then the recovery names them.
            number = int.from_bytes(hashlib.blake2b(self.label.encode(), digest_size=7).digest())
            self._label_bounds = torch.tensor([number, -number], device="cpu")
            self._pending.reduce(self._label_bounds, "max")

    def wait(self, what: Callable[[], str], limit_s: float) -> None:
        """Wait until the result is there.

        Raises:
            MismatchError: other members are in another call.
            PeerFailedError, WaitTimeoutError: as :meth:`chaos_mpi.mpi.world.Pending.wait`.
        """
        if self.failure is not None:
            raise self.failure
        if self._pending is None:
            raise EngineError(f"'{self.label}' was awaited before it was launched")
        self._pending.wait(what, limit_s)
        self._pending = None
        if self.checks_label and int(self._label_bounds[0]) != -int(self._label_bounds[1]):
            self._refuse_mismatch(what, limit_s)

    def _refuse_mismatch(self, what: Callable[[], str], limit_s: float) -> NoReturn:
        assert self._world is not None
        refuse_mismatch(self._world, self.label, what, limit_s)

    def withdraw(self) -> None:
        """Leave a revoked communicator, keeping the input; :meth:`launch` starts again on another one."""
        if self._pending is not None:
            self._pending.drain()
            self._pending = None
            self.renew_buffers()
        self.failure = None


class Reduce(Operation):
    """Sum (or maximum, minimum) of one tensor over the members."""

    def __init__(self, label: str, tensor: torch.Tensor, op: str) -> None:
        super().__init__(f"{label}[{op}, {str(tensor.dtype).removeprefix('torch.')}, {tuple(tensor.shape)}]")
        self._input = tensor.detach().to("cpu", transport_dtype(tensor.dtype)).contiguous()
        self._op = op
        self._buffer = torch.empty_like(self._input)

    def start(self, pending: Pending, view: View, rank: int) -> None:
        self._buffer.copy_(self._input)
        pending.reduce(self._buffer, self._op)

    def results(self) -> list[torch.Tensor]:
        return [self._buffer]

    def renew_buffers(self) -> None:
        self._buffer = torch.empty_like(self._input)


class GatherRows(Operation):
    """The first ``width`` of every member's bytes, side by side: one row for each rank."""

    def __init__(self, label: str, payload: bytes, width: int) -> None:
        super().__init__(label)
        self._width = width
        row = len(payload).to_bytes(_LENGTH_BYTES, "little") + payload[:width]
        self._row = np.frombuffer(row.ljust(_LENGTH_BYTES + width, b"\0"), dtype=np.uint8)
        self._rows = torch.empty((0, len(self._row)), dtype=torch.uint8, device="cpu")

    def start(self, pending: Pending, view: View, rank: int) -> None:
        self._rows = torch.empty((view.size, len(self._row)), dtype=torch.uint8, device="cpu")
        pending.gather(self._row, self._rows.numpy())

    def results(self) -> list[torch.Tensor]:
        return [self._rows]

    def renew_buffers(self) -> None:
        self._rows = torch.empty_like(self._rows)

    @property
    def longest(self) -> int:
        """How many bytes the longest of all has; more than fit into a row, perhaps."""
        return max(length for length, _ in self._split())

    def decoded(self) -> list[Any]:
        """The JSON value of each row; all must have fitted."""
        return [json.loads(payload) for _, payload in self._split()]

    def _split(self) -> Iterator[tuple[int, bytes]]:
        for row in self._rows.numpy():
            data = row.tobytes()
            length = int.from_bytes(data[:_LENGTH_BYTES], "little")
            yield length, data[_LENGTH_BYTES : _LENGTH_BYTES + length]


class Share(Operation):
    """The bits of tensors as one member (``root``, else rank 0) has them, given to every member.

    A broadcast could finish at the root before anyone else entered it, which would break the rule that survivors
    differ by at most one operation; so all others contribute zero bits to a bitwise OR.
    """

    def __init__(self, label: str, tensors: list[torch.Tensor], root: str | None) -> None:
        super().__init__(label)
        self._root = root
        self._tensors = [t.detach() for t in tensors]
        self._flat = torch.empty(sum(t.nbytes for t in self._tensors), dtype=torch.uint8, device="cpu")

    def start(self, pending: Pending, view: View, rank: int) -> None:
        root = self._root if self._root is not None else view.members[0]
        if root not in view.members:
            raise RecoveryError(f"{root} died while it handed out '{self.label}'; start the job again")
        if view.members[rank] == root:
            pack_bytes(self._tensors, self._flat)
        else:
            self._flat.zero_()
        pending.reduce(self._flat, "bor")

    def results(self) -> list[torch.Tensor]:
        return [self._flat]

    def renew_buffers(self) -> None:
        self._flat = torch.empty_like(self._flat)

    def deliver(self) -> None:
        """Write the shared bits into the tensors."""
        unpack_bytes(self._flat, self._tensors)


def pack_bytes(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    """Copy the bytes of ``tensors`` one after the other into ``flat`` (uint8, of their total size)."""
    if len({tensor.device for tensor in tensors}) == 1 and tensors[0].device != flat.device:  # one copy, not many
        flat.copy_(torch.cat([byte_view(tensor) for tensor in tensors]))
        return
    offset = 0
    for tensor in tensors:
        flat[offset : offset + tensor.nbytes] = byte_view(tensor)
        offset += tensor.nbytes


def unpack_bytes(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """The reverse of :func:`pack_bytes`, in place."""
    if len(devices := {tensor.device for tensor in tensors}) == 1:
        flat = flat.to(devices.pop())
    offset = 0
    for tensor in tensors:
        # A copy of the slice, because a view as a wider type needs an aligned start.
        part = flat[offset : offset + tensor.nbytes].clone()
        tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
        offset += tensor.nbytes


def reducible(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can be reduced without a loss."""
    return dtype in _WIDER or transportable(dtype)


def transport_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of this one are reduced; it must be :func:`reducible`."""
    return dtype if transportable(dtype) else _WIDER[dtype]
