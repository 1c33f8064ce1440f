"""The latent-diffusion autoencoder's recipe as settings of vaegan, against its losses written down directly."""

import pytest
import torch
from test_gradients import ADVERSARIAL, BATCH, IMAGE, PENALTIES, assert_gradients, phase_of, run
from textbook import GENERATOR, discriminator_loss, textbook_gradients
from torch import nn

from vaegan_dist.config import ConvModel, KlModel, MlpModel, ObjectiveSection
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import build_networks
from vaegan_dist.objectives import build_objective

KL = KlModel(
    latent_channels=2,
    channels=(4, 6),
    layers_per_block=1,
    norm_groups=2,
    discriminator_channels=4,
    discriminator_layers=1,
)
MODELS = {
    "kl": KL,
    "mlp": MlpModel(latent_dim=3, hidden=(9,), discriminator_hidden=(8,), minibatch_std=2),
    "conv": ConvModel(latent_dim=3, channels=(4,), hidden=8, discriminator_channels=(4,), discriminator_hidden=5),
}
RECIPE = {
    "reconstruction": "l1",
    "beta": 1e-3,
    "adversarial": "hinge",
    "adversarial_weight": 0.5,
    "fakes": "reconstruction",
    "adversarial_to_encoder": True,
    "adaptive_weight": True,
    "perceptual_weight": 0.3,
    "perceptual_network": f"{__name__}:features",
}


class Features(nn.Module):
    """Two layers of a fixed network."""

    def __init__(self, channels=2):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 4, 3, stride=2), nn.Conv2d(4, 5, 2)
        generator = torch.Generator().manual_seed(7)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x):
        first = self.first(x).tanh()
        return first, self.second(first)


def features():
    return Features()


def problem(model):
    networks = build_networks(model, IMAGE, seed=0).double()
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.mul_(1.7)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, 2, 8, 8, generator=generator, dtype=torch.float64) * 1.8 - 0.9

    def draw(step):
        shapes = step.noise_shapes(BATCH).items()
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes}

    return networks, x, draw


def perceptual(x_rec, x):
    total = 0
    for one, other in zip(Features().double()(x_rec), Features().double()(x), strict=True):
        one, other = (f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt() for f in (one, other))
        total = total + ((one - other) ** 2).sum(1).mean(dim=(1, 2))
    return total * x[0].numel()


def autoencoder_gradients(s, nets, x, noise, last_layer):
    """One loss for encoder and decoder, its adversarial part with the weight of Esser et al. 2021, equation 7."""
    mu, logvar = nets["encoder"].moments(x)
    x_rec = nets["decoder"](mu + torch.exp(logvar / 2) * noise["eps"])
    rec = ((x - x_rec).abs().sum(dim=(1, 2, 3)) + s.perceptual_weight * perceptual(x_rec, x)).mean()
    kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum() / len(x)
    adversarial = GENERATOR[s.adversarial](nets["discriminator"](x_rec), nets["discriminator"](x).detach()).mean()
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (rec, adversarial)]
    weight = torch.clamp(norms[0] / (norms[1] + 1e-4), 0, s.adaptive_weight_max)
    loss = rec + s.beta * kl + weight * s.adversarial_weight * adversarial
    both = {name: list(nets[name].parameters()) for name in ("encoder", "decoder")}
    return {name: list(torch.autograd.grad(loss, own, retain_graph=True)) for name, own in both.items()}, weight


@pytest.mark.parametrize("largest", [1e4, 0.05])
@pytest.mark.parametrize("adversarial", ["hinge", "non_saturating", "relativistic"])
@pytest.mark.parametrize("model", MODELS)
def test_the_recipe(model, adversarial, largest):
    settings = ObjectiveSection(**RECIPE | {"adversarial": adversarial, "adaptive_weight_max": largest, "r1": 0.4})
    networks, x, draw = problem(MODELS[model])
    last = networks["decoder"].conv_out.weight if model == "kl" else networks["decoder"].head.weight
    step = build_objective(phase_of("vaegan"), settings, networks, batch_size=BATCH)
    noise = draw(step)
    assert set(noise) == {"eps"}, "nothing is generated from the prior"
    reference, weight = autoencoder_gradients(settings, networks, x, noise, last)
    loss = discriminator_loss(settings, networks, x, noise | {"z_prior": noise["eps"]}, "vaegan", True)
    reference["discriminator"] = list(torch.autograd.grad(loss, list(networks["discriminator"].parameters())))
    terms = run(step, x, noise)
    assert_gradients(networks, step.trained, reference)
    torch.testing.assert_close(terms["adaptive_weight"], weight, rtol=1e-10, atol=0)


