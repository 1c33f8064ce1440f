"""The KL term of the encoder and the schedule of its weight."""

from torch import Tensor

from vaegan_dist.config import ObjectiveSection
from vaegan_dist.models import Posterior


def beta_at(settings: ObjectiveSection, images_seen: int) -> float:
    """Weight of the KL after `images_seen` images of the phase."""
    if settings.beta_schedule == "constant":
        return settings.beta
    if settings.beta_schedule == "cyclical":
        images_seen %= settings.beta_cycle_images
    return settings.beta * _ramp(images_seen, settings.beta_warmup_images)


def weighted_kl(settings: ObjectiveSection, posterior: Posterior, images_seen: int) -> Tensor:
    """What the encoder minimises of the divergence, per image, `[B]`.

    Free bits hold per image and dimension, and capacity per image, not on the batch mean, so that the loss of a
    batch is the mean of the losses of its parts however many workers share it.
    """
    per_dim = posterior.kl_per_dim()
    if settings.free_bits:
        per_dim = per_dim.clamp_min(settings.free_bits)
    kl = per_dim.sum(1)
    beta, capacity = kl_numbers(settings, images_seen)
    if settings.capacity:
        kl = (kl - capacity).abs()
    return beta * kl


def kl_numbers(settings: ObjectiveSection, images_seen: int) -> tuple[float, float]:
    """Weight of the KL and the capacity asked for, after `images_seen` images of the phase."""
    return beta_at(settings, images_seen), settings.capacity * _ramp(images_seen, settings.capacity_images)


def _ramp(images: int, length: int) -> float:
    return min(images / length, 1.0) if length else 1.0
