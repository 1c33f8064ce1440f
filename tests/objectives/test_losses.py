"""Single terms against torch's own distributions and against their definitions."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Laplace, Normal

from vaegan_dist.config import ObjectiveSection
from vaegan_dist.models import Decoder, ImageShape, Posterior
from vaegan_dist.objectives.adversarial import LOSSES
from vaegan_dist.objectives.divergence import beta_at, weighted_kl
from vaegan_dist.objectives.penalties import one_centred, zero_centred
from vaegan_dist.objectives.reconstruction import pixel_loss
from vaegan_dist.objectives.routing import shared_seed

DECODER = Decoder((1,), ImageShape(1, 4, 4))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pixel_losses_are_negative_log_likelihoods():
    a, x = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1).clamp(-1, 1)
    mean = torch.tanh(a / 2)
    likelihoods = {
        "bernoulli": Bernoulli(logits=a, validate_args=False).log_prob((x + 1) / 2),
        "l2": Normal(mean, 1.0).log_prob(x) + 0.5 * math.log(2 * math.pi),
        "l1": Laplace(mean, 1.0).log_prob(x) + math.log(2),
    }
    for kind, likelihood in likelihoods.items():
        torch.testing.assert_close(pixel_loss(kind, DECODER, a, x), -likelihood.flatten(1).sum(1))


def test_pixel_losses_of_a_half_precision_batch_are_float32():
    a, x = normal(2, 1, 4, 4).bfloat16(), normal(2, 1, 4, 4, seed=1).clamp(-1, 1).bfloat16()
    for kind in ("bernoulli", "l2", "l1"):
        assert pixel_loss(kind, DECODER, a, x).dtype == torch.float32


def test_beta_schedules():
    constant = ObjectiveSection(beta=2.0, beta_warmup_images=100)
    assert [beta_at(constant, seen) for seen in (0, 50, 500)] == [2.0, 2.0, 2.0]
    linear = ObjectiveSection(beta=2.0, beta_schedule="linear", beta_warmup_images=100)
    assert [beta_at(linear, seen) for seen in (0, 25, 100, 500)] == [0.0, 0.5, 2.0, 2.0]
    cyclical = ObjectiveSection(beta=2.0, beta_schedule="cyclical", beta_warmup_images=100, beta_cycle_images=200)
    assert [beta_at(cyclical, seen) for seen in (0, 50, 100, 199, 200, 250)] == [0.0, 1.0, 2.0, 2.0, 0.0, 1.0]


def test_free_bits_and_capacity():
    mu = normal(5, 3).requires_grad_()
    posterior = Posterior(mu, torch.zeros(5, 3, dtype=torch.float64))
    kl = posterior.kl_per_dim().detach()
    free = weighted_kl(ObjectiveSection(free_bits=0.5), posterior, 0)
    torch.testing.assert_close(free, torch.where(kl < 0.5, torch.full_like(kl, 0.5), kl).sum(1))
    (gradient,) = torch.autograd.grad(free.sum(), mu)
    assert torch.equal(gradient == 0, kl < 0.5)
    capacity = ObjectiveSection(beta=4.0, capacity=2.0, capacity_images=100)
    for seen, target in ((0, 0.0), (50, 1.0), (1000, 2.0)):
        torch.testing.assert_close(weighted_kl(capacity, posterior, seen), 4.0 * (kl.sum(1) - target).abs())


@pytest.mark.parametrize("name", LOSSES)
def test_players_pull_generated_logits_apart(name):
    """Everywhere: the discriminator never pushes a fake's logit up, its generator never down."""
    fake = torch.linspace(-8, 8, 33, dtype=torch.float64).requires_grad_()
    real = torch.zeros_like(fake)
    (down,) = torch.autograd.grad(LOSSES[name].discriminator(real, [fake]).sum(), fake)
    (up,) = torch.autograd.grad(LOSSES[name].generator(fake, real).sum(), fake)
    bounded = fake > 0 if name == "least_squares" else torch.ones_like(fake, dtype=torch.bool)
    assert bool((down[bounded] >= 0).all())
    towards_real = fake < 1 if name == "least_squares" else torch.ones_like(fake, dtype=torch.bool)
    assert bool((up[towards_real] < 0).all())


def test_minimax_generator_is_the_negated_fake_part():
    """Goodfellow et al. 2014, equation 1: both players move along one value."""
    fake, real = normal(6), normal(6, seed=1)
    minimax = LOSSES["minimax"]
    without_fakes = minimax.discriminator(real, [])
    torch.testing.assert_close(-minimax.generator(fake, real), minimax.discriminator(real, [fake]) - without_fakes)


def test_shared_seed_brings_back_both_gradients():
    discriminator = torch.tensor([0.0, -0.0, 1e-40, -1e-30, 1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    generator = torch.tensor([-1.0, 1.0, -1.0, 3.0, -1e-18, 4.0, 0.0, 0.0], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        d, g = discriminator.to(dtype), generator.to(dtype)
        seed, factor = shared_seed(d, g)
        assert bool(factor.isfinite().all()) and bool(seed.isfinite().all())
        torch.testing.assert_close(seed * factor, g, rtol=1e-6, atol=0)
        assert bool(((seed - d).abs() <= 1e-17 * (1 + g.abs())).all())


def test_penalties_of_a_linear_discriminator():
    """D(x) = <w, x> has the gradient w everywhere."""
    weight, x = normal(4, 4), normal(3, 1, 4, 4).requires_grad_()
    logits = (x * weight).flatten(1).sum(1)
    norm = float(weight.norm())
    torch.testing.assert_close(zero_centred(logits, x), torch.full((3,), norm**2 / 2, dtype=torch.float64))
    torch.testing.assert_close(one_centred(logits, x), torch.full((3,), (norm - 1) ** 2, dtype=torch.float64))
