"""One worker, two, four: the same losses, and ranks that stay bit-identical."""

from pathlib import Path

import pytest
import torch

from tests.training.ranks import run_ranks, steps_of
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config

PHASES = (
    "phases=[{name: vae, objective: vae, images: 448}, "
    "{name: discriminator, objective: vaegan, images: 384, train: [discriminator]}, "
    "{name: joint, objective: vaegan, images: 448}]"
)


INTROSPECTIVE = (
    "phases=[{name: vae, objective: vae, images: 192}, {name: joint, objective: introspective, images: 1088}]",
    "model.channels=[8, 16]",
)

LATENT_DIFFUSION = (
    "phases=[{name: joint, objective: vaegan, images: 1280, settings: {adversarial_start_images: 320}}]",
    "model.channels=[4, 4]",
    "model.norm_groups=2",
    "model.discriminator_channels=4",
    "model.discriminator_layers=1",
)


def config_of(preset: str, data: Path, *overrides: str) -> Config:
    """A preset, shortened to 20 steps over its kinds of phases."""
    own = {"soft-intro-32": INTROSPECTIVE, "kl-f4-64": LATENT_DIFFUSION}.get(preset, (PHASES,))
    return load_config(
        preset, overrides=[f"data.path={data}", "training.batch_size=64", *own, "cluster.workers=1", *overrides]
    )


@pytest.fixture(scope="module", params=["seed-mlp", "digits-conv", "soft-intro-32", "kl-f4-64"])
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def one_rank(preset: str, digits: Path) -> list[dict]:  # type: ignore[type-arg]
    return steps_of(config_of(preset, digits), 0, 1, torch.float64)


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_do_not_depend_on_the_number_of_workers(
    world_size: int,
    preset: str,
    one_rank: list[dict],  # type: ignore[type-arg]
    digits: Path,
    tmp_path: Path,
) -> None:
    ranks = run_ranks(config_of(preset, digits), world_size, tmp_path / "run", torch.float64)
    assert len(one_rank) == 20
    for number, single in enumerate(one_rank):
        rows = [rank[number] for rank in ranks]
        assert len({row["parameters"] for row in rows}) == 1, f"ranks differ after step {number}"
        assert rows[0]["phase"] == single["phase"]
        assert rows[0]["terms"] == pytest.approx(single["terms"], rel=1e-6, abs=1e-9), f"step {number}"
        assert all(not row["leaks"] for row in [single, *rows]), "a frozen network has a gradient"


@pytest.mark.multiprocess
def test_the_parity_test_sees_a_network_called_around_its_wrapper(digits: Path, tmp_path: Path) -> None:
    ranks = run_ranks(config_of("seed-mlp", digits), 2, tmp_path / "run", torch.float64, around_ddp=True)
    last = [rank[-1]["parameters"] for rank in ranks]
    assert last[0] != last[1]


def test_micro_batches_add_up_to_the_batch(preset: str, one_rank: list[dict], digits: Path) -> None:  # type: ignore[type-arg]
    if preset == "kl-f4-64":
        pytest.skip("the adaptive weight is that of the micro-batch")
    config = config_of(preset, digits, "training.gradient_accumulation_steps=4")
    for number, (whole, parts) in enumerate(zip(one_rank, steps_of(config, 0, 1, torch.float64), strict=True)):
        assert parts["terms"] == pytest.approx(whole["terms"], rel=1e-6, abs=1e-9), f"step {number}"
