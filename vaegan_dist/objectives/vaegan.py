"""VAE-GAN and GAN: three losses, one pass over the networks, one backward pass.

    encoder        descends  rec + beta KL                        (+ w L_G(x_rec) with adversarial_to_encoder)
    decoder        descends  gamma rec + w L_G                    rec = pixel loss and / or learned similarity L_sim
    discriminator  descends  L_D + penalties                      L_sim gives it nothing

(Larsen et al. 2016, arXiv 1512.09300, equation 9 and algorithm 1; `docs/method.md` tells the whole.) Where the graph
is cut:

    x ── encoder ── z ─[1/gamma]─ decoder ─[gamma]─ x_rec ── D ── L_sim          gradient stops at x_rec
                     z_prior ──── decoder ───────── x_gen ─[g'/d']─ D ── L_D     one seed d' serves both players
                                                    x ───────────── D ── L_D

Where one seed cannot serve both players (the discriminator couples images, or R2 needs a leaf), D's graph is walked
twice: once here, down to the picture, and once in the final backward pass for D's weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.config import NetworkName, ObjectiveSection, Phase
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import Posterior
from vaegan_dist.models.networks import as_written
from vaegan_dist.models.precision import wide
from vaegan_dist.objectives import equilibrium, lecam
from vaegan_dist.objectives.adversarial import LOSSES
from vaegan_dist.objectives.augment import NUMBERS, View, view_of
from vaegan_dist.objectives.balance import balance_of
from vaegan_dist.objectives.base import LATENT, Objective, Terms, uniform
from vaegan_dist.objectives.divergence import beta_at, weighted_kl
from vaegan_dist.objectives.penalties import one_centred, zero_centred
from vaegan_dist.objectives.perceptual import build_perceptual
from vaegan_dist.objectives.players import Balance, Judged, judge, play
from vaegan_dist.objectives.reconstruction import (
    check_pixel,
    has_pixel,
    has_reconstruction,
    pixel_loss,
    similarity_loss,
)
from vaegan_dist.objectives.routing import Boundary, carry

GATED: tuple[NetworkName, NetworkName] = ("decoder", "discriminator")
CROSS_ENTROPIES = ("cross_entropy_real", "cross_entropy_fake")


@dataclass
class Reconstruction:
    """A reconstruction and the places where its gradients are taken."""

    posterior: Posterior
    z: Tensor
    """sample of the posterior, connected to the encoder"""
    z_in: Tensor
    """what the decoder saw: z, or a leaf that keeps the decoder's gradients from the encoder"""
    pre_image: Tensor
    x_rec: Tensor
    at_last_layer: Tensor | None = None
    """gradient of the reconstruction's loss in the decoder's last layer, where something asks for it"""


