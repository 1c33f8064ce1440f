"""The adversarial game on one batch: who sees which pictures, and which gradient goes back to whom."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vaegan_dist.models import Discriminator
from vaegan_dist.models.networks import as_written
from vaegan_dist.models.precision import wide
from vaegan_dist.objectives.adversarial import AdversarialLoss
from vaegan_dist.objectives.augment import View
from vaegan_dist.objectives.base import Terms
from vaegan_dist.objectives.routing import Boundary, carry, shared_seed

# (fake pictures, gradient of the weighted L_G in them) of every kind -> factor on that gradient
Balance = Callable[[Sequence[tuple[Tensor, Tensor]]], Tensor]
# (real logits, fake logits of every kind) -> what the discriminator descends beside L_D, a scalar
OnLogits = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass
class Judged:
    """Fake pictures before the discriminator."""

    image: Tensor
    """the decoder's output"""
    seen: Tensor
    """what the discriminator saw: the picture, the picture behind `boundary`, or a leaf"""
    boundary: Boundary | None
    logits: Tensor
    features: Tensor | None
    plays: bool
    """a player descends L_G of these pictures"""

    @property
    def leaf(self) -> bool:
        """The graph is cut at `seen`: the player's gradient is taken there and carried on."""
        return self.boundary is None and self.seen is not self.image


def judge(
    discriminator: Discriminator,
    image: Tensor,
    view: View,
    *,
    learns: bool,
    plays: bool,
    leaf: bool,
    twice: bool = False,
    layer: int | None = None,
) -> Judged:
    """Show fakes to the discriminator so that both players' gradients can be told apart on the way back.

    Args:
        discriminator: its weights require gradients exactly if it learns.
        image: the decoder's output.
        view: alters pictures, each by itself, on their way to the discriminator.
        learns: the discriminator learns from these pictures.
        plays: a player descends L_G of these pictures.
        leaf: the logits will be differentiated in the pictures: by a penalty, or to balance two gradients.
        twice: and that gradient again in the discriminator's weights.
        layer: discriminator layer whose features are wanted.
    """
    boundary = None
    seen = image
    one_seed = discriminator.independent and not discriminator.patches
    if not learns and not leaf:
        pass  # its weights are frozen: the plain graph carries the player's gradient alone
    elif leaf or (plays and not one_seed):
        seen = image.detach().requires_grad_()
    elif plays:
        boundary = Boundary()
        seen = boundary(image)
    elif layer is not None:
        seen = image.detach().requires_grad_()
    else:
        seen = image.detach()
    with torch.set_grad_enabled(plays or learns or seen.requires_grad), as_written(discriminator, twice):
        last = discriminator.depth - 1 if layer is None else layer
        logits, features = discriminator.logits_and_features(view(seen), last)
    return Judged(image, seen, boundary, wide(logits), None if layer is None else features, plays)


def play(
    loss: AdversarialLoss,
    weight: float,
    logits_real: Tensor | None,
    fakes: dict[str, Judged],
    *,
    learns: bool,
    balance: Balance | None = None,
    restrain: OnLogits | None = None,
    active: bool = True,
) -> tuple[Tensor, Terms]:
    """Both players' losses: what carries their gradients, and the terms.

    Args:
        loss: the adversarial loss.
        weight: weight of the generator's loss.
        logits_real: `[B]` or `[B, h, w]`; None where neither player's loss needs them.
        fakes: the kinds of fakes by name.
        learns: the discriminator learns.
        restrain: a penalty on the discriminator's logits, the term `penalty_lecam`. It belongs into the seed that the
            discriminator starts from: added to the scalar, it would pass the boundary to the player as well.
        balance: gives a factor on the players' gradients, which then pass through leaves.
        active: whether the losses train anything yet; if not, their gradients are zero.
    """
    terms: Terms = {}
    everyone = {} if logits_real is None else {"real": logits_real}
    everyone |= {kind: judged.logits for kind, judged in fakes.items()}
    with torch.enable_grad():
        logits = {kind: tensor.detach().requires_grad_() for kind, tensor in everyone.items()}
        at_discriminator: Terms = {}
        if learns:
            terms["loss_disc"] = loss.discriminator(logits["real"], [logits[kind] for kind in fakes]).mean()
            descended = terms["loss_disc"]
            if restrain is not None:
                terms["penalty_lecam"] = restrain(logits["real"], [logits[kind] for kind in fakes])
                descended = descended + terms["penalty_lecam"]
            at_discriminator = _gradients(descended, logits)
        played = {kind: logits[kind] for kind, judged in fakes.items() if judged.plays}
        at_player: Terms = {}
        if played:
            real = logits.get("real")
            each = [loss.generator(fake, fake if real is None else real.detach()) for fake in played.values()]
            terms["loss_adv"] = torch.stack(each).sum(0).mean()
            at_player = _gradients(weight * terms["loss_adv"], played)
    if not active:
        at_discriminator = {kind: torch.zeros_like(gradient) for kind, gradient in at_discriminator.items()}
        at_player = {kind: torch.zeros_like(gradient) for kind, gradient in at_player.items()}
    at_image = {kind: _at_image(fakes[kind], at_player[kind]) for kind in at_player if fakes[kind].leaf}
    if balance is not None:
        terms["adaptive_weight"] = balance([(fakes[kind].image, gradient) for kind, gradient in at_image.items()])
        at_image = {kind: terms["adaptive_weight"] * gradient for kind, gradient in at_image.items()}
    total = sum(
        (
            _route(judged, at_discriminator.get(kind), at_player.get(kind), at_image.get(kind))
            for kind, judged in fakes.items()
        ),
        start=torch.zeros_like(next(iter(everyone.values())).detach().sum()),
    )
    if logits_real is not None and "real" in at_discriminator:
        total = total + carry(logits_real, at_discriminator["real"])
    for kind, tensor in everyone.items():
        right = tensor > 0 if kind == "real" else tensor < 0
        terms[f"accuracy_{kind}"] = right.to(tensor.dtype).mean()
        terms[f"logits_{kind}"] = tensor.mean()
    return total, terms


def _gradients(loss: Tensor, inputs: Terms) -> Terms:
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def _at_image(judged: Judged, at_player: Tensor) -> Tensor:
    """A player's gradient behind the discriminator, at the picture; the graph stays for the discriminator's own."""
    (gradient,) = torch.autograd.grad(judged.logits, judged.seen, at_player, retain_graph=True)
    return gradient


def _route(
    judged: Judged, at_discriminator: Tensor | None, at_player: Tensor | None, at_image: Tensor | None
) -> Tensor:
    """Carry one kind of fake's gradients: to the discriminator's weights, and through its input to the player."""
    if at_image is not None:
        to_player = carry(judged.image, at_image)
        return to_player if at_discriminator is None else to_player + carry(judged.logits, at_discriminator)
    if at_discriminator is None:
        return judged.logits.detach().sum() * 0 if at_player is None else carry(judged.logits, at_player)
    if at_player is None:
        return carry(judged.logits, at_discriminator)
    assert judged.boundary is not None
    seed, judged.boundary.factor = shared_seed(at_discriminator, at_player)
    return carry(judged.logits, seed)
