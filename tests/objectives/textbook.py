"""The textbook step: each network's loss on its own, differentiated on its own. Nothing of the objectives is used.

Kingma & Welling 2014; Goodfellow et al. 2014; Larsen et al. 2016 (equation 9, algorithm 1); Mescheder et al. 2018.
"""

import itertools

import torch
from torch import Tensor, nn

from vaegan_dist.config import ObjectiveSection

Gradients = dict[str, list[Tensor]]


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(torch.zeros_like(x), x)


DISCRIMINATOR_REAL = {
    "minimax": lambda r: softplus(-r),
    "non_saturating": lambda r: softplus(-r),
    "hinge": lambda r: torch.clamp(1 - r, min=0),
    "least_squares": lambda r: (r - 1) ** 2 / 2,
    "wasserstein": lambda r: -r,
}
DISCRIMINATOR_FAKE = {
    "minimax": lambda f: softplus(f),
    "non_saturating": lambda f: softplus(f),
    "hinge": lambda f: torch.clamp(1 + f, min=0),
    "least_squares": lambda f: f**2 / 2,
    "wasserstein": lambda f: f,
}
GENERATOR = {
    "minimax": lambda f, r: -softplus(f),
    "non_saturating": lambda f, r: softplus(-f),
    "hinge": lambda f, r: -f,
    "least_squares": lambda f, r: (f - 1) ** 2 / 2,
    "wasserstein": lambda f, r: -f,
    "relativistic": lambda f, r: softplus(-(f - r)),
}


def reconstruction_loss(s: ObjectiveSection, nets: nn.ModuleDict, z: Tensor, x: Tensor, *, learned: bool) -> Tensor:
    a = nets["decoder"].pre_image(z)
    p, t, x_rec = torch.sigmoid(a), (x + 1) / 2, nets["decoder"](z)
    loss = {
        "bernoulli": lambda: -(t * torch.log(p) + (1 - t) * torch.log(1 - p)),
        "l2": lambda: (x - x_rec) ** 2 / 2,
        "l1": lambda: (x - x_rec).abs(),
        "none": lambda: torch.zeros_like(x),
    }[s.reconstruction]()
    loss = s.reconstruction_weight * loss.sum() / len(x)
    if learned and s.similarity:
        layer = s.similarity_layer % nets["discriminator"].depth
        real, rec = (nets["discriminator"].features(image, layer) for image in (x, x_rec))
        loss = loss + s.similarity * ((real.detach() - rec) ** 2).sum() / 2 / len(x)
    return loss


def encoder_loss(s, nets, x, noise, objective, beta):
    mu, logvar = nets["encoder"].moments(x)
    z = mu + torch.exp(logvar / 2) * noise["eps"]
    kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum() / len(x)
    loss = reconstruction_loss(s, nets, z, x, learned=objective == "vaegan") + beta * kl
    if objective == "vaegan" and s.adversarial_to_encoder:
        d = nets["discriminator"]
        generated = GENERATOR[s.adversarial](d(nets["decoder"](z)), d(x).detach()).mean()
        loss = loss + s.adversarial_weight * generated
    return loss


def _fakes(s, nets, noise, x, objective):
    fakes = [] if s.fakes == "reconstruction" else [nets["decoder"](noise["z_prior"])]
    if objective == "vaegan" and "reconstruction" in s.fakes:
        mu, logvar = nets["encoder"].moments(x)
        z = (mu + torch.exp(logvar / 2) * noise["eps"]).detach()
        fakes.append(nets["decoder"](z))
    return fakes


def decoder_loss(s, nets, x, noise, objective):
    loss = x.new_zeros(())
    if objective != "gan":
        mu, logvar = nets["encoder"].moments(x)
        z = (mu + torch.exp(logvar / 2) * noise["eps"]).detach()
        gamma = s.gamma if objective == "vaegan" else 1.0
        loss = gamma * reconstruction_loss(s, nets, z, x, learned=objective == "vaegan")
    if objective != "vae":
        real = nets["discriminator"](x).detach()
        for fake in _fakes(s, nets, noise, x, objective):
            loss = loss + s.adversarial_weight * GENERATOR[s.adversarial](nets["discriminator"](fake), real).mean()
    return loss


def gradient_norm_squared(d, image):
    image = image.detach().requires_grad_()
    logit_of_an_image = d(image).flatten(1).mean(1) if d.patches else d(image)
    (gradient,) = torch.autograd.grad(logit_of_an_image.sum(), image, create_graph=True)
    return (gradient**2).sum(dim=(1, 2, 3))


def discriminator_loss(s, nets, x, noise, objective, penalise):
    d = nets["discriminator"]
    fakes = [fake.detach() for fake in _fakes(s, nets, noise, x, objective)]
    if s.adversarial == "relativistic":
        loss = sum(softplus(-(d(x) - d(fake))).mean() for fake in fakes)
    else:
        loss = DISCRIMINATOR_REAL[s.adversarial](d(x)).mean()
        loss = loss + sum(DISCRIMINATOR_FAKE[s.adversarial](d(fake)).mean() for fake in fakes)
    if penalise:
        loss = loss + s.penalty_interval * s.r1 / 2 * gradient_norm_squared(d, x).mean()
        for fake in fakes:
            loss = loss + s.penalty_interval * s.r2 / 2 * gradient_norm_squared(d, fake).mean()
    if s.gradient_penalty:
        share = 0.5 * (1 + torch.erf(noise["mix"] / 2**0.5))
        norm = gradient_norm_squared(d, share * x + (1 - share) * fakes[0]).sqrt()
        loss = loss + s.gradient_penalty * ((norm - 1) ** 2).mean()
    return loss


def textbook_gradients(
    objective: str,
    s: ObjectiveSection,
    nets: nn.ModuleDict,
    x: Tensor,
    noise: dict[str, Tensor],
    *,
    penalise: bool = True,
    beta: float | None = None,
) -> Gradients:
    """Gradients of every network that the objective trains."""
    requires = [p.requires_grad for p in nets.parameters()]
    nets.requires_grad_(True)
    losses = {}
    if objective != "gan":
        losses["encoder"] = encoder_loss(s, nets, x, noise, objective, s.beta if beta is None else beta)
    losses["decoder"] = decoder_loss(s, nets, x, noise, objective)
    if objective != "vae":
        losses["discriminator"] = discriminator_loss(s, nets, x, noise, objective, penalise)
    gradients = {}
    for name, loss in losses.items():
        parameters = list(nets[name].parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients[name] = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    for parameter, required in itertools.zip_longest(nets.parameters(), requires):
        parameter.requires_grad_(required)
    return gradients
