"""Batch norm that normalises each branch apart and over all ranks (Ioffe & Szegedy 2015, arXiv 1502.03167).

The networks are called once for each kind of rows (real, reconstructed, generated), so that one call is one branch.
Mean and variance are those of the branch's rows on all ranks, and gradients pass through them to all ranks: any number
of workers computes the same. A micro-batch has its own: gradient accumulation is another batch size to this norm.

For use after training, the layer keeps running averages of the mean and variance of every branch that passed it,
weighted alike: the decoder's are those of reconstructions and generated pictures together. The moving average of the
weights (EMA) is used with the statistics of the weights themselves.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.models.precision import wide
from vaegan_dist.models.stateful import Stateful

MOMENTUM = 0.1  # torch's default, per branch
EPS = 1e-5


class BranchNorm(Stateful):
    """Batch norm over `[B, C, ...]`."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def reset_statistics(self) -> None:
        """As before the first step."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
        values = wide(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        mean = _over_ranks(values.mean(dims))
        centred = values - mean.view(shape)
        # Two rounds of talk instead of E[x^2] - E[x]^2, which loses its digits where the mean is large.
        var = _over_ranks(centred.square().mean(dims))
        if self.weight.requires_grad and torch.is_grad_enabled():  # the network learns in this stage
            self._seen.append((mean.detach(), var.detach()))
        scale = self.weight * (var + EPS).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def advance(self, skip: Tensor) -> None:
        """Take in what the branches of the step have shown."""
        for mean, var in self._seen:
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                running.copy_(torch.where(skip > 0, running, torch.lerp(running, new.to(running.dtype), MOMENTUM)))
        self._seen.clear()


def _over_ranks(mean: Tensor) -> Tensor:
    """Mean over all ranks, each of which has as many rows; differentiable."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    total: Tensor = _SumOverRanks.apply(mean)  # type: ignore[no-untyped-call]
    return total / dist.get_world_size()


class _SumOverRanks(torch.autograd.Function):
    """Every rank's loss depends on every rank's rows, so that gradients are added up over ranks as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total: Tensor = _SumOverRanks.apply(gradient)  # type: ignore[no-untyped-call]
        return total
