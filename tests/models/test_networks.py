"""The networks keep the contract that objectives and loop rely on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from vaegan_dist.config import NETWORK_NAMES, ConvModel, MlpModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import ImageShape, Posterior, build_networks, latent_shape

DIGIT = ImageShape(1, 28, 28)
LARSEN = ConvModel(
    latent_dim=128,
    channels=(64, 128, 256),
    decoder_channels=(256, 128, 32),
    hidden=2048,
    discriminator_stem=32,
    discriminator_channels=(128, 256, 256),
    discriminator_hidden=512,
    discriminator_norm="group",
)
MODELS = {
    "mlp": (MlpModel(hidden=(32, 16), discriminator_hidden=(24, 8)), ImageShape(3, 7, 5)),
    "mlp-std": (MlpModel(minibatch_std=2), DIGIT),
    "conv": (ConvModel(channels=(8, 16), discriminator_channels=(8, 16), hidden=12, discriminator_hidden=12), DIGIT),
    "conv-options": (
        ConvModel(
            channels=(8,),
            decoder_channels=(8, 4),
            discriminator_channels=(4, 8, 8),
            discriminator_stem=4,
            discriminator_norm="group",
            norm="none",
            kernel_size=3,
            minibatch_std=2,
        ),
        ImageShape(3, 16, 24),
    ),
}


def pictures(image, count=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, image.channels, image.height, image.width, generator=generator, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_ranges(name):
    model, image = MODELS[name]
    networks = build_networks(model, image, seed=0)
    x = pictures(image)
    posterior = networks["encoder"](x)
    latent = latent_shape(model, image)
    assert posterior.mu.shape == posterior.logvar.shape == (4, *latent)
    assert posterior.kl_per_dim().shape == (4, math.prod(latent))
    z = posterior.sample(torch.zeros(4, *latent))
    assert torch.equal(z, posterior.mu)
    a = networks["decoder"].pre_image(z)
    made = networks["decoder"](z)
    assert made.shape == x.shape and made.abs().max() <= 1
    torch.testing.assert_close((made + 1) / 2, torch.sigmoid(a))
    assert networks["discriminator"](x).shape == (4,)
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in networks.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_features_are_a_layer_of_the_pass_that_gives_the_logits(name):
    model, image = MODELS[name]
    discriminator = build_networks(model, image, seed=0)["discriminator"]
    x = pictures(image)
    for layer in range(discriminator.depth):
        logits, features = discriminator.logits_and_features(x, layer)
        assert torch.equal(features, discriminator.features(x, layer))
        torch.testing.assert_close(logits, discriminator(x))
        assert bool((features < 0).any()), "features come before the activation"


@pytest.mark.parametrize("name", MODELS)
def test_independent_says_whether_images_influence_each_other(name):
    model, image = MODELS[name]
    networks = build_networks(model, image, seed=0).double()
    x = pictures(image, dtype=torch.float64)
    changed = torch.cat([x[:1], -x[1:]])
    discriminator = networks["discriminator"]
    same = torch.allclose(discriminator(x)[0], discriminator(changed)[0], rtol=1e-12, atol=0)
    assert same == discriminator.independent
    torch.testing.assert_close(networks["encoder"](x).mu[0], networks["encoder"](changed).mu[0], rtol=1e-12, atol=1e-15)
    # groups of the minibatch deviation are neighbours, so that ranks that share a batch see the same groups
    torch.testing.assert_close(discriminator(x)[2:], discriminator(x[2:]), rtol=1e-12, atol=1e-15)


def test_weights_are_a_function_of_seed_and_network_alone():
    model, image = MODELS["conv"]
    before = torch.random.get_rng_state()
    one, same, other = (build_networks(model, image, seed=seed).state_dict() for seed in (3, 3, 4))
    wider = build_networks(model.model_copy(update={"discriminator_hidden": 20}), image, seed=3).state_dict()
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["encoder.head.weight"], other["encoder.head.weight"])
    for key in one:
        if not key.startswith("discriminator"):
            assert torch.equal(one[key], wider[key])


def test_initial_activations_neither_vanish_nor_explode():
    networks = build_networks(LARSEN, ImageShape(3, 64, 64), seed=0)
    x = pictures(ImageShape(3, 64, 64))
    with torch.no_grad():
        posterior = networks["encoder"](x)
        spread = [posterior.mu.std(), networks["decoder"].pre_image(torch.randn_like(posterior.mu)).std()]
    assert all(1e-2 < float(value) < 10 for value in spread)


def test_larsen_table_1():
    """Parameters of the 64x64 networks of Larsen et al. 2016: 50.7 million."""
    networks = build_networks(LARSEN, ImageShape(3, 64, 64), seed=0)
    millions = {name: sum(p.numel() for p in networks[name].parameters()) / 1e6 for name in NETWORK_NAMES}
    assert {name: round(value, 1) for name, value in millions.items()} == {
        "encoder": 35.1,
        "decoder": 4.7,
        "discriminator": 11.0,
    }


@given(mu=st.floats(-5, 5), logvar=st.floats(-8, 4))
@settings(max_examples=50, deadline=None)
def test_kl_is_that_of_two_gaussians(mu, logvar):
    posterior = Posterior(torch.tensor([[mu]], dtype=torch.float64), torch.tensor([[logvar]], dtype=torch.float64))
    expected = kl_divergence(Normal(mu, math.exp(logvar / 2)), Normal(0.0, 1.0))
    assert float(posterior.kl_per_dim()) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "image", "words"),
    [
        (ConvModel(channels=(8, 8, 8)), DIGIT, ("model.network=conv", "model.channels", "1x28x28", "at most 2")),
        (ConvModel(), ImageShape(1, 27, 28), ("model.network=conv", "1x27x28", "model.network=mlp")),
        (ConvModel(discriminator_channels=(8, 8, 8)), DIGIT, ("model.discriminator_channels", "at most 2")),
        (ConvModel(decoder_channels=(8, 8, 8)), DIGIT, ("model.decoder_channels", "at most 2")),
    ],
)
def test_pictures_that_do_not_fit(model, image, words):
    with pytest.raises(ConfigError) as error:
        build_networks(model, image, seed=0)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_minibatch_group_that_does_not_divide_the_batch():
    discriminator = build_networks(MlpModel(minibatch_std=4), DIGIT, seed=0)["discriminator"]
    with pytest.raises(ConfigError, match=r"model.minibatch_std=4 does not divide the 6 images"):
        discriminator(pictures(DIGIT, 6))
