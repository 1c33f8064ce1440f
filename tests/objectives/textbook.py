"""The textbook step: each network's loss on its own, differentiated on its own. Nothing of the objectives is used.

Kingma & Welling 2014; Goodfellow et al. 2014; Larsen et al. 2016 (equation 9, algorithm 1); Mescheder et al. 2018;
Zhao et al. 2020; Tseng et al. 2021.
"""

import itertools

import torch
from torch import Tensor, nn

from vaegan_dist.config import ObjectiveSection

Gradients = dict[str, list[Tensor]]


def altered(policy, normal: Tensor | None, x: Tensor) -> Tensor:
    """DiffAugment (Zhao et al. 2020), picture by picture: `normal` has 7 standard normal numbers for each."""
    if not policy:
        return x
    shares = 0.5 * (1 + torch.erf(normal / 2**0.5))
    return torch.stack([_altered(policy, numbers.tolist(), image) for numbers, image in zip(shares, x, strict=True)])


def _altered(policy, u: list[float], image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    if "color" in policy:
        image = image + u[0] - 0.5
        grey = image.sum(0) / len(image)
        image = torch.stack([grey + 2 * u[1] * (channel - grey) for channel in image])
        image = image.mean() + (0.5 + u[2]) * (image - image.mean())
    if "translation" in policy:
        shifts = [
            int(u[3 + i] * (2 * int(size / 8 + 0.5) + 1)) - int(size / 8 + 0.5)
            for i, size in enumerate((height, width))
        ]
        image = torch.roll(image, shifts, (1, 2))
        rows = torch.tensor([0 <= row - shifts[0] < height for row in range(height)])
        columns = torch.tensor([0 <= column - shifts[1] < width for column in range(width)])
        image = image * rows[:, None] * columns
    if "cutout" in policy:
        keep = torch.ones(height, width, dtype=image.dtype)
        sides = [int(size / 2 + 0.5) for size in (height, width)]
        first = [int(u[5 + i] * (size + 1 - sides[i] % 2)) - sides[i] // 2 for i, size in enumerate((height, width))]
        keep[max(first[0], 0) : first[0] + sides[0], max(first[1], 0) : first[1] + sides[1]] = 0
        image = image * keep
    return image


class Seen:
    """The discriminator, and what it is shown of real (and reconstructed) and of generated pictures."""

    def __init__(self, s, nets, noise):
        self.s, self.net, self.noise = s, nets["discriminator"], noise
        self.patches, self.depth = self.net.patches, self.net.depth

    def altered(self, x, kind):
        return altered(self.s.diff_augment, self.noise.get(f"augment_{kind}"), x)

    def __call__(self, x, kind="real"):
        return self.net(self.altered(x, kind))

    def features(self, x, layer):
        return self.net.features(self.altered(x, "real"), layer)


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


def reconstruction_loss(
    s: ObjectiveSection, nets: nn.ModuleDict, d: Seen, z: Tensor, x: Tensor, *, learned: bool
) -> Tensor:
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
        layer = s.similarity_layer % d.depth
        real, rec = (d.features(image, layer) for image in (x, x_rec))
        loss = loss + s.similarity * ((real.detach() - rec) ** 2).sum() / 2 / len(x)
    return loss


def encoder_loss(s, nets, x, noise, objective, beta):
    mu, logvar = nets["encoder"].moments(x)
    z = mu + torch.exp(logvar / 2) * noise["eps"]
    kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum() / len(x)
    d = Seen(s, nets, noise)
    loss = reconstruction_loss(s, nets, d, z, x, learned=objective == "vaegan") + beta * kl
    if objective == "vaegan" and s.adversarial_to_encoder:
        generated = GENERATOR[s.adversarial](d(nets["decoder"](z)), d(x).detach()).mean()
        loss = loss + s.adversarial_weight * generated
    return loss


def _fakes(s, nets, noise, x, objective):
    fakes = {} if s.fakes == "reconstruction" else {"gen": nets["decoder"](noise["z_prior"])}
    if objective == "vaegan" and "reconstruction" in s.fakes:
        mu, logvar = nets["encoder"].moments(x)
        z = (mu + torch.exp(logvar / 2) * noise["eps"]).detach()
        fakes["real"] = nets["decoder"](z)  # altered as their real pictures are
    return fakes


def decoder_loss(s, nets, x, noise, objective):
    loss, d = x.new_zeros(()), Seen(s, nets, noise)
    if objective != "gan":
        mu, logvar = nets["encoder"].moments(x)
        z = (mu + torch.exp(logvar / 2) * noise["eps"]).detach()
        gamma = s.gamma if objective == "vaegan" else 1.0
        loss = gamma * reconstruction_loss(s, nets, d, z, x, learned=objective == "vaegan")
    if objective != "vae":
        real = d(x).detach()
        for kind, fake in _fakes(s, nets, noise, x, objective).items():
            loss = loss + s.adversarial_weight * GENERATOR[s.adversarial](d(fake, kind), real).mean()
    return loss


def gradient_norm_squared(d, image, kind="real"):
    image = image.detach().requires_grad_()
    logit_of_an_image = d(image, kind).flatten(1).mean(1) if d.patches else d(image, kind)
    (gradient,) = torch.autograd.grad(logit_of_an_image.sum(), image, create_graph=True)
    return (gradient**2).sum(dim=(1, 2, 3))


def discriminator_loss(s, nets, x, noise, objective, penalise, anchors=None):
    d = Seen(s, nets, noise)
    fakes = {kind: fake.detach() for kind, fake in _fakes(s, nets, noise, x, objective).items()}
    if s.adversarial == "relativistic":
        loss = sum(softplus(-(d(x) - d(fake, kind))).mean() for kind, fake in fakes.items())
    else:
        loss = DISCRIMINATOR_REAL[s.adversarial](d(x)).mean()
        loss = loss + sum(DISCRIMINATOR_FAKE[s.adversarial](d(fake, kind)).mean() for kind, fake in fakes.items())
    if penalise:
        loss = loss + s.penalty_interval * s.r1 / 2 * gradient_norm_squared(d, x).mean()
        for kind, fake in fakes.items():
            loss = loss + s.penalty_interval * s.r2 / 2 * gradient_norm_squared(d, fake, kind).mean()
    if anchors is not None:
        at_real, at_fake = anchors
        loss = loss + s.lecam * ((d(x) - at_fake) ** 2).mean()
        loss = loss + s.lecam * sum(((d(fake, kind) - at_real) ** 2).mean() for kind, fake in fakes.items())
    if s.gradient_penalty:
        share = 0.5 * (1 + torch.erf(noise["mix"] / 2**0.5))
        norm = gradient_norm_squared(d, share * x + (1 - share) * next(iter(fakes.values()))).sqrt()
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
    anchors: tuple[float, float] | None = None,
) -> Gradients:
    """Gradients of every network that the objective trains.

    Args:
        anchors: LeCam's moving averages of real and of fake logits; None: nothing has been seen yet.
    """
    requires = [p.requires_grad for p in nets.parameters()]
    nets.requires_grad_(True)
    losses = {}
    if objective != "gan":
        losses["encoder"] = encoder_loss(s, nets, x, noise, objective, s.beta if beta is None else beta)
    losses["decoder"] = decoder_loss(s, nets, x, noise, objective)
    if objective != "vae":
        losses["discriminator"] = discriminator_loss(s, nets, x, noise, objective, penalise, anchors)
    gradients = {}
    for name, loss in losses.items():
        parameters = list(nets[name].parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients[name] = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    for parameter, required in itertools.zip_longest(nets.parameters(), requires):
        parameter.requires_grad_(required)
    return gradients
