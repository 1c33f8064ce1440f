"""Layers against torch's own or plain formulas, and what they remember from step to step."""

import copy

import pytest
import torch
from torch import nn

from vaegan_dist.config import ConvModel, KlModel, MlpModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import ImageShape, build_networks
from vaegan_dist.models.batch_norm import BranchNorm
from vaegan_dist.models.layers import MinibatchStd, SelfAttention, draw_weights
from vaegan_dist.models.spectral import SpectralConv2d, SpectralConvTranspose2d, SpectralLinear
from vaegan_dist.models.stateful import stateful_layers

NO_SKIP, SKIP = torch.zeros(()), torch.ones(())
SPECTRAL = {
    "linear": (lambda: SpectralLinear(7, 5), lambda w: w),
    "conv": (lambda: SpectralConv2d(3, 6, 3, padding=1), lambda w: w.reshape(6, -1)),
    "transposed": (
        lambda: SpectralConvTranspose2d(3, 6, 3, stride=2, padding=1, output_padding=1),
        lambda w: w.transpose(0, 1).reshape(6, -1),
    ),
}


def drawn(layer, seed=0):
    draw_weights(layer, torch.Generator().manual_seed(seed))
    return layer.double()


@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_norm_is_the_largest_singular_value(kind):
    """After enough power iterations; and the gradient is that of weight / its largest singular value."""
    make, matrix = SPECTRAL[kind]
    layer = drawn(make())
    for _ in range(500):
        layer.advance(NO_SKIP)
    largest = torch.linalg.matrix_norm(matrix(layer.weight), 2)
    torch.testing.assert_close(layer.normalised(), layer.weight / largest, rtol=1e-10, atol=0)
    towards = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own, reference = (
        torch.autograd.grad((towards * weight).sum(), layer.weight)[0]
        for weight in (layer.normalised(), layer.weight / torch.linalg.matrix_norm(matrix(layer.weight), 2))
    )
    torch.testing.assert_close(own, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", SPECTRAL)
def test_one_power_iteration_is_that_of_torch(kind):
    make, _ = SPECTRAL[kind]
    layer = drawn(make())
    plain = nn.Linear(7, 5) if kind == "linear" else copy.deepcopy(layer)
    plain.weight = nn.Parameter(layer.weight.detach().clone())
    theirs = torch.nn.utils.parametrizations.spectral_norm(plain.double(), dim=layer.output_dim)
    parametrization = theirs.parametrizations.weight[0]
    # torch goes on from its right vector; ours is always that of the left one
    parametrization._v.copy_(nn.functional.normalize(layer.matrix().T.detach() @ layer.u, dim=0))
    before = layer.u.clone()
    layer.advance(SKIP)
    assert torch.equal(layer.u, before), "a skipped step moves nothing"
    layer.advance(NO_SKIP)
    theirs.train()
    _ = theirs.weight  # torch moves its vectors when the weight is asked for
    torch.testing.assert_close(layer.u, parametrization._u, rtol=1e-9, atol=1e-12)


def test_spectral_vectors_come_from_the_seed_and_pass_through_the_state_dict():
    model = MlpModel(discriminator_norm="spectral")
    before = torch.random.get_rng_state()
    one, same, other = (build_networks(model, ImageShape(1, 8, 8), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"
    key = "discriminator.head.u"
    assert torch.equal(one.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(one.state_dict()["discriminator.layers.0.u"], other.state_dict()["discriminator.layers.0.u"])
    for layer in stateful_layers(one["discriminator"]):
        layer.advance(NO_SKIP)
    other.load_state_dict(one.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(one["discriminator"](x), other["discriminator"](x))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4, 3)])
def test_batch_norm_is_torchs(shape):
    own = drawn(BranchNorm(5))
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5).double()
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 2).requires_grad_()
    towards = torch.randn(shape, generator=generator, dtype=torch.float64)
    results = [layer(x) for layer in (own, theirs)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((result * towards).sum(), x)[0] for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    own.advance(NO_SKIP)
    torch.testing.assert_close(own.running_mean, theirs.running_mean)
    # torch corrects the variance for the sample's size, and has no other word for it
    count = x.numel() // 5
    torch.testing.assert_close(own.running_var - 0.9, (theirs.running_var - 0.9) * (count - 1) / count)
    own.eval()
    expected = nn.functional.batch_norm(x, own.running_mean, own.running_var, eps=1e-5)
    torch.testing.assert_close(own(x), expected)


def test_batch_norm_remembers_branches_of_steps_that_count():
    layer = drawn(BranchNorm(2))
    pictures = [torch.full((4, 2), value, dtype=torch.float64) for value in (1.0, 3.0)]
    for x in pictures:
        layer(x)
    layer.advance(SKIP)
    assert bool((layer.running_mean == 0).all())
    with torch.no_grad():
        layer(pictures[0])  # a pass that trains nothing
    layer.requires_grad_(False)
    layer(pictures[0])  # nor does one through a frozen network
    layer.advance(NO_SKIP)
    assert bool((layer.running_mean == 0).all())
    layer.requires_grad_(True)
    for x in pictures:
        layer(x)
    layer.advance(NO_SKIP)
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 0.9 * 0.1 + 0.3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 4, 2)])
def test_minibatch_std_is_torchs_deviation(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = MinibatchStd(4)(x)
    assert result.shape == (8, shape[1] + 1, *shape[2:]) and torch.equal(result[:, :-1], x)
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        deviation = (x[rows].var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(result[rows, -1], deviation.expand_as(result[rows, -1]))


def test_self_attention_position_by_position():
    layer = drawn(SelfAttention(8, "none"))
    x = torch.randn(2, 8, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(layer(x), x), "it begins as the identity"
    with torch.no_grad():
        layer.gain.fill_(0.5)
    made = layer(x)
    for image in range(2):
        flat = x[image].flatten(1)
        query, key, value = (
            part.weight[:, :, 0, 0] @ flat + part.bias[:, None] for part in (layer.query, layer.key, layer.value)
        )
        attended = torch.zeros(8, 6, dtype=torch.float64)
        for here in range(6):
            scores = torch.stack([query[:, here] @ key[:, there] for there in range(6)]).exp()
            for there in range(6):
                attended[:, here] += scores[there] / scores.sum() * value[:, there]
        out = layer.out.weight[:, :, 0, 0] @ attended + layer.out.bias[:, None]
        torch.testing.assert_close(made[image].flatten(1), flat + 0.5 * out, rtol=1e-10, atol=1e-12)


KEYS = {"channels": (4, 6), "discriminator_channels": (4, 6), "hidden": 8, "discriminator_hidden": 5}
VARIANTS = {
    "spectral": (ConvModel(**KEYS, norm="spectral", discriminator_norm="spectral"), ImageShape(3, 16, 8)),
    "batch": (ConvModel(**KEYS, norm="batch", discriminator_norm="batch"), ImageShape(3, 16, 8)),
    "attention": (ConvModel(**KEYS, attention=(8, 4)), ImageShape(3, 16, 8)),
    "residual": (ConvModel(**KEYS, discriminator="residual", minibatch_std=2), ImageShape(3, 16, 8)),
    "residual-norm": (ConvModel(**KEYS, discriminator="residual", discriminator_norm="group"), ImageShape(3, 16, 8)),
    "kl-residual": (
        KlModel(channels=(4, 4), norm_groups=2, discriminator="residual", discriminator_channels=4, minibatch_std=2),
        ImageShape(3, 16, 8),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_the_contract(name):
    model, image = VARIANTS[name]
    networks = build_networks(model, image, seed=0).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, image.height, image.width, generator=generator, dtype=torch.float64) * 2 - 1
    discriminator = networks["discriminator"]
    for layer in range(discriminator.depth):
        logits, features = discriminator.logits_and_features(x, layer)
        assert logits.shape == (4,)
        torch.testing.assert_close(features, discriminator.features(x, layer))
        assert bool((features < 0).any())
    changed = torch.cat([x[:1], -x[1:]])
    same = torch.allclose(discriminator(x)[0], discriminator(changed)[0], rtol=1e-10, atol=0)
    assert same == discriminator.independent
    assert networks["decoder"](networks["encoder"](x).mu).shape == x.shape
    assert bool(networks.eval()["discriminator"](x).isfinite().all())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (ConvModel(attention=(5,)), ("model.attention=5", "28, 14, 7")),
        (ConvModel(discriminator="residual", discriminator_channels=(4, 4, 4)), ("model.discriminator=residual", "3")),
        (KlModel(channels=(4,), norm_groups=2, minibatch_std=4), ("model.minibatch_std=4", "residual")),
    ],
)
def test_options_that_do_not_fit(model, words):
    with pytest.raises(ConfigError) as error:
        build_networks(model, ImageShape(1, 28, 28), seed=0)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_minibatch_deviation_of_a_half_precision():
    """Statistics in float32: in bfloat16 the small differences of a group would be lost beside its mean."""
    x = (100 + torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))).bfloat16()
    spread = MinibatchStd(4)(x)
    assert spread.dtype == torch.bfloat16 and torch.equal(spread[:, :3], x)
    torch.testing.assert_close(spread[:, 3], MinibatchStd(4)(x.float())[:, 3].bfloat16())