class VaeGan(Objective):
    """Objectives `vaegan` and `gan` (decoder and discriminator alone)."""

    def __init__(self, phase: Phase, settings: ObjectiveSection, networks: nn.ModuleDict, *, batch_size: int) -> None:
        players: tuple[NetworkName, ...] = ("decoder", "discriminator")
        trainable: tuple[NetworkName, ...] = players if phase.objective == "gan" else ("encoder", *players)
        learned = phase.train or trainable
        self.rec_is_fake = settings.fakes != "prior"
        self.gen_is_fake = settings.fakes != "reconstruction"
        _check(phase, settings)
        reconstructs = phase.objective == "vaegan" and {"encoder", "decoder"} & set(learned)
        encodes = bool(reconstructs) or self.rec_is_fake
        super().__init__(phase, settings, networks, trainable if encodes else players, trainable)
        self.learns_rec = bool(reconstructs) and has_reconstruction(settings, similarity=True)
        self.similarity = settings.similarity if self.learns_rec else 0.0
        self.encodes = self.learns_rec or self.rec_is_fake
        self.perceptual = None
        if self.learns_rec:
            check_pixel(settings, self.decoder)
            self.perceptual = build_perceptual(settings, self.decoder.last_layer)
        self.plays = self.gen_is_fake and self.learns("decoder") and settings.adversarial_weight > 0
        self.rec_plays = (
            self.rec_is_fake
            and settings.adversarial_weight > 0
            and (self.learns("decoder") or (self.learns("encoder") and settings.adversarial_to_encoder))
        )
        self.balances = (
            settings.adaptive_weight and self.learns_rec and self.learns("decoder") and (self.plays or self.rec_plays)
        )
        self.judges = self.plays or self.rec_plays or self.learns("discriminator")
        self.judges_real = self.learns("discriminator") or (self.judges and LOSSES[settings.adversarial].needs_real)
        self.layer = _layer(settings.similarity_layer, self.discriminator.depth)
        self.loss = LOSSES[settings.adversarial]
        self.batch_size = batch_size
        self.gates = settings.equilibrium > 0 and set(GATED) <= set(self.trained)
        self.gated = GATED if self.gates else ()
        self.latent_units = self.encoder.latent_shape[0] if self.learns_rec else 0
        if settings.lecam and self.learns("discriminator"):
            device = next(networks.parameters()).device
            self.memory["lecam"] = torch.zeros(lecam.SHAPE, dtype=torch.float64, device=device)
        self.fakes = ("gen",) * self.gen_is_fake + ("rec",) * self.rec_is_fake
        self.term_names = self._term_names()
        self.shared_terms = (
            *((f"logits_{kind}" for kind in ("real", *self.fakes)) if self.memory else ()),
            *(CROSS_ENTROPIES if self.gates else ()),
        )

    def noise_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.encodes:
            shapes["eps"] = (batch, *self.encoder.latent_shape)
        if self.judges and self.gen_is_fake:
            shapes["z_prior"] = (batch, *self.decoder.latent_shape)
        if self.settings.gradient_penalty and self.learns("discriminator"):
            shapes["mix"] = (batch, 1, 1, 1)
        if self.settings.diff_augment:
            seen = {"augment_real": self.judges or self.similarity, "augment_gen": "z_prior" in shapes}
            shapes |= {name: (batch, NUMBERS) for name, needed in seen.items() if needed}
        return shapes

    def forward(self, x: Tensor, noise: dict[str, Tensor], images_seen: int) -> tuple[Tensor, Terms]:
        terms: Terms = {}
        total = wide(x).new_zeros(())
        rec = self._reconstruct(x, noise["eps"]) if self.encodes else None
        penalise, active = self._penalises(images_seen), self._active(images_seen)
        # A reconstruction is altered as its picture, so that their features can be compared.
        view, view_gen = (view_of(self.settings.diff_augment, noise.get(f"augment_{kind}")) for kind in ("real", "gen"))
        real, logits_real, features_real = self._judge_real(x, view, leaf=penalise and self.settings.r1 > 0)
        fakes: dict[str, Judged] = {}
        learns = self.learns("discriminator")
        twice = penalise and self.settings.r2 > 0
        leaf = twice or self.balances
        if self.judges and self.gen_is_fake:
            with torch.set_grad_enabled(self.plays):
                x_gen = self.decoder(noise["z_prior"])
            fakes["gen"] = judge(
                self.discriminator, x_gen, view_gen, learns=learns, plays=self.plays, leaf=leaf, twice=twice
            )
        if rec and self.rec_is_fake and self.judges:
            layer = self.layer if self.similarity else None
            fakes["rec"] = judge(
                self.discriminator,
                rec.x_rec,
                view,
                learns=learns,
                plays=self.rec_plays,
                leaf=leaf,
                twice=twice,
                layer=layer,
            )
        if rec and self.learns_rec:
            total = total + self._rec_terms(rec, x, features_real, fakes.get("rec"), view, images_seen, terms)
        if self.judges:
            game, played = play(
                self.loss,
                self.settings.adversarial_weight,
                logits_real,
                fakes,
                learns=learns,
                balance=self._balance(rec),
                restrain=self._restrain if "lecam" in self.memory else None,
                active=active,
            )
            total = total + game
            terms |= played
        if self.gates:
            terms |= _cross_entropies(logits_real, fakes)
        if learns:
            total = total + active * self._penalty_terms(real, logits_real, fakes, view, noise, penalise, terms)
        return total, self.ordered(terms)

    def graph_key(self, images_seen: int) -> tuple[float, ...]:
        return (*super().graph_key(images_seen), self._penalises(images_seen), self._active(images_seen))

    def _penalises(self, images_seen: int) -> bool:
        """Whether a step evaluates the lazy penalties."""
        settings = self.settings
        lazy = self.learns("discriminator") and (settings.r1 > 0 or settings.r2 > 0)
        return lazy and images_seen // self.batch_size % settings.penalty_interval == 0

    def _active(self, images_seen: int) -> bool:
        return images_seen >= self.settings.adversarial_start_images

    def _term_names(self) -> tuple[str, ...]:
        names: list[str] = []
        if self.learns_rec:
            names += ["loss_rec"] if has_pixel(self.settings) else []
            names += ["loss_perceptual"] if self.perceptual else []
            names += ["loss_sim"] if self.similarity else []
            names += ["loss_kl", "beta"]
        if self.judges:
            names += ["loss_adv"] if self.plays or self.rec_plays else []
            names += ["adaptive_weight"] if self.balances else []
            names += ["loss_disc"] if self.learns("discriminator") else []
            kinds = ("real", *self.fakes) if self.judges_real else self.fakes
            names += [f"{what}_{kind}" for what in ("accuracy", "logits") for kind in kinds]
            names += CROSS_ENTROPIES if self.gates else ()
        if self.learns("discriminator"):
            names += [name for name, weight in self._penalties.items() if weight]
        return tuple(names)

    @property
    def _penalties(self) -> dict[str, float]:
        settings = self.settings
        return {
            "penalty_r1": settings.r1,
            "penalty_r2": settings.r2,
            "penalty_gp": settings.gradient_penalty,
            "penalty_lecam": settings.lecam,
        }

    def held_back(self, means: Terms) -> Terms:
        if not self.gates:
            return {}
        settings = self.settings
        real, fake = (means[name] for name in CROSS_ENTROPIES)
        flags = equilibrium.held_back(real, fake, settings.equilibrium, settings.equilibrium_margin)
        return dict(zip(GATED, flags, strict=True))

    def remember(self, means: Terms, skip: Tensor) -> None:
        if "lecam" in self.memory:
            state = self.memory["lecam"]
            fake = torch.stack([means[f"logits_{kind}"] for kind in self.fakes]).mean()
            news = lecam.moved(state, torch.stack([means["logits_real"], fake]), self.settings.lecam_decay)
            state.copy_(torch.where((skip > 0) | ~news.isfinite().all(), state, news))

    def _reconstruct(self, x: Tensor, eps: Tensor) -> Reconstruction:
        """Encode and decode once; put the boundaries where decoder and encoder weigh the same gradient differently."""
        gamma = self.settings.gamma
        encoder_learns = self.learns("encoder")
        with torch.set_grad_enabled(encoder_learns):
            posterior = self.encoder(x)
            z = posterior.sample(eps).to(x.dtype)
        with torch.set_grad_enabled(encoder_learns or self.learns("decoder")):
            if self._splits:
                connected = self.rec_plays and self.settings.adversarial_to_encoder
                z_in = z if connected else z.detach().requires_grad_()
                pre_image = self.decoder.pre_image(z_in)
            elif encoder_learns and self.learns("decoder") and gamma != 1:
                z_in = z
                pre_image = Boundary(gamma)(self.decoder.pre_image(Boundary(1 / gamma)(z)))
            else:
                z_in = z
                pre_image = self.decoder.pre_image(z)
            return Reconstruction(posterior, z, z_in, pre_image, self.decoder.to_image(pre_image))

    @property
    def _splits(self) -> bool:
        """Encoder and decoder need gradients through the decoder that are not multiples of each other."""
        if not (self.learns_rec and self.learns("encoder") and self.learns("decoder")):
            return False
        if self.rec_plays:
            return not (self.settings.adversarial_to_encoder and self.settings.gamma == 1)
        return self.settings.gamma == 0

    def _judge_real(self, x: Tensor, view: View, *, leaf: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Real pictures, their logits and their features, as far as anything asks for them."""
        learns = self.learns("discriminator")
        if not self.judges_real and not self.similarity:
            return x, None, None
        with torch.set_grad_enabled(learns):
            if not self.judges_real:
                return x, None, self.discriminator.features(view(x), self.layer)
            if leaf:
                x = x.detach().requires_grad_()
            with as_written(self.discriminator, leaf):
                logits, features = self.discriminator.logits_and_features(view(x), self.layer)
        return x, wide(logits), features.detach() if self.similarity else None

    def _rec_terms(
        self,
        rec: Reconstruction,
        x: Tensor,
        features_real: Tensor | None,
        judged: Judged | None,
        view: View,
        images_seen: int,
        terms: Terms,
    ) -> Tensor:
        """What carries the reconstruction's gradient to the decoder (times gamma) and to the encoder, and the KL."""
        settings = self.settings
        loss = wide(rec.pre_image).new_zeros(())
        if has_pixel(settings):
            terms["loss_rec"] = pixel_loss(settings.reconstruction, self.decoder, rec.pre_image, x).mean()
            loss = loss + settings.reconstruction_weight * terms["loss_rec"]
        if self.perceptual:
            terms["loss_perceptual"] = self.perceptual(rec.x_rec, x).mean()
            loss = loss + settings.perceptual_weight * terms["loss_perceptual"]
        if features_real is not None:
            seen = judged.seen if judged else rec.x_rec.detach().requires_grad_()
            features = judged.features if judged else None
            if features is None:
                features = self.discriminator.features(view(seen), self.layer)
            terms["loss_sim"] = similarity_loss(features, features_real).mean()
            (gradient,) = torch.autograd.grad(settings.similarity * terms["loss_sim"], seen, retain_graph=bool(judged))
            loss = loss + carry(rec.x_rec, gradient)
        if self.balances:
            (gradient,) = torch.autograd.grad(loss, rec.pre_image, retain_graph=True)
            rec.at_last_layer = self._at_last_layer(rec.pre_image, gradient)
        kl = weighted_kl(settings, rec.posterior, images_seen).mean()
        terms["loss_kl"] = rec.posterior.kl_per_dim().sum(1).mean()
        terms[LATENT] = rec.posterior.unit_statistics()
        terms["beta"] = kl.new_full((), beta_at(settings, images_seen))
        if not self.learns("encoder"):
            return settings.gamma * loss
        if not self._splits:
            return loss + kl
        (at_pre_image,) = torch.autograd.grad(loss, rec.pre_image, retain_graph=True)
        (at_z,) = torch.autograd.grad(rec.pre_image, rec.z_in, at_pre_image, retain_graph=True)
        to_encoder = 1 - settings.gamma if rec.z_in is rec.z else 1.0
        return settings.gamma * carry(rec.pre_image, at_pre_image) + to_encoder * carry(rec.z, at_z) + kl

    def _at_last_layer(self, output: Tensor, gradient: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(output, self.decoder.last_layer, gradient, retain_graph=True)
        return found

    def _balance(self, rec: Reconstruction | None) -> Balance | None:
        """The adaptive weight, once both gradients at the decoder's last layer are known."""
        if not self.balances:
            return None
        assert rec is not None and rec.at_last_layer is not None
        at_rec, settings = rec.at_last_layer, self.settings

        def balance(at_images: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
            at_adv = torch.stack([self._at_last_layer(image, gradient) for image, gradient in at_images]).sum(0)
            return balance_of(at_rec, at_adv / settings.adversarial_weight, settings.adaptive_weight_max)

        return balance

    def _penalty_terms(
        self,
        real: Tensor,
        logits_real: Tensor | None,
        fakes: dict[str, Judged],
        view: View,
        noise: dict[str, Tensor],
        penalise: bool,
        terms: Terms,
    ) -> Tensor:
        """Penalties on the discriminator; the lazy ones are zero between their steps and then count interval times."""
        assert logits_real is not None
        settings = self.settings
        zero = torch.zeros_like(logits_real.detach().sum())
        terms |= {name: zero for name, weight in self._penalties.items() if weight and name not in terms}
        if settings.r1 and penalise:
            terms["penalty_r1"] = settings.penalty_interval * settings.r1 * zero_centred(logits_real, real).mean()
        if settings.r2 and penalise:
            each = [zero_centred(judged.logits, judged.seen).mean() for judged in fakes.values()]
            terms["penalty_r2"] = settings.penalty_interval * settings.r2 * torch.stack(each).sum()
        if settings.gradient_penalty:
            share = uniform(noise["mix"])
            fake = next(iter(fakes.values())).image.detach()
            between = (share * real.detach() + (1 - share) * fake).requires_grad_()
            with as_written(self.discriminator):
                logits = wide(self.discriminator(view(between)))
            penalty = one_centred(logits, between).mean()
            terms["penalty_gp"] = settings.gradient_penalty * penalty
        on_pictures = [terms[name] for name, weight in self._penalties.items() if weight and name != "penalty_lecam"]
        return sum(on_pictures, start=zero)

    def _restrain(self, real: Tensor, fakes: Sequence[Tensor]) -> Tensor:
        return self.settings.lecam * lecam.penalty(self.memory["lecam"], real, fakes)


def _cross_entropies(logits_real: Tensor | None, fakes: dict[str, Judged]) -> Terms:
    """How well the discriminator knows real pictures and fakes, means over images and kinds of fakes."""
    assert logits_real is not None
    fake = torch.stack([F.softplus(judged.logits.detach()).mean() for judged in fakes.values()]).mean()
    return dict(zip(CROSS_ENTROPIES, (F.softplus(-logits_real.detach()).mean(), fake), strict=True))


def _layer(layer: int, depth: int) -> int:
    if not -depth <= layer < depth:
        raise ConfigError(
            f"objective.similarity_layer={layer}: the discriminator has {depth} layers; "
            f"choose from {-depth} to {depth - 1}"
        )
    return layer % depth


def _check(phase: Phase, settings: ObjectiveSection) -> None:
    where = f"phases.{phase.name}.settings"
    if phase.objective == "gan" and settings.fakes != "prior":
        raise ConfigError(f"{where}.fakes={settings.fakes}: objective gan has no reconstructions; set it to prior")
    learns_rec = phase.train is None or {"encoder", "decoder"} & set(phase.train)
    if phase.objective == "vaegan" and learns_rec and not has_reconstruction(settings, similarity=True):
        raise ConfigError(
            f"{where}: reconstruction=none and similarity=0 leave vaegan nothing to reconstruct; set one of them, "
            f"or use objective gan"
        )
    if settings.adversarial_to_encoder and settings.fakes == "prior" and phase.objective == "vaegan":
        raise ConfigError(f"{where}.adversarial_to_encoder=true needs fakes=prior+reconstruction or reconstruction")
    if settings.equilibrium and settings.adversarial not in equilibrium.ADVERSARIAL:
        raise ConfigError(
            f"{where}.equilibrium={settings.equilibrium:g} is a cross-entropy, which {settings.adversarial} is not; "
            f"set adversarial to one of {', '.join(equilibrium.ADVERSARIAL)}, or equilibrium to 0"
        )
    if settings.adaptive_weight and phase.objective == "gan":
        raise ConfigError(
            f"{where}.adaptive_weight=true: objective gan has no reconstruction to balance; set it to false"
        )
