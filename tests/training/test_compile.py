"""Compiled networks train as the plain ones do."""

import shutil

import pytest
import torch

from vaegan_dist.config_source import load_config
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import ImageShape
from vaegan_dist.training.state import create_state
from vaegan_dist.training.step import Step

PHASES = "phases=[{name: joint, objective: vaegan, images: 64}]"


def trained(mode: str, *overrides: str) -> tuple[dict[str, torch.Tensor], Step]:
    """Weights after three steps of a small MLP, and the step."""
    config = load_config(
        "smoke", overrides=[PHASES, "training.batch_size=16", f"training.compile={mode}", "objective.r1=0", *overrides]
    )
    state = create_state(config, ImageShape(1, 8, 8), torch.device("cpu"), torch.float32)
    step = Step(state, next(state.remaining_phases()), 0, 1)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        step(images)
        state.advance(16, state.progress.position)
    return state.networks.state_dict(), step


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler: c++, g++")
@pytest.mark.timeout(900)  # the compiler is slow where the machine is busy
def test_same_weights() -> None:
    """Also where the discriminator's graph is walked more than once, or differentiated twice in some of the steps."""
    penalties = ("objective.r1=0.1", "objective.r2=0.1", "objective.penalty_interval=2", "objective.gradient_penalty=1")
    overrides = ("objective.fakes=prior+reconstruction", "objective.similarity=1", *penalties)
    plain, _ = trained("no", *overrides)
    compiled, step = trained("default", *overrides)
    assert step.compiled.networks == ("encoder", "decoder", "discriminator")
    assert hasattr(step.state.networks["decoder"].pre_image, "_torchdynamo_orig_callable"), "nothing was compiled"
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graph_capture_needs_a_gpu(mode: str) -> None:
    with pytest.raises(ConfigError, match=f"training.compile={mode}.*GPU.*training.compile=default"):
        trained(mode)
