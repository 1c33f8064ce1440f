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

SMALL_CONV = (PHASES, "model.channels=[4, 8]", "model.discriminator_channels=[4, 8]", "model.hidden=8")
# Everything that decides or remembers from step to step: the gate, LeCam, alterations, spectral norms; and attention.
STABILISED = (
    *SMALL_CONV,
    "model.norm=spectral",
    "model.discriminator_norm=spectral",
    "model.attention=[14, 7]",
    "objective.diff_augment=[color, translation, cutout]",
    "objective.lecam=0.3",
    "objective.equilibrium=0.68",
    "objective.equilibrium_margin=0.02",
)
# Layers that couple the images of all ranks.
COUPLED = (*SMALL_CONV, "model.norm=batch", "model.discriminator_norm=batch", "objective.fakes=prior+reconstruction")
RESIDUAL = (*SMALL_CONV, "model.discriminator=residual", "objective.r2=0.1")
VARIANTS = {"stabilised": STABILISED, "coupled": COUPLED, "residual": RESIDUAL}


def config_of(preset: str, data: Path, *overrides: str) -> Config:
    """A preset, shortened to 20 steps over its kinds of phases; or a variant of digits-conv."""
    own = {"soft-intro-32": INTROSPECTIVE, "kl-f4-64": LATENT_DIFFUSION, **VARIANTS}.get(preset, (PHASES,))
    return load_config(
        "digits-conv" if preset in VARIANTS else preset,
        overrides=[f"data.path={data}", "training.batch_size=64", *own, "cluster.workers=1", *overrides],
    )


@pytest.fixture(scope="module", params=["seed-mlp", "digits-conv", "soft-intro-32", "kl-f4-64", *VARIANTS])
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
    if preset == "coupled":
        pytest.skip("a micro-batch has batch norm statistics of its own")
    config = config_of(preset, digits, "training.gradient_accumulation_steps=4")
    for number, (whole, parts) in enumerate(zip(one_rank, steps_of(config, 0, 1, torch.float64), strict=True)):
        assert parts["terms"] == pytest.approx(whole["terms"], rel=1e-6, abs=1e-9), f"step {number}"


def test_the_gate_holds_back_whoever_is_ahead(digits: Path) -> None:
    """Both kinds of decision occur, a held network keeps its weights and moments, and never both are held."""
    rows = steps_of(config_of("stabilised", digits), 0, 1, torch.float64)
    joint = [row for row in rows if row["phase"] == "joint"]
    held = {name: sum(row["terms"][f"gated_{name}"] for row in joint) for name in ("decoder", "discriminator")}
    assert sum(held.values()) > 0
    assert all(row["terms"]["gated_decoder"] + row["terms"]["gated_discriminator"] < 2 for row in joint)
    for row in joint:
        for name in ("decoder", "discriminator"):
            assert row["moved"][name] == (row["terms"][f"gated_{name}"] == 0)
    assert all(row["moved"]["encoder"] for row in joint)
