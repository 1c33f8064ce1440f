"""Layers that torch does not have, and the rules that draw initial weights."""

import math

import torch
from torch import Tensor, nn

from vaegan_dist.errors import ConfigError

GROUPS = 8


def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Fill a network's parameters in place: uniform with variance 1 / (3 fan_in) as torch does, norms with 1 and 0."""
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            bound = 1.0 / math.sqrt(_fan_in(module))
            for parameter in own.values():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            raise NotImplementedError(f"no rule draws the weights of {type(module).__name__}")


def _fan_in(module: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> float:
    """Inputs that reach one output (a transposed convolution spreads its kernel over stride x stride outputs)."""
    if isinstance(module, nn.Linear):
        return module.in_features
    kernel = math.prod(module.kernel_size)
    if isinstance(module, nn.ConvTranspose2d):
        return module.in_channels * kernel / math.prod(module.stride)
    return module.in_channels // module.groups * kernel


def norm_layer(kind: str, channels: int) -> nn.Module:
    """Norm over up to GROUPS groups of channels of one image (Wu & He 2018, arXiv 1803.08494), or nothing.

    A group has at least four channels: one channel alone, normalised at one position, would always be zero.
    """
    if kind == "none":
        return nn.Identity()
    return nn.GroupNorm(math.gcd(channels, GROUPS, max(channels // 4, 1)), channels)


class MinibatchStd(nn.Module):
    """Appends the mean standard deviation over a group of images as one more feature (Karras et al. 2018, section 3).

    Groups are neighbours in the batch, so that they stay the same when ranks share it out.
    """

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """`[B, F, ...]` -> `[B, F + 1, ...]`."""
        if x.shape[0] % self.group:
            raise ConfigError(
                f"model.minibatch_std={self.group} does not divide the {x.shape[0]} images that a worker takes at a "
                f"time; choose a divisor of it"
            )
        grouped = x.view(-1, self.group, *x.shape[1:])
        spread = (grouped.var(dim=1, unbiased=False) + 1e-8).sqrt().flatten(1).mean(dim=1)
        plane = spread.repeat_interleave(self.group).view(-1, *[1] * (x.dim() - 1))
        return torch.cat([x, plane.expand(-1, 1, *x.shape[2:])], dim=1)
