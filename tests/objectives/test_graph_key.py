"""Steps of equal keys do the same: what a captured step relies on."""

import pytest
from test_gradients import BATCH, MODELS, phase_of, small_problem

from vaegan_dist.config import ObjectiveSection
from vaegan_dist.objectives import build_objective

PLACES = range(0, 16 * BATCH, BATCH)
WARM_UP = {"beta": 0.7, "beta_schedule": "linear", "beta_warmup_images": 5 * BATCH}
CYCLES = {"beta_schedule": "cyclical", "beta_warmup_images": 3 * BATCH, "beta_cycle_images": 6 * BATCH}
CAPACITY = {"capacity": 9.0, "capacity_images": 7 * BATCH}


@pytest.mark.parametrize(
    ("objective", "settings", "kinds"),
    [
        ("vae", {}, 1),
        ("vae", WARM_UP, 6),
        ("vae", {**CYCLES, **CAPACITY}, None),
        ("vaegan", {"r1": 0.5, "penalty_interval": 4}, 2),
        ("vaegan", {"r2": 0.5, "penalty_interval": 4, "adversarial_start_images": 7 * BATCH}, 4),
        ("vaegan", {"gradient_penalty": 1.0, "penalty_interval": 4, **WARM_UP}, 6),
        ("vaegan", {"r1": 0.5, "penalty_interval": 2, **CAPACITY, **CYCLES}, None),
        ("introspective", {}, 1),
        ("introspective", {**WARM_UP, **CAPACITY}, None),
    ],
)
def test_equal_keys_mean_equal_gradients_and_terms(objective: str, settings: dict, kinds: int | None) -> None:  # type: ignore[type-arg]
    """Bit by bit, at every place of a phase whose schedules begin, move and end in it."""
    networks, x, draw = small_problem(MODELS["mlp"])
    step = build_objective(phase_of(objective), ObjectiveSection(**settings), networks, batch_size=BATCH)
    noise = draw(step)
    found: dict[tuple[object, ...], bytes] = {}
    for images_seen in PLACES:
        whole = b""
        for stage in step.stages:
            stage.focus()
            networks.zero_grad(set_to_none=True)
            loss, terms = stage(x, noise, images_seen)
            loss.backward()
            gradients = [p.grad for p in networks.parameters() if p.grad is not None]
            whole += b"".join(tensor.numpy().tobytes() for tensor in [*terms.values(), *gradients])
        key = tuple(stage.graph_key(images_seen) for stage in step.stages)
        assert found.setdefault(key, whole) == whole, f"{images_seen} images: key {key}"
    if kinds is not None:
        assert len(found) == len(set(found.values())) == kinds
