"""Means over the steps since the last log record, and what the ranks must agree on, in one all-reduce."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vaegan_dist.errors import VaeganError
from vaegan_dist.training.runtime import Runtime
from vaegan_dist.training.step import Step


def sum_over_ranks(values: torch.Tensor, world_size: int) -> torch.Tensor:
    """Elementwise sum over all ranks; the values themselves with one rank."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


@dataclass
class Meter:
    """Collects one log interval of a phase."""

    step: Step
    world_size: int
    started: float
    images: int = 0
    waited: float = 0.0

    @classmethod
    def begin(cls, step: Step, world_size: int) -> "Meter":
        """An empty interval that starts now."""
        step.sums.zero_()
        step.steps = 0
        return cls(step, world_size, time.perf_counter())

    def take(self) -> dict[str, float]:
        """Means of every term over all ranks since the last call, images/s, and a fresh interval.

        The gradients' norms and the skipped steps are equal on all ranks; their mean is themselves.
        """
        step = self.step
        # Gloo reduces CPU tensors and NCCL those of the GPU: the sums stay where they were made.
        totals = sum_over_ranks(torch.cat([step.sums, step.sums.new_tensor([self.waited])]), self.world_size)
        values = (totals / self.world_size).tolist()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        skipped = values[len(step.term_names) - 1]
        counted = max(step.steps - skipped, 1.0)
        record = {name: value / counted for name, value in zip(step.term_names[:-1], values, strict=False)}
        record["skipped_steps"] = skipped
        record["images_per_second"] = self.images / seconds
        record["data_wait_ratio"] = values[-1] / seconds
        self.step.sums.zero_()
        self.step.steps, self.images, self.waited, self.started = 0, 0, 0.0, time.perf_counter()
        return record


class Agreement:
    """Lets all ranks learn at the same step that one of them was asked to stop, about every two seconds.

    The ranks must call a collective equally often, so they cannot look at their own clocks: rank 0 proposes after how
    many steps they meet again, and the proposal travels in the same all-reduce as the answer.
    """

    INTERVAL_SECONDS = 2.0

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.steps_left = 1
        self.steps, self.since = 0, time.perf_counter()

    def stop(self) -> bool:
        """Whether the run must stop after this step; equal on all ranks."""
        self.steps += 1
        self.steps_left -= 1
        if self.steps_left > 0:
            return False
        return self.meet()

    def meet(self) -> bool:
        """Ask every rank now."""
        elapsed = max(time.perf_counter() - self.since, 1e-6)
        proposal = int(min(max(self.steps * self.INTERVAL_SECONDS / elapsed, 1), 10_000))
        mine = [float(self.runtime.stop_requested()), float(proposal if self.runtime.rank == 0 else 0)]
        stop, self.steps_left = (
            int(v) for v in sum_over_ranks(torch.tensor(mine, device=self.runtime.device), self.runtime.world_size)
        )
        self.steps, self.since = 0, time.perf_counter()
        return stop > 0


def check_health(step: Step, limit: int) -> None:
    """Fail when more than `limit` steps in a row had a gradient that is not finite.

    Every rank sees the same averaged gradient, so all of them fail alike.
    """
    worst = int(step.worst_in_a_row.item())
    if worst > limit:
        progress = step.state.progress
        raise VaeganError(
            f"phase {step.phase.name}: {worst} steps in a row had a gradient that is not finite, before "
            f"{progress.images_seen} images; lower optimizer.learning_rate, or clip with optimizer.max_grad_norm, "
            f"and run again to continue from the last checkpoint"
        )
    step.worst_in_a_row.zero_()
