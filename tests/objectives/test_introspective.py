"""Soft-IntroVAE: each player's stage has the gradient of its own loss as the paper writes it."""

import pytest
import torch
from test_gradients import BATCH, MODELS, assert_gradients, phase_of, small_problem

from vaegan_dist.config import ObjectiveSection
from vaegan_dist.errors import ConfigError
from vaegan_dist.objectives import build_objective


def error(s, nets, z, target):
    """Reconstruction, summed over the picture, with the weight beta_rec."""
    a, t = nets["decoder"].pre_image(z), (target + 1) / 2
    p = torch.sigmoid(a)
    loss = {
        "bernoulli": lambda: -(t * torch.log(p) + (1 - t) * torch.log(1 - p)),
        "l2": lambda: (2 * p - 1 - target) ** 2 / 2,
        "l1": lambda: (2 * p - 1 - target).abs(),
    }[s.reconstruction]()
    return s.reconstruction_weight * loss.sum(dim=(1, 2, 3))


def encode(nets, x, eps):
    mu, logvar = nets["encoder"].moments(x)
    kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(1)
    return mu + torch.exp(logvar / 2) * eps, kl


def textbook(s, nets, x, noise, player):
    """Daniel & Tamar 2021, equation 5: the loss of one player, fakes being constants for the encoder."""
    scale = s.elbo_scale or 1 / x[0].numel()
    z, kl = encode(nets, x, noise["eps"])
    if player == "encoder":
        loss = scale * (error(s, nets, z, x) + s.beta * kl).mean()
        fakes = {"rec": nets["decoder"](z).detach(), "gen": nets["decoder"](noise["z_prior"]).detach()}
        for name, fake in fakes.items():
            z_fake, kl_fake = encode(nets, fake, noise[f"eps_{name}"])
            bound = error(s, nets, z_fake, fake) + s.beta_neg * kl_fake
            loss = loss + torch.exp(-2 * scale * bound).mean() / 4
    else:
        loss = scale * error(s, nets, z.detach(), x).mean()
        for name, fake in {"rec": nets["decoder"](z.detach()), "gen": nets["decoder"](noise["z_prior"])}.items():
            z_fake, kl_fake = encode(nets, fake, noise[f"eps_{name}"])
            again = error(s, nets, z_fake.detach(), fake.detach())
            loss = loss + scale * (s.beta * kl_fake + s.fake_reconstruction * again).mean() / 2
    parameters = list(nets[player].parameters())
    return list(torch.autograd.grad(loss, parameters))


SETTINGS = {
    "l2": {"reconstruction": "l2", "beta": 0.7, "beta_neg": 3.0, "elbo_scale": 0.01},
    "bernoulli": {"reconstruction_weight": 0.5, "beta_neg": 1.5, "fake_reconstruction": 0.3},
    "l1": {"reconstruction": "l1", "beta_neg": 0.2, "fake_reconstruction": 0.0},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model", ["mlp", "conv", "conv-norm-stem"])
def test_each_stage_has_the_gradient_of_its_own_loss(model, settings):
    settings = ObjectiveSection(**SETTINGS[settings])
    networks, x, draw = small_problem(MODELS[model], scale=1.5)
    objective = build_objective(phase_of("introspective"), settings, networks, batch_size=BATCH)
    noise = draw(objective)
    assert [stage.trained for stage in objective.stages] == [("encoder",), ("decoder",)]
    for player, stage in zip(("encoder", "decoder"), objective.stages, strict=True):
        networks.requires_grad_(True)
        reference = {player: textbook(settings, networks, x, noise, player)}
        stage.focus()
        networks.zero_grad()
        total, terms = stage(x, noise, 0)
        total.backward()
        assert_gradients(networks, (player,), reference)
        assert all(bool(term.isfinite().all()) and not term.requires_grad for term in terms.values())


def test_the_exponentials_lie_between_0_and_1():
    """However far the encoder is off: no overflow, no gradient that is not a number."""
    for scale in (0.1, 30.0):
        networks, x, draw = small_problem(MODELS["mlp"], scale=scale)
        networks.float()
        objective = build_objective(
            phase_of("introspective"), ObjectiveSection(beta_neg=1e4), networks, batch_size=BATCH
        )
        noise = {name: value.float() for name, value in draw(objective).items()}
        stage = objective.stages[0]
        stage.focus()
        total, terms = stage(x.float(), noise, 0)
        total.backward()
        assert all(0 <= float(terms[f"expelbo_{name}"]) <= 1 for name in ("rec", "gen"))
        assert all(bool(p.grad.isfinite().all()) for p in networks["encoder"].parameters())


def test_one_player_alone():
    networks, x, draw = small_problem(MODELS["mlp"])
    objective = build_objective(phase_of("introspective", ("decoder",)), ObjectiveSection(), networks, batch_size=BATCH)
    assert [stage.trained for stage in objective.stages] == [("decoder",)]
    objective.stages[0](x, draw(objective), 0)[0].backward()
    assert all(p.grad is None for p in networks["encoder"].parameters())


def test_nothing_to_reconstruct():
    networks, _, _ = small_problem(MODELS["mlp"])
    with pytest.raises(ConfigError, match="leaves introspective nothing to reconstruct"):
        build_objective(phase_of("introspective"), ObjectiveSection(reconstruction="none"), networks, batch_size=BATCH)
