"""Every preset that comes with the package takes steps on its own networks, in every one of its phases."""

import pytest
import torch

from vaegan_dist.config_source import load_config, preset_names
from vaegan_dist.models import ImageShape
from vaegan_dist.training.state import create_state
from vaegan_dist.training.step import Step

SIZES = {"larsen-64": (3, 64), "soft-intro-32": (1, 32), "kl-f4-64": (3, 64), "kl-f8-256": (3, 256)}
HEAVY = {"kl-f8-256": "model.channels=[32, 32, 64, 64]"}  # its own 84 million parameters need a minute per step here


@pytest.mark.parametrize("name", preset_names())
def test_preset_trains(name):
    """One step of each phase moves exactly what the phase trains, and every term is a number."""
    channels, side = SIZES.get(name, (1, 28))
    batch = 8 if side == 28 else 2
    overrides = (
        [f"training.batch_size={batch}", "model.minibatch_std=4"] if side == 28 else [f"training.batch_size={batch}"]
    )
    if name.startswith("kl-"):
        overrides.append("objective.adversarial_start_images=0")
    config = load_config(name, overrides=[*overrides, *([HEAVY[name]] if name in HEAVY else [])])
    state = create_state(config, ImageShape(channels, side, side), torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, channels, side, side), generator=generator, dtype=torch.uint8)
    for phase in state.remaining_phases():
        step = Step(state, phase, 0, 1)
        before = {key: value.clone() for key, value in state.networks.state_dict().items()}
        step(images)
        assert bool(step.sums.isfinite().all()) and step.sums[-1] == 0, f"{phase.name}: a step was skipped"
        for key, value in state.networks.state_dict().items():
            moved = not torch.equal(value, before[key])
            assert moved == (key.split(".")[0] in step.trained), f"{phase.name}: {key}"
        state.progress.phase_images = config.phase_images(phase)
