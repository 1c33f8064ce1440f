"""What a sweep costs before it is paid: trials, images, hours at a measured rate."""

import math
import time
from dataclasses import dataclass

import torch

from vaegan_dist.config import Config
from vaegan_dist.data.configured import open_configured
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.sweeps.probe import last_step

MEASURED_SECONDS = 2.0
WARM_STEPS = 2


@dataclass(frozen=True)
class Cost:
    """Images of a sweep: what is left of it, at the most and about."""

    trials: int
    images_per_trial: int
    most_images: int
    expected_images: float

    def hours(self, images: float, rate: float, concurrent: int) -> float:
        """Time for so many images at `rate` images per second and trial, `concurrent` trials at a time."""
        return images / max(rate * concurrent, 1e-9) / 3600


def cost_of(plan: Plan) -> Cost:
    """What the trials cost that have not ended."""
    total = plan.config.total_images
    begun = [trial for trial in plan.ledger.trials.values() if not trial.ended]
    images = plan.left * total - sum(trial.images_seen for trial in begun)
    return Cost(plan.left, total, images, images * _share(plan))


def _share(plan: Plan) -> float:
    """Part of the full grid that the scheduler is expected to spend (successive halving: a budget for each rung)."""
    if plan.settings.scheduler not in ("asha", "hyperband"):
        return 1.0
    total, factor = plan.config.total_images, plan.settings.reduction_factor
    grace = plan.grace
    rungs = max(int(math.log(total / grace) / math.log(factor)) + 1, 1) if grace < total else 1
    spent, reached = 0.0, 0.0
    for rung in range(rungs):
        milestone = grace * factor**rung
        spent += factor**-rung * (milestone - reached)
        reached = milestone
    spent += factor**-rungs * max(total - reached, 0.0)
    return min(spent / total, 1.0)


def measure_rate(config: Config, seconds: float = MEASURED_SECONDS) -> float:
    """Images per second of the training steps of a trial's last phase, on one worker of this machine's CPU.

    Reading data, pictures and evaluations come on top; what `training.compile` saves is not in it.
    """
    dataset = open_configured(config.data)
    batch = config.training.batch_size
    threads = torch.get_num_threads()
    torch.set_num_threads(config.training.torch_threads or 1)
    try:
        step = last_step(config, dataset.manifest)
        images = dataset.read([number % len(dataset) for number in range(batch)]).images
        for _ in range(WARM_STEPS):
            step(images)
        steps, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds or not steps:
            step(images)
            steps += 1
        return steps * batch / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
