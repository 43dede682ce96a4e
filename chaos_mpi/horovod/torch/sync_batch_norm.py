"""BatchNorm over the batches of all ranks together."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from chaos_mpi.horovod.torch.basics import size
from chaos_mpi.horovod.torch.reduce_ops import Sum
from chaos_mpi.horovod.torch.reducing import allreduce


class SyncBatchNorm(_BatchNorm):
    """As torch's BatchNorm of any number of dimensions, with mean and variance over the batches of all ranks.

    Takes the arguments of :class:`torch.nn.BatchNorm1d`. Every forward and every backward in training makes two
    reductions, so the gradients of such a model are reduced after backward and not during it.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Normalize; in training, note mean and variance."""
        self._check_input_dim(input)
        of_batch = self.training or not self.track_running_stats
        if not of_batch or size() == 1:
            return super().forward(input)
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        # Half precision has not got the range for sums over a batch.
        wide = input if input.dtype == torch.float64 else input.float()
        local = torch.cat([wide.sum(dims), wide.new_tensor([input.numel() / input.shape[1]])])
        total = allreduce(local, op=Sum)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean.view(shape)
        # With the number once more, because a rank whose batch is in the mean may have died.
        squares = allreduce(torch.cat([(centred * centred).sum(dims), local[-1:]]), op=Sum)
        variance = squares[:-1] / squares[-1].detach()
        if self.training and self.track_running_stats:
            self._note(mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)))
        normal = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _note(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)
