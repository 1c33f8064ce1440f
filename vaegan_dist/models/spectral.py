"""Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957): a weight divided by its largest singular value.

torch's own parametrisation moves its estimate in every forward pass and draws it from the global generator; here it is
drawn with the weights, moves once per optimiser step, is part of the state dict, and is the same on every rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.models.stateful import Stateful

START_ITERATIONS = 15  # as torch: the estimate is good before the first step
EPS = 1e-12


class Spectral(Stateful):
    """Mixin of a layer with a `weight`: estimates the first left singular vector of the weight's matrix in `u`."""

    weight: Tensor
    u: Tensor
    output_dim = 0

    def matrix(self) -> Tensor:
        """The weight as `[outputs, inputs x kernel]`."""
        return self.weight.transpose(0, self.output_dim).flatten(1)

    def normalised(self) -> Tensor:
        """weight / sigma with sigma = u' W v, v = W'u / |W'u|.

        u' W v is |W'u|, and with u held its gradient in W is u v', which is what the paper's equation 8 wants of it.
        Products and sums by element stay in float32 under autocast.
        """
        normalised: Tensor = self.weight / (_times(self.u, self.matrix()).square().sum() + EPS).sqrt()
        return normalised

    @torch.no_grad()
    def advance(self, skip: Tensor) -> None:
        """One power iteration u <- W W'u / |W W'u|, as often as the weight moves (the paper's algorithm 1)."""
        matrix = self.matrix()
        u = matrix @ _times(self.u, matrix)
        u = u / (u.norm() + EPS)
        self.u.copy_(torch.where(skip > 0, self.u, u))

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Draw `u` and iterate."""
        self.u.copy_(torch.randn(self.u.shape, generator=generator))
        for _ in range(START_ITERATIONS):
            self.advance(torch.zeros(()))

    def _register(self) -> None:
        self.register_buffer("u", torch.zeros(self.weight.shape[self.output_dim]))


def _times(u: Tensor, matrix: Tensor) -> Tensor:
    """W'u."""
    return (matrix * u.unsqueeze(1)).sum(0)


class SpectralLinear(Spectral, nn.Linear):
    """nn.Linear with a spectral norm of 1."""

    def __init__(self, before: int, after: int) -> None:
        nn.Linear.__init__(self, before, after)
        self._register()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)


class SpectralConv2d(Spectral, nn.Conv2d):
    """nn.Conv2d whose weight as a matrix has a spectral norm of 1."""

    def __init__(
        self, before: int, after: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        nn.Conv2d.__init__(self, before, after, kernel, stride=stride, padding=padding, bias=bias)
        self._register()

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self._conv_forward(x, self.normalised(), self.bias)
        return convolved


class SpectralConvTranspose2d(Spectral, nn.ConvTranspose2d):
    """nn.ConvTranspose2d whose weight as a matrix has a spectral norm of 1."""

    output_dim = 1

    def __init__(self, before: int, after: int, kernel: int, *, stride: int, padding: int, output_padding: int) -> None:
        nn.ConvTranspose2d.__init__(
            self, before, after, kernel, stride=stride, padding=padding, output_padding=output_padding
        )
        self.margin = padding
        self._register()

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        return F.conv_transpose2d(
            x, self.normalised(), self.bias, self.stride, self.margin, self.output_padding, self.groups, self.dilation
        )
