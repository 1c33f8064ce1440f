"""Everything a run is, at one moment: networks, their average, optimisers and the place in phases and data."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vaegan_dist.config import NETWORK_NAMES, Config, NetworkName, Phase
from vaegan_dist.data.loader import Position
from vaegan_dist.models import ImageShape, build_networks
from vaegan_dist.models.group_norm import fuse_norms

EMA_NETWORKS: tuple[NetworkName, ...] = ("encoder", "decoder")


@dataclass
class Progress:
    """Where the run stands. Images are counted over all ranks, at the optimiser step."""

    images_seen: int = 0
    phase: int = 0
    phase_images: int = 0
    position: Position = field(default_factory=lambda: Position(epoch=0, consumed=0))
    seconds: float = 0.0
    restarts: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    evaluated: int = 0

    def to_json(self) -> dict[str, object]:
        """Plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, object]) -> "Progress":
        """Back from a checkpoint."""
        values = dict(data)
        position = values.pop("position")
        assert isinstance(position, dict)
        return cls(**values, position=Position(**position))  # type: ignore[arg-type]


@dataclass
class TrainState:
    """The objects of a run and where it stands; a checkpoint holds exactly this."""

    config: Config
    image: ImageShape
    networks: nn.ModuleDict
    ema: nn.ModuleDict
    optimizers: dict[NetworkName, torch.optim.Adam]
    progress: Progress
    memory: dict[str, Tensor] = field(default_factory=dict)
    """what objectives remember from step to step, by name"""

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Fill an objective's memory with what the run remembers, and keep it from now on."""
        for name, tensor in memory.items():
            if name in self.memory:
                tensor.copy_(self.memory[name])
            self.memory[name] = tensor

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.networks.parameters()).device

    @property
    def phase(self) -> Phase:
        """The phase that is under way, or the last one of a finished run."""
        return self.config.phases[self.progress.phase]

    @property
    def phase_done(self) -> bool:
        """Whether that phase has spent its budget."""
        return self.progress.phase_images >= self.config.phase_images(self.phase)

    @property
    def finished(self) -> bool:
        """Whether every phase has spent its budget; a larger budget or a further phase reopens the run."""
        return self.phase_done and self.progress.phase == len(self.config.phases) - 1

    def advance(self, images: int, position: Position) -> None:
        """Count one optimiser step."""
        self.progress.images_seen += images
        self.progress.phase_images += images
        self.progress.position = position

    def remaining_phases(self) -> Iterator[Phase]:
        """The phase under way and those after it; weights, average and optimiser states pass over as they are."""
        while not self.finished:
            if self.phase_done:
                self.progress.phase += 1
                self.progress.phase_images = 0
            yield self.phase

    @torch.no_grad()
    def update_ema(self, share: float | Tensor, skipped: Tensor) -> None:
        """Move the average by this share of the way to the weights; a skipped step (flag 1) leaves it where it is.

        With a half-life of 0 images the share is 1 and the average is the weights themselves (on a GPU, to rounding).
        """
        weight: Any = share * (1.0 - skipped)
        for name in EMA_NETWORKS:
            average: list[Tensor] = list(self.ema[name].parameters())
            current: list[Tensor] = list(self.networks[name].parameters())
            if self.device.type == "cpu":
                torch._foreach_lerp_(average, current, weight)
            else:  # lerp takes its weight from the host, which would have to wait for the device's
                gaps = torch._foreach_sub(current, average)
                torch._foreach_mul_(gaps, weight)
                torch._foreach_add_(average, gaps)
            for target, source in zip(self.ema[name].buffers(), self.networks[name].buffers(), strict=True):
                target.copy_(source)

    @torch.no_grad()
    def ema_distance(self) -> Tensor:
        """|average - weights| / |weights| over encoder and decoder."""
        current = [tensor.detach() for name in EMA_NETWORKS for tensor in self.networks[name].parameters()]
        average = [tensor for name in EMA_NETWORKS for tensor in self.ema[name].parameters()]
        apart = [tensor - other for tensor, other in zip(average, current, strict=True)]
        lengths = [torch.stack(torch._foreach_norm(part)).square().sum() for part in (apart, current)]
        distance: Tensor = (lengths[0] / lengths[1]).sqrt()
        return distance


def create_state(config: Config, image: ImageShape, device: torch.device, dtype: torch.dtype) -> TrainState:
    """A run before its first step: weights are a function of the seed and the configuration only."""
    networks = build_networks(config.model, image, seed=config.run.seed).to(device=device, dtype=dtype)
    if config.training.channels_last:
        networks = networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    possible = config.training.channels_last and config.training.compile == "no"
    fuse_norms(networks, config.training.fused_norms if possible else False, device)
    ema = nn.ModuleDict({name: copy.deepcopy(networks[name]) for name in EMA_NETWORKS}).requires_grad_(False).eval()
    optimizers = {name: make_optimizer(config, networks, name) for name in NETWORK_NAMES if name in networks}
    return TrainState(config, image, networks, ema, optimizers, Progress())


def make_optimizer(config: Config, networks: nn.ModuleDict, name: NetworkName) -> torch.optim.Adam:
    """Adam (AdamW where weights decay) for one network; fused: one kernel over all parameters, no host round trip."""
    settings = config.optimizer
    kind = torch.optim.AdamW if settings.weight_decay else torch.optim.Adam
    return kind(
        networks[name].parameters(),
        lr=settings.rate_of(name),
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
