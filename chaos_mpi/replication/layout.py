"""The bytes of a training state in one line: which tensor lies where, and how a byte range maps to memory."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import xxhash

#: Address and length in bytes.
Piece = tuple[int, int]
#: First byte and the one after the last.
Range = tuple[int, int]


class DataTransfer(Protocol):
    """Bulk data on its way."""

    def done(self) -> bool:
        """Whether all has been sent or received; PeerFailedError when the other side died."""


class Transport(Protocol):
    """What moving state needs of the network; :class:`chaos_mpi.mpi.channel.Channel` is one."""

    def failed(self) -> list[int]:
        """Ranks that are known here to be dead."""

    def send(self, to: int, message: dict[str, Any]) -> None:
        """Send a JSON message to a rank; does not wait."""

    def poll(self, source: int) -> dict[str, Any] | None:
        """The next message from a rank, if one is here.

        Raises:
            PeerFailedError: it is dead, or another rank has said (``{"dead": [...]}``) that it is gone.
        """

    def send_data(self, to: int, number: int, pieces: Sequence[Piece]) -> DataTransfer:
        """Start sending memory as transfer ``number``."""

    def receive_data(self, source: int, number: int, pieces: Sequence[Piece]) -> DataTransfer:
        """Start receiving transfer ``number`` into memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a state.

    Attributes:
        name: its path in the state.
        dtype: as torch names it, without ``torch.``.
        shape, stride: its geometry; dense, so that it fills ``nbytes`` without a gap.
        offset: its first byte in the line of all tensors.
        nbytes: its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has this dtype and geometry."""
        return (str(tensor.dtype), tuple(tensor.shape), tensor.stride()) == (
            f"torch.{self.dtype}", self.shape, self.stride
        )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """All tensors of a state, by name, one after the other."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The layout of dense tensors; see :func:`dense`."""
        entries, offset = [], 0
        for name in sorted(tensors):
            tensor = tensors[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(Entry(name, dtype, tuple(tensor.shape), tensor.stride(), offset, tensor.nbytes))
            offset += tensor.nbytes
        return cls(tuple(entries))

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return self.entries[-1].offset + self.entries[-1].nbytes if self.entries else 0

    def digest(self) -> str:
        """Digest over names, dtypes and geometry, without values."""
        return xxhash.xxh3_128_hexdigest(repr(self.to_json()).encode())

    def to_json(self) -> list[Any]:
        """As a JSON-able list."""
        return [[e.name, e.dtype, list(e.shape), list(e.stride), e.offset, e.nbytes] for e in self.entries]

    @classmethod
    def from_json(cls, rows: Sequence[Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        return cls(tuple(Entry(n, d, tuple(sh), tuple(st), off, size) for n, d, sh, st, off, size in rows))

    def allocate(self, live: Mapping[str, torch.Tensor], *, with_values: bool = False) -> dict[str, torch.Tensor]:
        """Host memory for every tensor: that of ``live`` where name, dtype and geometry are the same, else new memory.

        Args:
            live: tensors by name.
            with_values: new memory for those of a GPU is to have what they have.
        """
        tensors = {}
        for entry in self.entries:
            tensor = live.get(entry.name)
            is_usable = tensor is not None and entry.fits(tensor) and (with_values or tensor.device.type == "cpu")
            if tensor is None or not is_usable:
                tensor = torch.empty_strided(entry.shape, entry.stride, dtype=getattr(torch, entry.dtype), device="cpu")
            tensors[entry.name] = tensor.to("cpu")
        return tensors

    def pieces(self, tensors: Mapping[str, torch.Tensor], start: int, stop: int) -> list[Piece]:
        """The memory of bytes ``start`` to ``stop``, in order.

        Raises:
            ValueError: the range is not inside the state.
        """
        if not 0 <= start <= stop <= self.total_bytes:
            raise ValueError(f"bytes {start} to {stop} are not in a state of {self.total_bytes} bytes")
        return [
            (tensors[entry.name].data_ptr() + low - entry.offset, high - low)
            for entry, low, high in self._overlapping(start, stop)
        ]

    def ranges(self, wanted: Sequence[bool]) -> list[Range]:
        """The byte ranges of the entries that are wanted, neighbours joined."""
        found: list[Range] = []
        for entry, chosen in zip(self.entries, wanted, strict=True):
            if not chosen or not entry.nbytes:
                continue
            if found and found[-1][1] == entry.offset:
                found[-1] = (found[-1][0], entry.offset + entry.nbytes)
            else:
                found.append((entry.offset, entry.offset + entry.nbytes))
        return found

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[Entry, int, int]]:
        first = bisect.bisect_right(self.entries, start, key=lambda e: e.offset) - 1
        for entry in self.entries[max(first, 0) :]:
            low, high = max(start, entry.offset), min(stop, entry.offset + entry.nbytes)
            if entry.offset >= stop:
                return
            if low < high:
                yield entry, low, high


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it fills its memory without gaps, else a copy that does; detached."""
    tensor = tensor.detach()
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.contiguous()


def checksum(pieces: Sequence[Piece]) -> str:
    """Checksum (XXH3, 128 bit) over pieces of memory, one after the other."""
    state = xxhash.xxh3_128()
    for address, nbytes in pieces:
        state.update(memoryview((ctypes.c_char * nbytes).from_address(address)))
    return state.hexdigest()
