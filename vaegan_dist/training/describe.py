"""What a configuration would do, before it does it: parameters, operations, memory, shards, streams and steps."""

from dataclasses import dataclass

import torch

from vaegan_dist.config import NETWORK_NAMES, Config, NetworkName, Phase
from vaegan_dist.data.configured import open_configured
from vaegan_dist.data.order import EpochOrder
from vaegan_dist.models import ImageShape, outline_networks
from vaegan_dist.objectives import build_objective
from vaegan_dist.objectives.cost import CostMeter
from vaegan_dist.seeding import standard_normal
from vaegan_dist.training.pictures import image_of
from vaegan_dist.training.state import EMA_NETWORKS

COUNTED_IMAGES = 4  # at least; a whole number of minibatch groups


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a plan. FLOPs count a multiply-add as two operations, as torch's counter does.

    Attributes:
        flops: of a step, per image: forward and backward of each network; `losses` is what belongs to none. Penalties
            that are evaluated every k steps count a k-th.
        activations: bytes per image that wait for the backward pass, in float32, at the step's worst moment.
    """

    name: str
    trains: tuple[NetworkName, ...]
    images: int
    steps: int
    flops: dict[str, float]
    activations: dict[str, float]

    @property
    def flops_per_image(self) -> float:
        """Of all networks."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Memory:
    """Bytes of one network on one worker, but for activations."""

    weights: int
    gradients: int
    optimizer: int
    average: int


@dataclass(frozen=True)
class ModelPlan:
    """What the networks of a configuration cost for pictures of one size."""

    image: ImageShape
    images_at_once: int
    parameters: dict[str, int]
    memory: dict[str, Memory]
    phases: tuple[PhasePlan, ...]

    @property
    def bytes_per_worker(self) -> dict[str, float]:
        """Estimate for each phase: everything that stays, and the activations of the images that go at once."""
        stays = sum(sum(vars(memory).values()) for memory in self.memory.values())
        return {phase.name: stays + self.images_at_once * sum(phase.activations.values()) for phase in self.phases}


@dataclass(frozen=True)
class Plan:
    """A run that has not begun."""

    model: ModelPlan
    samples: int
    shards: int
    streams: int
    steps_per_epoch: int


def describe(config: Config) -> Plan:
    """Open the data set and lay out the networks, but train nothing.

    Raises:
        InputError, ConfigError: as the run itself would.
    """
    dataset = open_configured(config.data, read=False)
    manifest = dataset.manifest
    image = image_of(manifest)
    order = EpochOrder(
        shard_samples=dataset.shard_samples,
        seed=config.run.seed,
        epoch=0,
        streams=config.streams,
        batch_size=config.training.batch_size,
        block_shards=config.data.block_shards,
    )
    return Plan(
        model=describe_model(config, image),
        samples=len(dataset),
        shards=len(dataset.shard_samples),
        streams=config.streams,
        steps_per_epoch=order.steps,
    )


def describe_model(config: Config, image: ImageShape) -> ModelPlan:
    """What the networks cost; needs no data, and no memory to speak of.

    Raises:
        ConfigError: the pictures do not fit the network, or settings cannot work together.
    """
    phases = tuple(_plan_phase(config, image, phase) for phase in config.phases)
    trained = {name for phase in phases for name in phase.trains}
    networks = outline_networks(config.model, image)
    parameters: dict[str, int] = {name: sum(p.numel() for p in networks[name].parameters()) for name in NETWORK_NAMES}
    memory: dict[str, Memory] = {}
    for name, count in parameters.items():
        size = 4 * count  # float32; bfloat16 is for what lies between the layers
        learns = size if name in trained else 0
        memory[name] = Memory(size, learns, 2 * learns, size if name in EMA_NETWORKS else 0)
    most = max(config.training.batch_size // workers for workers in config.world_sizes)
    at_once = most // config.training.gradient_accumulation_steps
    return ModelPlan(image, at_once, parameters, memory, phases)


def _plan_phase(config: Config, image: ImageShape, phase: Phase) -> PhasePlan:
    settings, batch_size = config.objective_of(phase), config.training.batch_size
    # The perceptual network may be a TorchScript file, which computes on real devices only.
    device = torch.device("cpu" if settings.perceptual_weight else "meta")
    networks = outline_networks(config.model, image)
    if device.type == "cpu":
        for parameter in networks.to_empty(device="cpu").parameters():
            torch.nn.init.zeros_(parameter)
    objective = build_objective(phase, settings, networks, batch_size=batch_size)
    group = getattr(config.model, "minibatch_std", 0) or 1
    count = -(-COUNTED_IMAGES // group) * group
    x = torch.zeros(count, image.channels, image.height, image.width, device=device)
    shapes = objective.noise_shapes(batch_size).items()
    noise = {
        name: standard_normal((1, *shape[1:]), 0, "describe").to(device).expand(count, *shape[1:])
        for name, shape in shapes
    }
    every = settings.penalty_interval
    meters = []
    # The first step has the lazy penalties, the second has not.
    for images_seen in (0, batch_size) if every > 1 else (0,):
        meter = CostMeter(objective.networks)
        with meter.watch():
            for stage in objective.stages:
                stage.focus()
                stage(x, noise, images_seen)[0].backward()
        meters.append(meter)
    rare, usual = meters[0], meters[-1]
    names = [*NETWORK_NAMES, "losses"]
    flops = {n: (usual.flops[n] + (rare.flops[n] - usual.flops[n]) / every) / count for n in names}
    worst = max(meters, key=lambda meter: meter.saved.total())
    images = config.phase_images(phase)
    activations = {name: worst.saved[name] / count for name in names}
    return PhasePlan(phase.name, objective.trained, images, images // batch_size, flops, activations)
