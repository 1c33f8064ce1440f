"""One backward pass of an objective gives every network the gradient of its own textbook loss."""

import itertools

import pytest
import torch
from textbook import textbook_gradients

from vaegan_dist.config import NETWORK_NAMES, ConvModel, MlpModel, ObjectiveSection, Phase
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import ImageShape, build_networks
from vaegan_dist.models.layers import SelfAttention
from vaegan_dist.objectives import build_objective

BATCH = 4
IMAGE = ImageShape(2, 8, 8)
TOLERANCE = 1e-10

CONV = {"latent_dim": 3, "channels": (4, 6), "hidden": 8, "discriminator_channels": (4, 6), "discriminator_hidden": 5}
MODELS = {
    "mlp": MlpModel(latent_dim=3, hidden=(9, 7), discriminator_hidden=(8, 6)),
    "mlp-minibatch-std": MlpModel(latent_dim=3, hidden=(9,), discriminator_hidden=(8,), minibatch_std=2),
    "conv": ConvModel(**CONV, kernel_size=3, norm="none"),
    "conv-norm-stem": ConvModel(**CONV, discriminator_stem=3, discriminator_norm="group"),
    "conv-minibatch-std": ConvModel(**CONV, kernel_size=3, minibatch_std=4),
    "mlp-spectral": MlpModel(latent_dim=3, hidden=(9,), discriminator_hidden=(8, 6), discriminator_norm="spectral"),
    "conv-spectral": ConvModel(**CONV, kernel_size=3, norm="spectral", discriminator_norm="spectral"),
    "conv-batch": ConvModel(**CONV, kernel_size=3, norm="batch", discriminator_norm="batch"),
    "conv-attention": ConvModel(**CONV, kernel_size=3, norm="none", attention=(4, 2)),
    "conv-residual": ConvModel(**CONV, kernel_size=3, norm="none", discriminator="residual", minibatch_std=2),
}
# The grid of penalties and routes is tested on these; the others differ in their networks only.
WHOLE_GRID = ("mlp", "mlp-minibatch-std")
ROUTES = {
    "gan": ("gan", {"adversarial_weight": 0.7}),
    "pixel": ("vaegan", {"reconstruction": "bernoulli", "beta": 0.3}),
    "pixel-gamma": ("vaegan", {"reconstruction": "l2", "gamma": 0.2, "reconstruction_weight": 1.7}),
    "gamma-zero": ("vaegan", {"reconstruction": "l1", "gamma": 0.0}),
    "larsen-code": ("vaegan", {"reconstruction": "none", "similarity": 1.3, "gamma": 0.01}),
    "larsen-paper": (
        "vaegan",
        {"reconstruction": "none", "similarity": 1.3, "gamma": 0.2, "fakes": "prior+reconstruction"},
    ),
    "both-terms": ("vaegan", {"similarity": 0.5, "similarity_layer": 0, "gamma": 0.4, "fakes": "prior+reconstruction"}),
    "to-encoder": (
        "vaegan",
        {"similarity": 0.5, "fakes": "prior+reconstruction", "adversarial_to_encoder": True, "adversarial_weight": 0.6},
    ),
    "to-encoder-gamma": (
        "vaegan",
        {"similarity": 0.5, "gamma": 0.3, "fakes": "prior+reconstruction", "adversarial_to_encoder": True},
    ),
}
ADVERSARIAL = ("minimax", "non_saturating", "hinge", "least_squares", "wasserstein", "relativistic")
PENALTIES = {
    "none": {},
    "r1": {"r1": 0.8},
    "r2": {"r2": 1.2},
    "lazy": {"r1": 0.8, "r2": 1.2, "penalty_interval": 4},
    "gradient_penalty": {"gradient_penalty": 10.0},
}


def small_problem(model, *, seed=0, scale=3.0):
    """Networks in float64 with weights large enough that no gradient is trivially small, pictures, what draws noise."""
    networks = build_networks(model, IMAGE, seed=seed).double()
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.mul_(scale**0.5)
        for module in networks.modules():
            if isinstance(module, SelfAttention):
                module.gain.fill_(0.7)  # it begins at 0, which would hide the rest of the layer
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(BATCH, 2, 8, 8, generator=generator, dtype=torch.float64) * 1.8 - 0.9

    def draw(objective):
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in objective.noise_shapes(BATCH).items()
        }

    return networks, x, draw


def loss_and_penalty(model):
    """Every pair on the quick networks; on the slow ones every loss and every penalty."""
    if model in WHOLE_GRID:
        return itertools.product(ADVERSARIAL, PENALTIES)
    return zip(ADVERSARIAL, itertools.cycle(PENALTIES), strict=False)


def phase_of(objective, train=None):
    return Phase(name="p", objective=objective, images=1000, train=train)


