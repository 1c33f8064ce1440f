"""Adversarial losses per image, from logits alone. Positive logits mean "real"."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Fakes = Sequence[Tensor]


@dataclass(frozen=True)
class AdversarialLoss:
    """Both players' losses.

    Attributes:
        discriminator: (logits_real [B], logits of each kind of fake [B]...) -> loss [B]; kinds of fakes add up, as
            in Larsen et al. 2016, algorithm 1.
        generator: (logits of one kind of fake [B], logits_real [B]) -> loss [B].
        needs_real: the generator's loss depends on logits_real.
    """

    discriminator: Callable[[Tensor, Fakes], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    needs_real: bool = False


def _minimax_discriminator(real: Tensor, fakes: Fakes) -> Tensor:
    """-log D(x) - log(1 - D(G(z))) with D = sigmoid(logit)."""
    loss = F.softplus(-real)
    for fake in fakes:
        loss = loss + F.softplus(fake)
    return loss


def _hinge_discriminator(real: Tensor, fakes: Fakes) -> Tensor:
    loss = F.relu(1.0 - real)
    for fake in fakes:
        loss = loss + F.relu(1.0 + fake)
    return loss


def _least_squares_discriminator(real: Tensor, fakes: Fakes) -> Tensor:
    loss = 0.5 * (real - 1.0).square()
    for fake in fakes:
        loss = loss + 0.5 * fake.square()
    return loss


def _wasserstein_discriminator(real: Tensor, fakes: Fakes) -> Tensor:
    loss = -real
    for fake in fakes:
        loss = loss + fake
    return loss


def _relativistic_discriminator(real: Tensor, fakes: Fakes) -> Tensor:
    loss = torch.zeros_like(real)
    for fake in fakes:
        loss = loss + F.softplus(fake - real)
    return loss


LOSSES = {
    # Goodfellow et al. 2014 (arXiv 1406.2661), equation 1: the generator descends log(1 - D(G(z)))
    "minimax": AdversarialLoss(_minimax_discriminator, lambda fake, real: -F.softplus(fake)),
    # the same paper, section 3: the generator descends -log D(G(z))
    "non_saturating": AdversarialLoss(_minimax_discriminator, lambda fake, real: F.softplus(-fake)),
    # Lim & Ye 2017 (arXiv 1705.02894)
    "hinge": AdversarialLoss(_hinge_discriminator, lambda fake, real: -fake),
    # Mao et al. 2017 (arXiv 1611.04076), equation 9
    "least_squares": AdversarialLoss(_least_squares_discriminator, lambda fake, real: 0.5 * (fake - 1.0).square()),
    # Arjovsky et al. 2017 (arXiv 1701.07875); needs a gradient penalty
    "wasserstein": AdversarialLoss(_wasserstein_discriminator, lambda fake, real: -fake),
    # Jolicoeur-Martineau 2018 (arXiv 1807.00734), paired with softplus as in R3GAN (Huang et al. 2024, 2501.05441)
    "relativistic": AdversarialLoss(_relativistic_discriminator, lambda fake, real: F.softplus(real - fake), True),
}
