"""What a log record says of the latent units and of the average."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vaegan_dist.config_source import load_config
from vaegan_dist.models import ImageShape, Posterior
from vaegan_dist.training.meter import Meter, latent_record
from vaegan_dist.training.state import create_state
from vaegan_dist.training.step import LATENT_STATISTICS, Step

IMAGE = ImageShape(1, 8, 8)


def record_of(batches: list[Posterior]) -> dict[str, float | int | str | None]:
    """The record of an interval that saw these posteriors, one each step."""
    sums = torch.stack([posterior.unit_statistics() for posterior in batches]).mean(0)
    means = {
        f"{what}.{unit}": float(v)
        for what, row in zip(LATENT_STATISTICS, sums, strict=True)
        for unit, v in enumerate(row)
    }
    return latent_record(means, sums.shape[1])


@given(scales=st.lists(st.sampled_from([0.0, 0.05, 0.3, 2.0]), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_active_units_are_those_whose_mean_varies(scales: list[float], seed: int) -> None:
    """Over the whole interval (Burda et al. 2016): also a unit that varies between batches alone."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(4, 64, len(scales), generator=generator, dtype=torch.float64) * torch.tensor(scales) + 3.0
    logvar = torch.randn(mu.shape, generator=generator, dtype=torch.float64)
    record = record_of([Posterior(m, v) for m, v in zip(mu, logvar, strict=True)])
    flat = mu.flatten(0, 1)
    assert record["active_units"] == int((flat.var(0, correction=0) > 0.01).sum())
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(0, 1).mean(0)
    assert record["kl_per_dim_min"] == pytest.approx(float(kl.min()))
    assert record["kl_per_dim_max"] == pytest.approx(float(kl.max()))
    assert [float(value) for value in str(record["kl_per_dim"]).split()] == pytest.approx(kl.tolist(), rel=1e-3)


def test_a_unit_of_a_small_picture_is_a_channel() -> None:
    mu = torch.zeros(2, 3, 4, 4)
    mu[:, 1] = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    record = record_of([Posterior(mu, torch.zeros_like(mu))])
    assert record["active_units"] == 1
    assert record["kl_per_dim_max"] == pytest.approx(float(0.5 * mu[:, 1].square().flatten(1).sum(1).mean()))


def test_a_record_of_real_steps() -> None:
    config = load_config(
        "smoke",
        overrides=["phases=[{name: joint, objective: vaegan, images: 64}]", "training.batch_size=16"],
    )
    state = create_state(config, IMAGE, torch.device("cpu"), torch.float32)
    step = Step(state, next(state.remaining_phases()), 0, 1)
    meter = Meter.begin(step, None)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        step(images)
        state.advance(16, state.progress.position)
        meter.images += 16
    record = meter.take()
    assert not any("." in key for key in record), "the units' sums are not for the history"
    listed = [float(value) for value in str(record["kl_per_dim"]).split()]
    assert len(listed) == 8 and sum(listed) == pytest.approx(record["loss_kl"], rel=1e-2)
    pairs = [
        (average, weight)
        for name in ("encoder", "decoder")
        for average, weight in zip(state.ema[name].parameters(), state.networks[name].parameters(), strict=True)
    ]
    apart = sum(float((average - weight).detach().square().sum()) for average, weight in pairs)
    length = sum(float(weight.detach().square().sum()) for _, weight in pairs)
    assert record["ema_distance"] == pytest.approx((apart / length) ** 0.5, rel=1e-4) and apart > 0
