"""What the model says of pictures' probability: rate, distortion, evidence bound, importance-weighted bound."""

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from vaegan_dist.config import ObjectiveSection
from vaegan_dist.models import Decoder, Posterior
from vaegan_dist.objectives.reconstruction import has_pixel, pixel_loss

IW_SAMPLES: Final = 64
IW_IMAGES: Final = 256
LEVELS_PER_UNIT: Final = 127.5  # 8-bit grey levels per unit of [-1, 1]

Kind = Literal["bernoulli", "l2", "l1"]


@dataclass(frozen=True)
class Likelihood:
    """p(x|z) as the reconstruction loss means it.

    bernoulli: grey levels as probabilities of (x + 1) / 2 being 1, which is no density of grey levels.
    l2: Gaussian of variance 1 / weight. l1: Laplace distribution of scale 1 / weight. Both on [-1, 1].
    """

    kind: Kind
    weight: float

    def distortion(self, decoder: Decoder, pre_image: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z) in nats per image, float64 `[B]`, with its constants."""
        loss = pixel_loss(self.kind, decoder, pre_image, x).double()
        dims = x[0].numel()
        if self.kind == "l2":
            return self.weight * loss + 0.5 * dims * math.log(2 * math.pi / self.weight)
        if self.kind == "l1":
            return self.weight * loss + dims * math.log(2 / self.weight)
        return loss

    def bits_per_dim(self, nats: float, dims: int) -> float:
        """Of a distortion: bits per pixel and channel; of a density, bits of the 8-bit grey level."""
        offset = 0.0 if self.kind == "bernoulli" else math.log2(LEVELS_PER_UNIT)
        return nats / dims / math.log(2) + offset


def likelihood_of(settings: ObjectiveSection, decoder: Decoder) -> Likelihood:
    """The likelihood of an objective; where it compares no pixels, a Gaussian of variance 1."""
    if not has_pixel(settings) or (settings.reconstruction == "bernoulli" and not decoder.bounded):
        return Likelihood("l2", 1.0)
    kind = settings.reconstruction
    assert kind != "none"
    # A weight on a cross-entropy makes no likelihood.
    return Likelihood(kind, 1.0 if kind == "bernoulli" else settings.reconstruction_weight)


def importance_bound(likelihood: Likelihood, decoder: Decoder, posterior: Posterior, x: Tensor, eps: Tensor) -> Tensor:
    """log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) of each picture in nats, `[B]` (Burda et al. 2016, arXiv 1509.00519).

    Args:
        eps: standard normal `[B, K, *latent]`.
    """
    values = []
    for number in range(eps.shape[1]):
        noise = eps[:, number].to(posterior.mu)
        z = posterior.sample(noise)
        log_prior_over_posterior = 0.5 * (noise.square() + posterior.logvar - z.square()).double().flatten(1).sum(1)
        values.append(log_prior_over_posterior - likelihood.distortion(decoder, decoder.pre_image(z), x))
    return torch.stack(values, 1).logsumexp(1) - math.log(eps.shape[1])
