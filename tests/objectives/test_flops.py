"""Larsen's step costs what its mathematics asks for and no more (the floor of docs/method.md)."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vaegan_dist.config import ConvModel, ObjectiveSection, Phase
from vaegan_dist.models import ImageShape, build_networks
from vaegan_dist.objectives import build_objective
from vaegan_dist.objectives.flops import FlopCounter

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


def gflop_per_image(objective="vaegan", train=None, **settings):
    networks = build_networks(LARSEN, ImageShape(3, 64, 64), seed=0).to("meta")
    phase = Phase(name="p", objective=objective, images=100, train=train)
    step = build_objective(phase, ObjectiveSection(**settings), networks, batch_size=2)
    noise = {name: torch.zeros(shape, device="meta") for name, shape in step.noise_shapes(2).items()}
    with FlopCounter() as counter:
        step(torch.zeros(2, 3, 64, 64, device="meta"), noise, 0)[0].backward()
    return counter.total / 2 / 1e9


@pytest.mark.parametrize(("fakes", "floor"), [("prior", 12.98), ("prior+reconstruction", 15.65)])
def test_larsen(fakes, floor):
    assert gflop_per_image(reconstruction="none", similarity=1.0, gamma=0.01, fakes=fakes) <= floor


def test_a_phase_computes_nothing_for_networks_that_it_does_not_train():
    # forward 0.86 (decoder) + 0.88 on real and on generated; backward twice that less the gradient in the pictures
    alone = gflop_per_image(train=("discriminator",))
    assert alone == pytest.approx(0.863 + 2 * 3 * 0.875 - 2 * 0.0197, rel=0.01)
    assert gflop_per_image("vae") == pytest.approx(3 * (0.288 + 0.863), rel=0.02)


def test_the_counter_counts_as_torch_does():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(98, 5))
    with FlopCounter() as own, FlopCounterMode(display=False) as theirs:
        model(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert own.total == theirs.get_total_flops() > 0
