"""The variational autoencoder: loss_rec + beta * loss_kl (Kingma & Welling 2014, arXiv 1312.6114)."""

import torch
from torch import Tensor, nn

from vaegan_dist.config import ObjectiveSection, Phase
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.precision import wide
from vaegan_dist.objectives.base import LATENT, Objective, Terms
from vaegan_dist.objectives.divergence import beta_at, weighted_kl
from vaegan_dist.objectives.perceptual import build_perceptual
from vaegan_dist.objectives.reconstruction import check_pixel, has_pixel, has_reconstruction, pixel_loss


class Vae(Objective):
    """Encoder and decoder descend the same loss, so nothing needs routing."""

    def __init__(self, phase: Phase, settings: ObjectiveSection, networks: nn.ModuleDict) -> None:
        if not has_reconstruction(settings, similarity=False):
            raise ConfigError(
                f"phases.{phase.name}.settings.reconstruction={settings.reconstruction} with weight "
                f"{settings.reconstruction_weight:g} leaves vae nothing to reconstruct; choose bernoulli, l2 or l1"
            )
        super().__init__(phase, settings, networks, ("encoder", "decoder"), ("encoder", "decoder"))
        check_pixel(settings, self.decoder)
        self.perceptual = build_perceptual(settings, self.decoder.last_layer)
        rec = (["loss_rec"] if has_pixel(settings) else []) + (["loss_perceptual"] if self.perceptual else [])
        self.term_names = (*rec, "loss_kl", "beta")
        self.latent_units = self.encoder.latent_shape[0]

    def noise_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {"eps": (batch, *self.encoder.latent_shape)}

    def forward(self, x: Tensor, noise: dict[str, Tensor], images_seen: int) -> tuple[Tensor, Terms]:
        settings = self.settings
        with torch.set_grad_enabled(self.learns("encoder")):
            posterior = self.encoder(x)
            z = posterior.sample(noise["eps"]).to(x.dtype)
        pre_image = self.decoder.pre_image(z)
        terms: Terms = {}
        total = wide(pre_image).new_zeros(())
        if has_pixel(settings):
            terms["loss_rec"] = pixel_loss(settings.reconstruction, self.decoder, pre_image, x).mean()
            total = total + settings.reconstruction_weight * terms["loss_rec"]
        if self.perceptual:
            terms["loss_perceptual"] = self.perceptual(self.decoder.to_image(pre_image), x).mean()
            total = total + settings.perceptual_weight * terms["loss_perceptual"]
        if self.learns("encoder"):
            total = total + weighted_kl(settings, posterior, images_seen).mean()
        terms["loss_kl"] = posterior.kl_per_dim().sum(1).mean()
        terms[LATENT] = posterior.unit_statistics()
        terms["beta"] = total.new_full((), beta_at(settings, images_seen))
        return total, self.ordered(terms)
