"""The objectives: what a phase minimises, built by name."""

from torch import nn

from vaegan_dist.config import ObjectiveSection, Phase
from vaegan_dist.objectives.base import Objective
from vaegan_dist.objectives.introspective import Introspective
from vaegan_dist.objectives.vae import Vae
from vaegan_dist.objectives.vaegan import VaeGan

__all__ = ["Objective", "build_objective"]


def build_objective(phase: Phase, settings: ObjectiveSection, networks: nn.ModuleDict, *, batch_size: int) -> Objective:
    """The objective of a phase, with `requires_grad` set on the networks that it trains.

    Args:
        phase: names the objective and the networks that learn.
        settings: the tree's objective section with the phase's own keys on top.
        networks: encoder, decoder, discriminator.
        batch_size: images of one optimiser step over all workers; turns `images_seen` into steps.

    Raises:
        ConfigError: settings that cannot work together.
    """
    if phase.objective == "vae":
        return Vae(phase, settings, networks)
    if phase.objective == "introspective":
        return Introspective(phase, settings, networks)
    return VaeGan(phase, settings, networks, batch_size=batch_size)