def assert_gradients(networks, trained, reference):
    """Each parameter to TOLERANCE of its own reference, or of what its network's gradient can resolve in float64."""
    for name in NETWORK_NAMES:
        if name not in trained:
            assert all(p.grad is None for p in networks[name].parameters()), f"{name} is frozen and has a gradient"
            continue
        floor = 1e-14 * max(float(g.abs().max()) for g in reference[name]) + 1e-17
        for (key, parameter), expected in zip(networks[name].named_parameters(), reference[name], strict=True):
            assert parameter.grad is not None, f"{name}.{key} has no gradient"
            error = float((parameter.grad - expected).abs().max())
            assert error <= TOLERANCE * float(expected.abs().max()) + floor, f"{name}.{key}: off by {error}"


def check(model, objective, settings, *, train=None, images_seen=0, prepare=None, anchors=None):
    networks, x, draw = small_problem(MODELS[model])
    if prepare:
        prepare(networks)
    step = build_objective(phase_of(objective, train), settings, networks, batch_size=BATCH)
    if anchors:
        state = torch.tensor([*anchors, 1.0], dtype=torch.float64)
        step.memory["lecam"].copy_(0.3 * state)
    noise = draw(step)
    total, terms = step(x, noise, images_seen)
    total.backward()
    full = {"eps": (BATCH, 3), "z_prior": (BATCH, 3), "mix": (BATCH, 1, 1, 1)}
    noise |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in full.items() if name not in noise}
    penalise = images_seen // BATCH % settings.penalty_interval == 0
    reference = textbook_gradients(objective, settings, networks, x, noise, penalise=penalise, anchors=anchors)
    assert_gradients(networks, step.trained, reference)
    assert terms.pop("latent", torch.zeros(3, step.latent_units)).shape == (3, step.latent_units)
    assert tuple(terms) == step.term_names
    assert all(term.dim() == 0 and not term.requires_grad and bool(term.isfinite()) for term in terms.values())
    return terms


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model", MODELS)
def test_every_loss_and_penalty(model, route):
    objective, keys = ROUTES[route]
    for adversarial, penalty in loss_and_penalty(model):
        settings = ObjectiveSection(adversarial=adversarial, **keys, **PENALTIES[penalty])
        try:
            check(model, objective, settings)
        except AssertionError as error:
            raise AssertionError(f"{adversarial}, {penalty}: {error}") from error


@pytest.mark.parametrize("policy", [("color",), ("translation",), ("cutout",), ("color", "translation", "cutout")])
@pytest.mark.parametrize("model", ["mlp", "conv-norm-stem", "conv-minibatch-std"])
def test_altered_pictures(model, policy):
    """Gradients pass the alterations to both players, also where penalties differentiate through them twice."""
    for (objective, keys), penalty in itertools.product(ROUTES.values(), ("none", "lazy", "gradient_penalty")):
        settings = ObjectiveSection(diff_augment=policy, **keys, **PENALTIES[penalty])
        check(model, objective, settings)


@pytest.mark.parametrize("anchors", [None, (0.4, -0.7)])
@pytest.mark.parametrize("route", ["gan", "larsen-paper"])
@pytest.mark.parametrize("model", ["mlp", "conv-minibatch-std"])
def test_lecam(model, route, anchors):
    objective, keys = ROUTES[route]
    for adversarial in ADVERSARIAL:
        terms = check(model, objective, ObjectiveSection(lecam=0.3, adversarial=adversarial, **keys), anchors=anchors)
        assert bool(terms["penalty_lecam"] > 0) == (anchors is not None)


@pytest.mark.parametrize("kind", ["bernoulli", "l2", "l1"])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_vae(model, kind):
    for train in (None, ("encoder",), ("decoder",)):
        check(model, "vae", ObjectiveSection(reconstruction=kind, beta=0.4, gamma=0.1, similarity=1.0), train=train)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model", ["mlp", "conv-minibatch-std"])
def test_any_part_may_be_frozen(model, route):
    objective, keys = ROUTES[route]
    trainable = ("decoder", "discriminator") if objective == "gan" else NETWORK_NAMES
    settings = ObjectiveSection(**keys, r1=0.5)
    for count in range(1, len(trainable)):
        for train in itertools.combinations(trainable, count):
            check(model, objective, settings, train=train)


@pytest.mark.parametrize("bias", [-40.0, 40.0, -0.5])
@pytest.mark.parametrize("adversarial", ADVERSARIAL)
def test_confident_discriminator(adversarial, bias):
    """The seed that serves both players loses neither, however far apart their derivatives are."""

    def make_confident(networks):
        with torch.no_grad():
            networks["discriminator"].head.bias.fill_(bias)

    for model, (objective, keys) in itertools.product(
        ("mlp", "conv-norm-stem"), (ROUTES["gan"], ROUTES["larsen-paper"])
    ):
        check(model, objective, ObjectiveSection(adversarial=adversarial, **keys), prepare=make_confident)


