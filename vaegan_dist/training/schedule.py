"""Learning rates and the average's decay as functions of images seen."""

import math

from vaegan_dist.config import EmaSection, OptimizerSection


def rate_factor(settings: OptimizerSection, images: int, budget: int) -> float:
    """Factor on the learning rate, after `images` of a phase of `budget` images.

    Linear warm-up from one step above zero; then constant until `lr_decay_start` of the phase; then linear or cosine
    down to zero at the phase's end.
    """
    warmup = 1.0
    if settings.lr_warmup_images:
        warmup = min(1.0, images / settings.lr_warmup_images)
    start = settings.lr_decay_start * budget
    if settings.lr_scheduler == "constant" or images <= start:
        return warmup
    progress = min(1.0, (images - start) / max(budget - start, 1))
    if settings.lr_scheduler == "linear":
        return warmup * (1.0 - progress)
    return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_decay(settings: EmaSection, images_seen: int, batch_size: int) -> float:
    """Share of the old average that one step of `batch_size` images keeps.

    With half-life h the weight of an old value halves every h images; during the ramp-up h is at most
    `ramp_up` × images_seen, so that the random start is forgotten (as in Karras et al. 2024, arXiv 2312.02696).
    """
    half_life = ema_half_life(settings, images_seen)
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


def ema_half_life(settings: EmaSection, images_seen: int) -> float:
    """Images after which an old value counts half, at this place of the run."""
    half_life = float(settings.half_life_images)
    return min(half_life, settings.ramp_up * images_seen) if settings.ramp_up else half_life
