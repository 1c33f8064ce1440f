"""Boundaries in the graph: what lets one backward pass give every network the gradient of its own loss.

An objective's scalar contains products <tensor, constant>. Their value means nothing; their gradient in the tensor is
the constant, so that a backward pass starts with gradients that were chosen per image and per player.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NUDGE = 1e-18  # floating point is scale-free: a gradient this small keeps all its digits on the way to the boundary


class Boundary:
    """A place where the gradient is multiplied on its way back; `factor` may be set after the forward pass."""

    def __init__(self, factor: float | Tensor = 1.0) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        """`x` itself, with a gradient that is `factor` times as large (a number, or one per image)."""
        scaled: Tensor = _Scaled.apply(x, self)  # type: ignore[no-untyped-call]
        return scaled


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, boundary: Boundary) -> Tensor:
        ctx.boundary = boundary
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        factor = ctx.boundary.factor
        if isinstance(factor, Tensor):
            factor = factor.view(-1, *[1] * (gradient.dim() - 1))
        return (gradient * factor).to(gradient.dtype), None


def carry(tensor: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient in `tensor` is `gradient`."""
    return (tensor * gradient.detach()).sum()


def shared_seed(discriminator: Tensor, generator: Tensor) -> tuple[Tensor, Tensor]:
    """One seed per logit that serves both players: (seed, factor) with seed = d' and seed * factor = g'.

    Args:
        discriminator, generator: each player's derivative in the logits, `[B]`.

    Where d' vanishes against g' (a confident discriminator), the seed is NUDGE * |g'| instead: too little to change the
    discriminator's gradient in its precision, and enough to bring g' back whole at the boundary.
    """
    least = NUDGE * generator.abs()
    sign = torch.where(discriminator < 0, -1.0, 1.0).to(discriminator.dtype)
    seed = torch.where(discriminator.abs() < least, sign * least, discriminator)
    factor = torch.where(seed == 0, torch.zeros_like(seed), generator / seed)
    return seed, factor
