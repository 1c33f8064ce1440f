"""What `describe` promises against what a real step does."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vaegan_dist.cli import main
from vaegan_dist.config_source import load_config
from vaegan_dist.models import ImageShape
from vaegan_dist.objectives import build_objective
from vaegan_dist.objectives.flops import FlopCounter
from vaegan_dist.training.describe import describe_model
from vaegan_dist.training.state import create_state

# Stated in docs/method.md: the estimate of activations is within this share of what a step takes at its peak.
TOLERANCE = 0.35
CASES = {
    "digits-conv": (ImageShape(1, 28, 28), ["objective.r1=0"]),
    "kl-f4-64": (ImageShape(3, 32, 32), ["model.channels=[16, 32]", "objective.adversarial_start_images=0"]),
    "larsen-64": (
        ImageShape(3, 32, 32),
        ["model.channels=[8, 16]", "model.decoder_channels=[16, 8]", "model.hidden=32", "objective.r1=0"],
    ),
}


class Live(TorchDispatchMode):
    """Bytes of all storages that operations made and that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("preset", CASES)
def test_operations_and_activations_are_those_of_a_real_step(preset: str) -> None:
    image, overrides = CASES[preset]
    count = 32
    config = load_config(preset, overrides=[f"training.batch_size={count}", *overrides])
    plan = describe_model(config, image).phases[-1]
    state = create_state(config, image, torch.device("cpu"), torch.float32)
    phase = config.phases[-1]
    objective = build_objective(phase, config.objective_of(phase), state.networks, batch_size=count)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, image.channels, image.height, image.width, generator=generator) * 2 - 1
    noise = {name: torch.randn(shape, generator=generator) for name, shape in objective.noise_shapes(count).items()}
    # The kernel that torch's counter knows, and the one that keeps most.
    with FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        objective(x, noise, count)[0].backward()
    assert plan.flops_per_image == pytest.approx(counter.total / count, rel=0.01)
    # Parameters' gradients are apart in the estimate: here they stand already, and their next ones are small beside.
    with Live() as live, sdpa_kernel(SDPBackend.MATH):
        objective(x, noise, count)[0].backward()
    assert sum(plan.activations.values()) == pytest.approx(live.peak / count, rel=TOLERANCE)


def test_each_network_is_charged_for_what_it_computes() -> None:
    config = load_config("larsen-64", overrides=["objective.r1=0"])
    plan = describe_model(config, ImageShape(3, 64, 64))
    flops = {name: value / 1e9 for name, value in plan.phases[0].flops.items()}
    forward = {"encoder": 0.288, "decoder": 0.863, "discriminator": 0.875}  # docs/method.md
    passes = {"encoder": 3, "decoder": 6, "discriminator": 8}
    for name, value in forward.items():
        assert flops[name] == pytest.approx(passes[name] * value, rel=0.04), name
    assert flops["losses"] == 0
    assert sum(plan.parameters.values()) == pytest.approx(50.7e6, rel=0.01)
    encoder, discriminator = plan.memory["encoder"], plan.memory["discriminator"]
    assert encoder.weights == 4 * plan.parameters["encoder"] == encoder.gradients == encoder.average
    assert encoder.optimizer == 2 * encoder.weights and discriminator.average == 0


def test_frozen_networks_cost_nothing() -> None:
    phase = "phases=[{name: d, objective: vaegan, images: 64, train: [discriminator]}]"
    plan = describe_model(load_config("smoke", overrides=[phase]), ImageShape(1, 8, 8))
    assert plan.phases[0].flops["encoder"] == 0 and plan.phases[0].activations["decoder"] == 0
    assert plan.memory["decoder"].gradients == plan.memory["decoder"].optimizer == 0


def test_the_command(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where `make train` has left its digits: they are not the pictures of another preset."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    assert main(["describe", "--preset", "larsen-64", "objective.r1=0"]) == 0
    text = capsys.readouterr().out
    assert "64x64x3" in text and "35,115,264" in text and "12.97 GFLOP per image" in text
    assert main(["describe", "--preset", "smoke", "--image", "16x8x3"]) == 0
    assert "16x8x3" in capsys.readouterr().out
    assert main(["describe", "--preset", "larsen-64", "objective.diff_augment=[color, translation, cutout]"]) == 0
    assert main(["describe", "--preset", "smoke", "--data", str(digits)]) == 0
    assert "28x28x1" in capsys.readouterr().out
    assert main(["describe", "--preset", "smoke", "--image", "16x8"]) == 2
    assert "--image=16x8" in capsys.readouterr().err
