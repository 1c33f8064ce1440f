"""How far a reconstruction is from its picture, in nats per image (up to a constant)."""

from torch import Tensor
from torch.nn import functional as F

from vaegan_dist.config import ObjectiveSection
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.networks import Decoder
from vaegan_dist.models.precision import wide


def pixel_loss(kind: str, decoder: Decoder, pre_image: Tensor, x: Tensor) -> Tensor:
    """-log p(x|z) per image, `[B]`, from the decoder's output before its last nonlinearity.

    bernoulli: cross-entropy of (x + 1) / 2 (Kingma & Welling 2014, appendix C.1). l2: half the squared error, a
    Gaussian of variance 1 on [-1, 1]. l1: absolute error, a Laplace distribution of scale 1.
    """
    pre_image, x = wide(pre_image), wide(x)
    if kind == "bernoulli":
        loss = F.binary_cross_entropy_with_logits(pre_image, 0.5 * (x + 1.0), reduction="none")
    elif kind == "l2":
        loss = 0.5 * (decoder.to_image(pre_image) - x).square()
    elif kind == "l1":
        loss = (decoder.to_image(pre_image) - x).abs()
    else:
        raise NotImplementedError(f"pixel loss {kind}")
    return loss.flatten(1).sum(1)


def similarity_loss(features_rec: Tensor, features_real: Tensor) -> Tensor:
    """L_sim = 1/2 |D_l(x) - D_l(x_rec)|^2 per image, `[B]` (Larsen et al. 2016, equation 6 with a unit Gaussian)."""
    difference = wide(features_rec) - wide(features_real)
    return 0.5 * difference.square().flatten(1).sum(1)


def has_reconstruction(settings: ObjectiveSection, *, similarity: bool) -> bool:
    """Whether any term compares a picture with its reconstruction."""
    return has_pixel(settings) or settings.perceptual_weight > 0 or (similarity and settings.similarity > 0)


def has_pixel(settings: ObjectiveSection) -> bool:
    """Whether a term compares pixels."""
    return settings.reconstruction != "none" and settings.reconstruction_weight > 0


def check_pixel(settings: ObjectiveSection, decoder: Decoder) -> None:
    """A cross-entropy needs a decoder whose output is a logit."""
    if has_pixel(settings) and settings.reconstruction == "bernoulli" and not decoder.bounded:
        raise ConfigError(
            "objective.reconstruction=bernoulli needs a decoder that gives probabilities, and that of model.network=kl "
            "gives pictures; choose l1 or l2"
        )
