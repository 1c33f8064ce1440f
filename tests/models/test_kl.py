"""The latent-diffusion autoencoder: shapes, the layout of diffusers' AutoencoderKL, and its discriminator."""

import os
from importlib.util import find_spec

import pytest
import torch

from vaegan_dist.config import KlModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import ImageShape, build_networks, latent_shape
from vaegan_dist.models.diffusers_layout import diffusers_config, from_diffusers, to_diffusers
from vaegan_dist.models.kl import Upsampler

SMALL = KlModel(
    channels=(8, 12, 16), norm_groups=4, layers_per_block=1, discriminator_channels=4, discriminator_layers=2
)
PICTURE = ImageShape(3, 32, 24)


def expected_keys(channels, layers):
    """Names in diffusers' AutoencoderKL, written down from its modules."""
    keys = set()

    def add(*names):
        keys.update(f"{name}.{part}" for name in names for part in ("weight", "bias"))

    def resnet(path, before, after):
        add(*(f"{path}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")))
        if before != after:
            add(f"{path}.conv_shortcut")

    for side, widths, count in (("encoder", channels, layers), ("decoder", channels[::-1], layers + 1)):
        kind, change = ("down", "downsamplers") if side == "encoder" else ("up", "upsamplers")
        before = widths[0]
        for index, after in enumerate(widths):
            for layer in range(count):
                resnet(f"{side}.{kind}_blocks.{index}.resnets.{layer}", before, after)
                before = after
            if index < len(widths) - 1:
                add(f"{side}.{kind}_blocks.{index}.{change}.0.conv")
        for number in range(2):
            resnet(f"{side}.mid_block.resnets.{number}", 1, 1)
        attention = f"{side}.mid_block.attentions.0"
        add(*(f"{attention}.{name}" for name in ("group_norm", "to_q", "to_k", "to_v", "to_out.0")))
        add(*(f"{side}.{name}" for name in ("conv_in", "conv_norm_out", "conv_out")))
    add("quant_conv", "post_quant_conv")
    return keys


@pytest.mark.parametrize("stages", [3, 4, 5])
def test_shapes(stages):
    """Three resolutions give f4, four f8, five f16; the picture is not squashed."""
    model = SMALL.model_copy(update={"channels": (4,) * stages, "norm_groups": 2})
    image = ImageShape(3, 32, 64)
    networks = build_networks(model, image, seed=0)
    factor = 2 ** (stages - 1)
    assert latent_shape(model, image) == (4, 32 // factor, 64 // factor)
    x = torch.zeros(2, 3, 32, 64)
    posterior = networks["encoder"](x)
    assert posterior.mu.shape == posterior.logvar.shape == (2, *latent_shape(model, image))
    assert networks["decoder"](posterior.mu).shape == x.shape
    decoder = networks["decoder"]
    assert torch.equal(decoder(posterior.mu), decoder.pre_image(posterior.mu))


@pytest.mark.parametrize("model", [SMALL, KlModel(channels=(32, 32, 64, 64), layers_per_block=2)])
def test_every_key_goes_to_diffusers_and_back(model):
    networks = build_networks(model, ImageShape(3, 64, 64), seed=0)
    weights = networks.state_dict()
    there = to_diffusers(weights)
    assert set(there) == expected_keys(list(model.channels), model.layers_per_block)
    back = from_diffusers(there)
    assert set(back) == {key for key in weights if not key.startswith("discriminator.")}
    assert all(back[key] is weights[key] for key in back)


def test_same_pictures_as_diffusers():
    if find_spec("diffusers") is None and not os.environ.get("CI"):
        pytest.skip("diffusers is not installed")
    import diffusers

    networks = build_networks(SMALL, PICTURE, seed=0).double()
    theirs = diffusers.AutoencoderKL(**diffusers_config(SMALL, PICTURE)).double().eval()
    theirs.load_state_dict(to_diffusers(networks.state_dict()))
    x = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    posterior, reference = networks["encoder"](x), theirs.encode(x).latent_dist
    torch.testing.assert_close(posterior.mu, reference.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(posterior.logvar, reference.logvar, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        networks["decoder"](posterior.mu), theirs.decode(reference.mean).sample, rtol=1e-10, atol=1e-12
    )


def test_parameters_of_the_published_autoencoder():
    """kl-f8 of Rombach et al. 2022: 83,653,863 parameters, as diffusers counts them for the same configuration."""
    networks = build_networks(KlModel(), ImageShape(3, 256, 256), seed=0)
    assert sum(p.numel() for name in ("encoder", "decoder") for p in networks[name].parameters()) == 83_653_863


def test_a_patch_sees_70_pixels():
    """Three strided convolutions: a logit depends on 70 x 70 pixels (Isola et al. 2017, section 6.1.2)."""
    model = KlModel(channels=(4,), norm_groups=2, discriminator_channels=2, discriminator_norm="none")
    discriminator = build_networks(model, ImageShape(1, 128, 128), seed=0)["discriminator"]
    x = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = discriminator(x)
    assert discriminator.patches and logits.shape == (1, 14, 14)
    (gradient,) = torch.autograd.grad(logits[0, 7, 7], x)
    rows = gradient[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_features_are_a_layer_of_the_pass_that_gives_the_logits():
    discriminator = build_networks(SMALL, PICTURE, seed=0)["discriminator"]
    x = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    for layer in range(discriminator.depth):
        logits, features = discriminator.logits_and_features(x, layer)
        assert torch.equal(features, discriminator.features(x, layer))
        torch.testing.assert_close(logits, discriminator(x))
    changed = torch.cat([x[:1], -x[1:]])
    torch.testing.assert_close(discriminator(x)[0], discriminator(changed)[0])


@pytest.mark.parametrize(
    ("model", "image", "words"),
    [
        (SMALL, ImageShape(3, 30, 32), ("model.network=kl", "3x30x32", "divisible by 4")),
        (SMALL.model_copy(update={"norm_groups": 5}), PICTURE, ("model.norm_groups=5", "8 in model.channels")),
        (SMALL.model_copy(update={"discriminator_layers": 5}), PICTURE, ("model.discriminator_layers=5", "3x32x24")),
    ],
)
def test_what_does_not_fit(model, image, words):
    with pytest.raises(ConfigError) as error:
        build_networks(model, image, seed=0)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_doubling_keeps_the_precision_under_autocast(monkeypatch):
    """Autocast on a GPU would widen the picture, which is four times as large afterwards, for nothing."""
    seen = []

    def interpolate(x, **options):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return original(x, **options)

    original = torch.nn.functional.interpolate
    monkeypatch.setattr("vaegan_dist.models.kl.F.interpolate", interpolate)
    with torch.autocast("cpu", torch.bfloat16):
        Upsampler(4)(torch.zeros(1, 4, 3, 3, dtype=torch.bfloat16))
    assert seen == [(torch.bfloat16, False)]
