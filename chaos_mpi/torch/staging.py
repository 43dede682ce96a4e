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
    return torch.zeros(numel, dtype=dtype, pin_memory=device.type == "cuda")


class Staged:
    """One bucket of gradients on a device, beside its memory on the host.

    Args:
        host: the memory there, in which it is summed.
        shapes: of the gradients, which follow one another.
        device: where they are computed.
        stream: CUDA stream for the way to the host, so that backward goes on; None, for other devices: copies are
            waited for.
    """

    def __init__(
        self,
        host: torch.Tensor,
        shapes: Sequence[torch.Size],
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._host, self._stream = host, stream
        self._flat = torch.empty(host.numel(), dtype=host.dtype, device=device)
        sizes = [shape.numel() for shape in shapes]
        self.views = [part.view(shape) for part, shape in zip(torch.split(self._flat, sizes), shapes, strict=True)]
        self._copied: torch.cuda.Event | None = None

    def take(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Begin to bring gradients, None for zeros, to the host. They may change as soon as this has returned."""
        given = [(view, gradient) for view, gradient in zip(self.views, gradients, strict=True) if gradient is not None]
        for view, gradient in zip(self.views, gradients, strict=True):
            if gradient is None:
                view.zero_()
        if given:
            torch._foreach_copy_([view for view, _ in given], [gradient for _, gradient in given])
        if self._stream is None:
            self._host.copy_(self._flat)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._flat.device))
        with torch.cuda.stream(self._stream):
            self._host.copy_(self._flat, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)

    def is_on_host(self) -> bool:
        """Whether they have arrived."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Return when they have."""
        if self._copied is not None:
            self._copied.synchronize()

    def bring_back(self) -> None:
        """Begin to bring what is on the host now to :attr:`views`; what is done with these there comes after it."""
        self._flat.copy_(self._host, non_blocking=self._stream is not None)
