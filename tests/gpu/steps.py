"""Steps on a GPU, beside the same steps on the CPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.models import ImageShape
from vaegan_dist.seeding import standard_normal
from vaegan_dist.training.state import TrainState, create_state
from vaegan_dist.training.step import Step

IMAGE = ImageShape(1, 16, 16)
BATCH = 16
# A power of two, so that the float32 tensor which a captured step reads is the number itself.
RATE = 2.0**-10

SMALL = ("model.channels=[4, 8]", "model.discriminator_channels=[4, 8]", "model.hidden=8", "model.latent_dim=4")
KL = ("model.channels=[4, 4]", "model.norm_groups=2", "model.discriminator_channels=4", "model.discriminator_layers=1")
JOINT = "phases=[{name: joint, objective: vaegan, images: 100000}]"
VARIANTS: dict[str, tuple[str, ...]] = {
    "mlp": ("seed-mlp", JOINT),
    "vae-warm-up": (
        "digits-conv",
        *SMALL,
        "phases=[{name: vae, objective: vae, images: 100000}]",
        "objective.beta_schedule=linear",
        f"objective.beta_warmup_images={4 * BATCH}",
    ),
    "lazy-r1": ("digits-conv", *SMALL, JOINT, "objective.r1=0.1", "objective.penalty_interval=3"),
    "larsen": ("larsen-64", *SMALL, JOINT, "model.decoder_channels=[8, 4]", "model.discriminator_stem=4"),
    "paper": ("digits-conv", *SMALL, JOINT, "objective.fakes=prior+reconstruction", "objective.similarity=1"),
    "wasserstein": (
        "digits-conv", *SMALL, "phases=[{name: joint, objective: gan, images: 100000}]",
        "objective.adversarial=wasserstein", "objective.r1=0", "objective.gradient_penalty=1",
    ),
    "stabilised": (
        "digits-conv", *SMALL, JOINT, "model.norm=spectral", "model.discriminator_norm=spectral",
        "model.attention=[8, 4]", "objective.diff_augment=[color, translation, cutout]", "objective.lecam=0.3",
        "objective.equilibrium=0.68", "objective.equilibrium_margin=0.02",
    ),
    "batch-norm": ("digits-conv", *SMALL, JOINT, "model.norm=batch", "model.discriminator_norm=batch"),
    "accumulated": ("digits-conv", *SMALL, JOINT, "training.gradient_accumulation_steps=2"),
    "residual": ("digits-conv", *SMALL, JOINT, "model.discriminator=residual", "objective.r2=0.1"),
    "introspective": (
        "soft-intro-32", "model.channels=[4, 8]",
        "phases=[{name: joint, objective: introspective, images: 100000}]",
    ),
    "latent-diffusion": (
        "kl-f4-64", *KL,
        "phases=[{name: joint, objective: vaegan, images: 100000}]", f"objective.adversarial_start_images={3 * BATCH}",
    ),
}  # fmt: skip


def config_of(variant: str, *overrides: str) -> Config:
    """A small relative of a preset, with constant learning rates."""
    preset, *own = VARIANTS[variant]
    fixed = (f"training.batch_size={BATCH}", f"optimizer.learning_rate={RATE}", "optimizer.lr_scheduler=constant")
    return load_config(preset, overrides=[*fixed, "cluster.workers=1", *own, *overrides])


@dataclass
class CpuNoise:
    """In place of a step's own noise: the CPU's, wherever the step runs."""

    step: Step

    def __call__(self) -> dict[str, Tensor]:
        seed, seen = self.step.state.config.run.seed, self.step.state.progress.images_seen
        shapes = self.step.objective.noise_shapes(self.step.batch_size).items()
        return {
            name: standard_normal(shape, seed, "noise", name, seen).to(self.step.device, self.step.dtype)
            for name, shape in shapes
        }


def pictures(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (BATCH, IMAGE.channels, 16, 16), dtype=torch.uint8, generator=generator)


def begin(config: Config, device: str, dtype: torch.dtype) -> tuple[TrainState, Step]:
    """A run before its first step."""
    state = create_state(config, IMAGE, torch.device(device), dtype)
    return state, Step(state, next(state.remaining_phases()), 0, 1)


def trained(config: Config, device: str, dtype: torch.dtype, steps: int) -> tuple[dict[str, Tensor], Step]:
    """All that a run keeps after so many steps, on the CPU, and its step."""
    state, step = begin(config, device, dtype)
    step._noise = CpuNoise(step)  # type: ignore[method-assign]
    for number in range(steps):
        step(pictures(number))
        state.advance(BATCH, state.progress.position)
    kept = {f"networks.{name}": value for name, value in state.networks.state_dict().items()}
    kept |= {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    kept |= {f"memory.{name}": value for name, value in state.memory.items()}
    kept["sums"] = step.sums
    return {name: value.detach().cpu().double() for name, value in kept.items()}, step
