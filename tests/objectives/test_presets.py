"""Every preset that comes with the package takes steps on its own networks, in every one of its phases."""

import pytest
import torch

from vaegan_dist.config_source import load_config, preset_names
from vaegan_dist.models import ImageShape, build_networks
from vaegan_dist.objectives import build_objective
from vaegan_dist.seeding import standard_normal

BATCH = 16


@pytest.mark.parametrize("name", preset_names())
def test_preset_trains(name):
    config = load_config(name)
    networks = build_networks(config.model, ImageShape(1, 28, 28), seed=config.run.seed)
    x = standard_normal((BATCH, 1, 28, 28), "pictures").clamp(-1, 1)
    for phase in config.phases:
        step = build_objective(phase, config.objective_of(phase), networks, batch_size=BATCH)
        rates = {name: config.optimizer.rate_of(name) for name in step.trained}
        before = {key: value.clone() for key, value in networks.state_dict().items()}
        groups = [{"params": networks[name].parameters(), "lr": rate} for name, rate in rates.items()]
        optimizer = torch.optim.Adam(groups, betas=config.optimizer.betas)
        for index in range(3):
            noise = {key: standard_normal(shape, key, index) for key, shape in step.noise_shapes(BATCH).items()}
            total, terms = step(x, noise, index * BATCH)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            assert all(bool(term.isfinite()) for term in terms.values())
        for key, value in networks.state_dict().items():
            moved = not torch.equal(value, before[key])
            assert moved == (key.split(".")[0] in step.trained), f"{phase.name}: {key}"
