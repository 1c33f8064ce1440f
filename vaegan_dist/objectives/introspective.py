"""Soft-IntroVAE: the encoder itself is the discriminator, the decoder the generator (Daniel & Tamar 2021).

arXiv 2012.13253, equation 5, with the reference implementation's coefficients. With s = `elbo_scale`, L the pixel loss
and x_f one of x_rec = D(E(x)) and x_gen = D(z_prior), pictures that the encoder takes as given:

    encoder  descends  s (b_rec L(x, D(E(x))) + b KL(x)) + 1/4 sum_f exp(-2 s (b_rec L(x_f, D(E(x_f))) + b_neg KL(x_f)))
    decoder  descends  s (b_rec L(x, D(z)) + b/2 sum_f KL(x_f) + g b_rec/2 sum_f L(x_f, D(E(x_f))))

The exponents are minus a sum of terms that are not negative, so that the exponentials lie in (0, 1].

The players move in turn, so an optimiser step has two stages. The decoder's stage encodes x with the encoder that has
just moved, where the reference implementation keeps the z of before: a stage stands for itself, and the decoder learns
to decode what the encoder says now.
"""

import math

import torch
from torch import Tensor, nn

from vaegan_dist.config import NetworkName, ObjectiveSection, Phase
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import Posterior
from vaegan_dist.objectives.base import LATENT, Objective, Terms
from vaegan_dist.objectives.divergence import beta_at, weighted_kl
from vaegan_dist.objectives.reconstruction import check_pixel, has_pixel, pixel_loss

PLAYERS: tuple[NetworkName, NetworkName] = ("encoder", "decoder")
FAKES = ("rec", "gen")


class _Stage(Objective):
    """One player's move; the other network only passes gradients on."""

    def __init__(self, phase: Phase, settings: ObjectiveSection, networks: nn.ModuleDict, player: NetworkName) -> None:
        alone = phase.model_copy(update={"train": (player,)})
        super().__init__(alone, settings, networks, PLAYERS, PLAYERS)
        image = self.decoder.image
        self.scale = settings.elbo_scale or 1.0 / math.prod((image.channels, image.height, image.width))

    def error(self, pre_image: Tensor, x: Tensor) -> Tensor:
        """b_rec L per image, `[B]`."""
        loss = pixel_loss(self.settings.reconstruction, self.decoder, pre_image, x)
        return self.settings.reconstruction_weight * loss

    def sample(self, posterior: Posterior, noise: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        return posterior.sample(noise[name]).to(x.dtype)


class EncoderStage(_Stage):
    """The encoder raises the evidence bound of real pictures and lowers that of fake ones."""

    def __init__(self, phase: Phase, settings: ObjectiveSection, networks: nn.ModuleDict) -> None:
        super().__init__(phase, settings, networks, "encoder")
        self.term_names = ("loss_rec", "loss_kl", "beta", *(f"{what}_{f}" for what in ("kl", "expelbo") for f in FAKES))
        self.latent_units = self.encoder.latent_shape[0]

    def forward(self, x: Tensor, noise: dict[str, Tensor], images_seen: int) -> tuple[Tensor, Terms]:
        posterior = self.encoder(x)
        pre_image = self.decoder.pre_image(self.sample(posterior, noise, "eps", x))
        error = self.error(pre_image, x)
        total = self.scale * (error + weighted_kl(self.settings, posterior, images_seen)).mean()
        terms: Terms = {
            "loss_rec": pixel_loss(self.settings.reconstruction, self.decoder, pre_image, x).mean(),
            "loss_kl": posterior.kl_per_dim().sum(1).mean(),
            "beta": total.new_full((), beta_at(self.settings, images_seen)),
            LATENT: posterior.unit_statistics(),
        }
        with torch.no_grad():
            fakes = {"rec": self.decoder.to_image(pre_image), "gen": self.decoder(noise["z_prior"])}
        for name, fake in fakes.items():
            judged = self.encoder(fake)
            kl = judged.kl_per_dim().sum(1)
            again = self.decoder.pre_image(self.sample(judged, noise, f"eps_{name}", x))
            elbo = self.error(again, fake) + self.settings.beta_neg * kl
            exponential = torch.exp(-2.0 * self.scale * elbo)
            total = total + 0.25 * exponential.mean()
            terms[f"kl_{name}"] = kl.mean()
            terms[f"expelbo_{name}"] = exponential.mean()
        return total, self.ordered(terms)


class DecoderStage(_Stage):
    """The decoder reconstructs, and makes pictures that the encoder takes for real: of small divergence."""

    def __init__(self, phase: Phase, settings: ObjectiveSection, networks: nn.ModuleDict) -> None:
        super().__init__(phase, settings, networks, "decoder")
        self.term_names = ("loss_rec_decoder", "loss_adv", "loss_rec_fakes")

    def forward(self, x: Tensor, noise: dict[str, Tensor], images_seen: int) -> tuple[Tensor, Terms]:
        settings = self.settings
        with torch.no_grad():
            z = self.sample(self.encoder(x), noise, "eps", x)
        pre_image = self.decoder.pre_image(z)
        error = self.error(pre_image, x)
        divergence, again = torch.zeros_like(error), torch.zeros_like(error)
        for name, fake in {"rec": self.decoder.to_image(pre_image), "gen": self.decoder(noise["z_prior"])}.items():
            judged = self.encoder(fake)
            divergence = divergence + 0.5 * judged.kl_per_dim().sum(1)
            if settings.fake_reconstruction:
                z_fake = self.sample(judged, noise, f"eps_{name}", x).detach()
                again = again + 0.5 * self.error(self.decoder.pre_image(z_fake), fake.detach())
        beta = beta_at(settings, images_seen)
        total = self.scale * (error + beta * divergence + settings.fake_reconstruction * again).mean()
        terms = {
            "loss_rec_decoder": pixel_loss(settings.reconstruction, self.decoder, pre_image, x).mean(),
            "loss_adv": divergence.mean(),
            "loss_rec_fakes": again.mean(),
        }
        return total, self.ordered(terms)


class Introspective(Objective):
    """Encoder against decoder, one after the other in each optimiser step."""

    def __init__(self, phase: Phase, settings: ObjectiveSection, networks: nn.ModuleDict) -> None:
        if not has_pixel(settings):
            raise ConfigError(
                f"phases.{phase.name}.settings.reconstruction={settings.reconstruction} with weight "
                f"{settings.reconstruction_weight:g} leaves introspective nothing to reconstruct; "
                f"choose bernoulli, l2 or l1"
            )
        super().__init__(phase, settings, networks, PLAYERS, PLAYERS)
        check_pixel(settings, self.decoder)
        trained = self.trained
        kinds = {"encoder": EncoderStage, "decoder": DecoderStage}
        # In a tuple and not a module list: the networks are registered once, here.
        self._stages = tuple(kinds[name](phase, settings, networks) for name in trained)
        self.term_names = tuple(name for stage in self._stages for name in stage.term_names)
        self.focus()

    @property
    def stages(self) -> tuple[Objective, ...]:
        return self._stages

    def noise_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        names = ("eps", "z_prior", *(f"eps_{name}" for name in FAKES))
        return dict.fromkeys(names, (batch, *self.encoder.latent_shape))
