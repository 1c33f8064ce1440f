"""Layers that torch does not have, and the rules that draw initial weights."""

import math

import torch
from torch import Tensor, nn

from vaegan_dist.errors import ConfigError
from vaegan_dist.models.batch_norm import BranchNorm
from vaegan_dist.models.group_norm import GroupNorm
from vaegan_dist.models.precision import wide
from vaegan_dist.models.spectral import Spectral, SpectralConv2d, SpectralConvTranspose2d, SpectralLinear

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
            if isinstance(module, Spectral):
                module.start(generator)
        elif isinstance(module, nn.GroupNorm | BranchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            if isinstance(module, BranchNorm):
                module.reset_statistics()
        elif isinstance(module, SelfAttention):
            nn.init.zeros_(module.gain)
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
    """What follows a convolution or linear layer: a norm, or nothing where there is none or it lies on the weights.

    `group` takes up to GROUPS groups of channels of one image (Wu & He 2018, arXiv 1803.08494). A group has at least
    four channels: one channel alone, normalised at one position, would always be zero.
    """
    if kind in ("none", "spectral"):
        return nn.Identity()
    if kind == "batch":
        return BranchNorm(channels)
    return GroupNorm(math.gcd(channels, GROUPS, max(channels // 4, 1)), channels)


def conv2d(
    norm: str, before: int, after: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True
) -> nn.Conv2d:
    """A convolution, with its weight divided by its spectral norm where `norm` asks for it."""
    kind = SpectralConv2d if norm == "spectral" else nn.Conv2d
    return kind(before, after, kernel, stride=stride, padding=padding, bias=bias)


def conv_transpose2d(
    norm: str, before: int, after: int, kernel: int, *, stride: int, padding: int, output_padding: int
) -> nn.ConvTranspose2d:
    """A transposed convolution, likewise."""
    kind = SpectralConvTranspose2d if norm == "spectral" else nn.ConvTranspose2d
    return kind(before, after, kernel, stride=stride, padding=padding, output_padding=output_padding)


def linear(norm: str, before: int, after: int) -> nn.Linear:
    """A fully connected layer, likewise."""
    return (SpectralLinear if norm == "spectral" else nn.Linear)(before, after)


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
        grouped = wide(x).view(-1, self.group, *x.shape[1:])
        # Tensor.var takes 5 to 10 times as long on a CPU.
        variance = (grouped - grouped.mean(1, keepdim=True)).square().mean(1)
        spread = (variance + 1e-8).sqrt().flatten(1).mean(dim=1)
        plane = spread.repeat_interleave(self.group).view(-1, *[1] * (x.dim() - 1))
        return torch.cat([x, plane.expand(-1, 1, *x.shape[2:]).to(x.dtype)], dim=1)


class SelfAttention(nn.Module):
    """x + gain * attention over all positions (Zhang et al. 2018, arXiv 1805.08318, section 3); the gain begins at 0.

    Written out instead of torch's fused attention, whose backward pass cannot be differentiated again, as R1 asks.
    """

    REDUCTION = 8  # channels of queries and keys: an eighth, as in the paper

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        narrow = max(channels // self.REDUCTION, 1)
        self.query, self.key = (conv2d(norm, channels, narrow, 1) for _ in range(2))
        self.value, self.out = conv2d(norm, channels, channels, 1), conv2d(norm, channels, channels, 1)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same."""
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        share = torch.softmax(query.transpose(1, 2) @ key, dim=2)
        attended: Tensor = self.out((value @ share.transpose(1, 2)).view_as(x))
        return x + self.gain * attended
