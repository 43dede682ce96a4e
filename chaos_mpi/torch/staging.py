"""The way of gradients that are not in the memory of the host: to it, where MPI sums them, and back.

Always through the host's memory, also where MPI could take memory of a GPU: its reductions that do not block, which
run beside backward, can not (Open MPI manual, "CUDA": the component ``coll/cuda`` is for those that block).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def host_memory(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in the memory of the host, for what goes to and from ``device``.

    Where that is a CUDA device, the memory is page-locked: only then copies run beside the computation.
    """
    return torch.zeros(numel, dtype=dtype, pin_memory=device.type == "cuda", device="cpu")


def way_to_host(device: torch.device) -> torch.cuda.Stream | None:
    """A CUDA stream for copies to the host, so that backward goes on; None for other devices: copies are waited for."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class Staged:
    """One bucket of gradients on a device. Its memory there serves one step after the other.

    Args:
        dtype: in which they are summed.
        shapes: of the gradients, which follow one another.
        device: where they are computed.
        stream: see :func:`way_to_host`.
    """

    def __init__(
        self, dtype: torch.dtype, shapes: Sequence[torch.Size], device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self._stream = stream
        sizes = [shape.numel() for shape in shapes]
        self._flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        self.views = [part.view(shape) for part, shape in zip(torch.split(self._flat, sizes), shapes, strict=True)]
        self._copied: torch.cuda.Event | None = None
        self._written_on: set[torch.cuda.Stream] = set()

    def reached(self) -> None:
        """Backward has written one of the gradients, on the present stream of the thread that says so."""
        if self._stream is not None:
            self._written_on.add(torch.cuda.current_stream(self._flat.device))

    def take(self, gradients: Sequence[torch.Tensor | None], host: torch.Tensor) -> None:
        """Begin to bring gradients, None for zeros, to the host. They may change as soon as this has returned.

        Args:
            gradients: in the order of the shapes.
            host: where to, as many elements as all of them; to be left alone until :meth:`is_on_host`.
        """
        if self._stream is not None:
            present = torch.cuda.current_stream(self._flat.device)
            for other in self._written_on - {present}:
                present.wait_stream(other)
            self._written_on.clear()
        given = [(view, gradient) for view, gradient in zip(self.views, gradients, strict=True) if gradient is not None]
        if len(given) < len(gradients):
            self._flat.zero_()
        if given:
            torch._foreach_copy_([view for view, _ in given], [gradient for _, gradient in given])
        if self._stream is None:
            host.copy_(self._flat)
            return
        self._stream.wait_stream(present)
        with torch.cuda.device(self._flat.device), torch.cuda.stream(self._stream):
            host.copy_(self._flat, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)

    def is_on_host(self) -> bool:
        """Whether what was taken last has arrived."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Return when it has."""
        if self._copied is not None:
            self._copied.synchronize()

    def bring_back(self, host: torch.Tensor) -> None:
        """Begin to bring what is in ``host`` to :attr:`views`; what is done with these there comes after it."""
        self._flat.copy_(host, non_blocking=self._stream is not None)

    def await_present_stream(self) -> None:
        """Return when all is done that this thread has begun on the device."""
        if self._stream is not None:
            torch.cuda.current_stream(self._flat.device).synchronize()
