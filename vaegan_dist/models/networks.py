"""What every network of a kind offers; the objectives know nothing else of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vaegan_dist.config import NetworkName
from vaegan_dist.models.group_norm import twice_differentiable
from vaegan_dist.models.precision import wide

LOGVAR_RANGE = (-30.0, 20.0)  # exp stays finite in float32 and bfloat16
# The passes of each network, for which compiled code may stand in, set on the instance.
PASSES: dict[NetworkName, tuple[str, ...]] = {
    "encoder": ("moments",),
    "decoder": ("pre_image",),
    "discriminator": ("features", "logits_and_features"),
}


@dataclass(frozen=True)
class ImageShape:
    """Size of a picture: channels, height, width."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


@contextmanager
def as_written(discriminator: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let a discriminator's own code run where compiled code or kernels stand in: they are differentiated but once."""
    own = discriminator.__dict__
    aside = {name: own.pop(name) for name in PASSES["discriminator"] if wanted and name in own}
    try:
        with twice_differentiable(wanted):
            yield
    finally:
        own.update(aside)


@dataclass(frozen=True)
class Posterior:
    """q(z|x) = N(mu, exp(logvar)), independent over dimensions; both `[B, *latent]`, float32 or wider."""

    mu: Tensor
    logvar: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """z = mu + sigma * eps (Kingma & Welling 2014, arXiv 1312.6114, section 2.4)."""
        return self.mu + torch.exp(0.5 * self.logvar) * eps

    def kl_per_dim(self) -> Tensor:
        """KL(q(z|x) || N(0, I)) in nats, `[B, latent dimensions]` (Kingma & Welling 2014, appendix B)."""
        kl = 0.5 * (self.mu.square() + self.logvar.exp() - 1.0 - self.logvar)
        return kl.flatten(1)

    @torch.no_grad()
    def unit_statistics(self) -> Tensor:
        """Mean over images of each latent unit's KL, mu and mu^2, `[3, units]`, of which active units are told.

        A unit is a dimension of z; of a z that is a small picture, a channel: its KL is the sum over positions, its
        mu and mu^2 are means over them.
        """
        mu = self.mu.flatten(2) if self.mu.dim() > 2 else self.mu.unsqueeze(2)
        kl = self.kl_per_dim().view(mu.shape).sum(2).mean(0)
        return torch.stack([kl, mu.mean((0, 2)), mu.square().mean((0, 2))])


class Encoder(nn.Module):
    """Picture -> posterior."""

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each `[B, *latent]`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Posterior:
        """`x` `[B, C, H, W]` in [-1, 1]."""
        mu, logvar = self.moments(x)
        return Posterior(wide(mu), wide(logvar).clamp(*LOGVAR_RANGE))


class Decoder(nn.Module):
    """z -> picture; also the generator.

    Attributes:
        bounded: pictures are tanh(a / 2), and cannot leave [-1, 1].
    """

    bounded = True

    def __init__(self, latent_shape: tuple[int, ...], image: ImageShape) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        self.image = image

    @property
    def last_layer(self) -> Tensor:
        """Weight of the layer that gives `pre_image`, where the adaptive weight compares gradients."""
        raise NotImplementedError

    def pre_image(self, z: Tensor) -> Tensor:
        """Output before the last nonlinearity, `a` `[B, C, H, W]`.

        Where `bounded`, sigmoid(a) is the Bernoulli mean of (x + 1) / 2.
        """
        raise NotImplementedError

    def to_image(self, pre_image: Tensor) -> Tensor:
        """The picture of `a`: tanh(a / 2) = 2 sigmoid(a) - 1, or `a` itself where the decoder is not `bounded`."""
        return torch.tanh(0.5 * pre_image) if self.bounded else pre_image

    def forward(self, z: Tensor) -> Tensor:
        """`z` `[B, *latent]` -> pictures, in [-1, 1] where `bounded`."""
        return self.to_image(self.pre_image(z))


class Discriminator(nn.Module):
    """Picture -> logit: positive where it takes the picture for a real one.

    Attributes:
        depth: number of layers whose outputs `features` can give.
        independent: an image's logit depends on no other image of the batch.
        patches: an image has a logit for each of its patches, `[B, h, w]` instead of `[B]`. Losses are the mean over
            them; what speaks of "the" logit of an image means their mean.
    """

    depth: int
    independent: bool
    patches = False

    def __init__(self, image: ImageShape) -> None:
        super().__init__()
        self.image = image

    def features(self, x: Tensor, layer: int) -> Tensor:
        """Output of a layer before its norm and activation, `[B, ...]`; later layers are not computed."""
        raise NotImplementedError

    def logits_and_features(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Logits `[B]` (or `[B, h, w]`) and `features(x, layer)` in one pass."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B]` (or `[B, h, w]`)."""
        return self.logits_and_features(x, self.depth - 1)[0]
