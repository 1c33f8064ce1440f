"""What a configuration would do, before it does it: parameters, FLOPs per image, shards, streams and steps."""

import copy
from dataclasses import dataclass

import torch

from vaegan_dist.config import Config, NetworkName, Phase
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.order import EpochOrder
from vaegan_dist.models import ImageShape
from vaegan_dist.objectives import build_objective
from vaegan_dist.objectives.flops import FlopCounter
from vaegan_dist.seeding import standard_normal
from vaegan_dist.training.state import TrainState, create_state

COUNTED_IMAGES = 4  # at least; a whole number of minibatch groups


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a plan. FLOPs count a multiply-add as two operations, as torch's counter does."""

    name: str
    trains: tuple[NetworkName, ...]
    images: int
    steps: int
    flops_per_image: float


@dataclass(frozen=True)
class Plan:
    """A run that has not begun."""

    image: ImageShape
    samples: int
    shards: int
    streams: int
    steps_per_epoch: int
    parameters: dict[str, int]
    phases: tuple[PhasePlan, ...]


def describe(config: Config) -> Plan:
    """Open the data set and build the networks, but train nothing.

    Raises:
        InputError, ConfigError: as the run itself would.
    """
    data = config.data
    dataset = open_dataset(data.path, in_memory=False, cache_dir=data.cache_dir, cache_bytes=data.cache_bytes)
    manifest = dataset.manifest
    image = ImageShape(channels=manifest.channels, height=manifest.height, width=manifest.width)
    state = create_state(config, image, torch.device("cpu"), torch.float32)
    order = EpochOrder(
        shard_samples=dataset.shard_samples,
        seed=config.run.seed,
        epoch=0,
        streams=config.streams,
        batch_size=config.training.batch_size,
        block_shards=config.data.block_shards,
    )
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in state.networks.items()}
    return Plan(
        image=image,
        samples=len(dataset),
        shards=len(dataset.shard_samples),
        streams=config.streams,
        steps_per_epoch=order.steps,
        parameters=parameters,
        phases=tuple(_plan_phase(state, phase) for phase in config.phases),
    )


def _plan_phase(state: TrainState, phase: Phase) -> PhasePlan:
    networks = copy.deepcopy(state.networks)
    batch_size = state.config.training.batch_size
    objective = build_objective(phase, state.config.objective_of(phase), networks, batch_size=batch_size)
    image = state.image
    group = getattr(state.config.model, "minibatch_std", 0) or 1
    count = -(-COUNTED_IMAGES // group) * group
    x = standard_normal((count, image.channels, image.height, image.width), 0, "describe").clamp(-1, 1)
    noise = {
        name: standard_normal((count, *shape[1:]), 0, "describe", name)
        for name, shape in objective.noise_shapes(batch_size).items()
    }
    with FlopCounter() as counter:
        for stage in objective.stages:
            stage.focus()
            # Past the first step, where the lazy penalties of step 0 are not due.
            stage(x, noise, batch_size)[0].backward()
    images = state.config.phase_images(phase)
    flops = counter.total / count
    return PhasePlan(phase.name, objective.trained, images, images // batch_size, flops)
