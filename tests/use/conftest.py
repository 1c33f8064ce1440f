"""A finished run of the preset smoke, and a model of the latent-diffusion kind."""

from pathlib import Path

import pytest
import torch

from tests.training.runs import config_of
from vaegan_dist.config_source import load_config
from vaegan_dist.models import ImageShape, build_networks
from vaegan_dist.training.loop import train
from vaegan_dist.training.runtime import SingleProcess
from vaegan_dist.use import Model


@pytest.fixture(scope="session")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: 2,560 images on real digits."""
    torch.set_num_threads(1)
    storage = tmp_path_factory.mktemp("runs")
    train(config_of(digits, storage), SingleProcess())
    return storage / "smoke"


@pytest.fixture(scope="session")
def kl_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The networks of kl-f4-64 before their first step."""
    config, image = load_config("kl-f4-64"), ImageShape(3, 64, 64)
    networks = build_networks(config.model, image, seed=3)
    return Model(networks, config, image, source=tmp_path_factory.mktemp("kl"), weights="ema", images_seen=0)