def test_before_the_start_the_game_trains_nothing():
    settings = ObjectiveSection(**RECIPE, adversarial_start_images=100, r1=0.4)
    networks, x, draw = problem(KL)
    step = build_objective(phase_of("vaegan"), settings, networks, batch_size=BATCH)
    noise = draw(step)
    plain = ObjectiveSection(
        **{key: value for key, value in RECIPE.items() if "perceptual" in key or key in ("reconstruction", "beta")}
    )
    step(x, noise, 96)[0].backward()
    before = {name: [p.grad.clone() for p in networks[name].parameters()] for name in step.trained}
    assert all(not bool(gradient.any()) for gradient in before["discriminator"])
    alone = build_objective(phase_of("vae"), plain, networks, batch_size=BATCH)
    run(alone, x, noise)
    assert_gradients(networks, ("encoder", "decoder"), before)
    again = build_objective(phase_of("vaegan"), settings, networks, batch_size=BATCH)
    again(x, noise, 100)[0].backward()
    assert all(bool(p.grad.any()) for p in networks["discriminator"].parameters())


@pytest.mark.parametrize("fakes", ["prior", "prior+reconstruction", "reconstruction"])
def test_patches_with_every_loss_and_penalty(fakes):
    """A logit per patch: losses are the mean over patches, penalties take the mean logit."""
    for adversarial in ADVERSARIAL:
        for penalty in PENALTIES.values():
            settings = ObjectiveSection(
                reconstruction="l2", gamma=0.3, similarity=0.5, adversarial=adversarial, fakes=fakes, **penalty
            )
            networks, x, draw = problem(KL)
            step = build_objective(phase_of("vaegan"), settings, networks, batch_size=BATCH)
            noise = draw(step)
            run(step, x, noise)
            full = {"z_prior": noise["eps"], "mix": torch.zeros(BATCH, 1, 1, 1, dtype=torch.float64)} | noise
            assert_gradients(networks, step.trained, textbook_gradients("vaegan", settings, networks, x, full))


def test_the_perceptual_term_trains_and_its_network_does_not():
    keys = {
        "reconstruction": "none",
        "beta": 0.0,
        "perceptual_weight": 1.0,
        "perceptual_network": f"{__name__}:features",
    }
    networks, x, draw = problem(KL)
    step = build_objective(phase_of("vae"), ObjectiveSection(**keys), networks, batch_size=BATCH)
    run(step, x, draw(step))
    assert all(bool(p.grad.any()) for p in networks["decoder"].parameters() if p.dim() == 4)
    assert all(p.grad is None and not p.requires_grad for p in step.perceptual.parameters())


def test_a_torchscript_file_is_a_feature_network(tmp_path):
    path = tmp_path / "features.pt"
    torch.jit.save(torch.jit.trace(Features().double(), torch.zeros(1, 2, 8, 8, dtype=torch.float64)), str(path))
    networks, x, _ = problem(KL)
    both = []
    for source in (str(path), f"{__name__}:features"):
        keys = {"reconstruction": "none", "perceptual_weight": 1.0, "perceptual_network": source}
        step = build_objective(phase_of("vae"), ObjectiveSection(**keys), networks, batch_size=BATCH)
        both.append(step.perceptual(x, x.flip(0)))
    torch.testing.assert_close(*both)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"perceptual_weight": 1.0}, "objective.perceptual_weight=1 needs objective.perceptual_network"),
        ({"perceptual_weight": 1.0, "perceptual_network": "absent.pt"}, "absent.pt: no such file"),
        ({"perceptual_weight": 1.0, "perceptual_network": "no_such_module:f"}, "no_such_module"),
        ({"perceptual_weight": 1.0, "perceptual_network": "math:nothing"}, "nothing"),
        ({"reconstruction": "bernoulli"}, "bernoulli needs a decoder that gives probabilities"),
    ],
)
def test_what_cannot_be(keys, named):
    networks, _, _ = problem(KL)
    for objective in ("vae", "vaegan"):
        with pytest.raises(ConfigError, match=named) as error:
            build_objective(
                phase_of(objective), ObjectiveSection(**{"reconstruction": "l1"} | keys), networks, batch_size=BATCH
            )
        assert "\n" not in str(error.value)


def test_a_file_that_is_not_torchscript(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"no archive")
    networks, _, _ = problem(KL)
    settings = ObjectiveSection(
        reconstruction="l1", perceptual_weight=1.0, perceptual_network=str(tmp_path / "weights.pt")
    )
    with pytest.raises(ConfigError, match="not a TorchScript file"):
        build_objective(phase_of("vae"), settings, networks, batch_size=BATCH)
