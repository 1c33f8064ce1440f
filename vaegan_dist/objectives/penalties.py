"""Penalties on the discriminator's gradient in its input."""

import torch
from torch import Tensor


def input_gradient(logits: Tensor, x: Tensor) -> Tensor:
    """Gradient of each image's logit (mean over patches) in the image, differentiable in the weights.

    `x` is what `logits` came from.
    """
    (gradient,) = torch.autograd.grad(logits.reshape(len(x), -1).mean(1).sum(), x, create_graph=True)
    return gradient


def zero_centred(logits: Tensor, x: Tensor) -> Tensor:
    """1/2 |dD/dx|^2 per image, `[B]`: R1 on real pictures, R2 on fakes (Mescheder et al. 2018, equations 9 and 10)."""
    return 0.5 * input_gradient(logits, x).square().flatten(1).sum(1)


def one_centred(logits: Tensor, x: Tensor) -> Tensor:
    """(|dD/dx| - 1)^2 per image, `[B]` (Gulrajani et al. 2017, equation 3)."""
    squared = input_gradient(logits, x).square().flatten(1).sum(1)
    return ((squared + 1e-14).sqrt() - 1.0).square()