def test_lazy_penalty_between_its_steps():
    settings = ObjectiveSection(r1=0.8, r2=0.4, penalty_interval=4)
    on, off = (check("conv", "vaegan", settings, images_seen=images) for images in (4 * BATCH, 5 * BATCH))
    assert on["penalty_r1"] > 0 and on["penalty_r2"] > 0
    assert off["penalty_r1"] == 0 and off["penalty_r2"] == 0


@pytest.mark.parametrize("adversarial", ADVERSARIAL)
def test_sign(adversarial):
    """A small step of the decoder along its gradient raises the discriminator's score of generated pictures."""
    for model in ("mlp", "conv", "conv-minibatch-std"):
        networks, x, draw = small_problem(MODELS[model], seed=1)
        step = build_objective(phase_of("gan"), ObjectiveSection(adversarial=adversarial), networks, batch_size=BATCH)
        noise = draw(step)
        step(x, noise, 0)[0].backward()
        with torch.no_grad():
            before = networks["discriminator"](networks["decoder"](noise["z_prior"])).mean()
            norm = sum(p.grad.square().sum() for p in networks["decoder"].parameters()).sqrt()
            for parameter in networks["decoder"].parameters():
                parameter -= 1e-4 / norm * parameter.grad
            after = networks["discriminator"](networks["decoder"](noise["z_prior"])).mean()
        assert after > before


def test_a_batch_is_the_mean_of_its_halves():
    """What data parallelism and gradient accumulation rely on; minibatch groups lie inside a half."""
    for model in ("mlp", "mlp-minibatch-std", "conv-norm-stem"):
        settings = ObjectiveSection(similarity=1.0, gamma=0.3, r1=0.4, free_bits=0.1, capacity=2.0)
        networks, x, draw = small_problem(MODELS[model])
        step = build_objective(phase_of("vaegan"), settings, networks, batch_size=BATCH)
        noise = draw(step)
        whole_terms = run(step, x, noise)
        whole = {name: [p.grad for p in network.parameters()] for name, network in networks.items()}
        networks.zero_grad()
        halves = [run(step, x[rows], {k: v[rows] for k, v in noise.items()}) for rows in (slice(0, 2), slice(2, 4))]
        for parameter in networks.parameters():
            parameter.grad /= 2
        assert_gradients(networks, NETWORK_NAMES, whole)
        for name, value in whole_terms.items():
            torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, rtol=1e-10, atol=1e-13)


def run(step, x, noise):
    total, terms = step(x, noise, 0)
    total.backward()
    return terms


@pytest.mark.parametrize(
    ("keys", "train", "objective", "named"),
    [
        ({"reconstruction": "none"}, None, "vae", "phases.p.settings.reconstruction=none"),
        ({"reconstruction": "none"}, None, "vaegan", "phases.p.settings"),
        ({"fakes": "prior+reconstruction"}, None, "gan", "phases.p.settings.fakes"),
        ({"adversarial_to_encoder": True}, None, "vaegan", "adversarial_to_encoder"),
        ({"similarity": 1.0, "similarity_layer": 2}, None, "vaegan", "objective.similarity_layer=2"),
        ({}, ("discriminator",), "vae", "phases.p.train=discriminator"),
        ({}, ("encoder",), "gan", "phases.p.train=encoder"),
        ({"equilibrium": 0.68, "adversarial": "hinge"}, None, "vaegan", "phases.p.settings.equilibrium=0.68"),
    ],
)
def test_settings_that_cannot_work_together(keys, train, objective, named):
    networks, _, _ = small_problem(MODELS["mlp"])
    with pytest.raises(ConfigError, match=named.replace("+", r"\+")) as error:
        build_objective(phase_of(objective, train), ObjectiveSection(**keys), networks, batch_size=BATCH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("route", ["gan", "pixel-gamma", "larsen-paper", "to-encoder-gamma"])
@pytest.mark.parametrize("model", ["mlp", "conv-norm-stem", "conv-minibatch-std"])
def test_half_precision_points_the_same_way(model, route):
    """Under bfloat16 autocast, boundaries and seeds keep every network's gradient close to the exact one."""
    objective, keys = ROUTES[route]
    networks, x, draw = small_problem(MODELS[model])
    step = build_objective(phase_of(objective), ObjectiveSection(**keys, r1=0.5), networks, batch_size=BATCH)
    noise = draw(step)
    run(step, x, noise)
    exact = {name: [p.grad.clone() for p in networks[name].parameters()] for name in step.trained}
    networks.zero_grad()
    networks.float()
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = step(x.float(), {name: value.float() for name, value in noise.items()}, 0)
    total.backward()
    assert all(term.dtype == torch.float32 for term in terms.values())
    for name, gradients in exact.items():
        rough = torch.cat([p.grad.double().flatten() for p in networks[name].parameters()])
        reference = torch.cat([gradient.flatten() for gradient in gradients])
        assert torch.cosine_similarity(rough, reference, dim=0) > 0.95, name
