"""Means over the steps since the last log record, and what the ranks must agree on, in one all-reduce."""

import statistics
import time
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from vaegan_dist.reporting.records import Record
from vaegan_dist.training.runtime import Runtime
from vaegan_dist.training.snapshot import Interval
from vaegan_dist.training.step import LATENT_STATISTICS, Step

T = TypeVar("T")
ACTIVE_VARIANCE = 0.01  # Burda et al. 2016 (arXiv 1509.00519), section 5.2
LISTED_UNITS = 256


def sum_over_ranks(values: torch.Tensor, world_size: int) -> torch.Tensor:
    """Elementwise sum over all ranks; the values themselves with one rank."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


@dataclass
class Meter:
    """Collects one log interval of a phase."""

    step: Step
    started: float
    images: int = 0
    # Seconds of this rank: waiting for batches, waiting for other ranks' gradients, whole steps.
    waited: float = 0.0
    communicated: float = 0.0
    stepped: float = 0.0

    @classmethod
    def begin(cls, step: Step, interval: Interval | None) -> "Meter":
        """An interval that starts now; its terms go on where a checkpoint's `interval` stood."""
        step.sums.zero_()
        step.steps = 0
        if interval is not None and interval.names == step.term_names:
            step.steps = interval.steps
            step.skipped_in_a_row.fill_(interval.skipped_in_a_row)
            step.sums.copy_(_own_sums(interval, step))
        return cls(step, time.perf_counter())

    def interval(self) -> Interval:
        """The interval so far, of every rank; a collective."""
        step = self.step
        rows = [torch.empty_like(step.sums) for _ in range(step.world_size)]
        if step.world_size > 1:
            dist.all_gather(rows, step.sums)
        else:
            rows = [step.sums]
        return Interval(step.term_names, step.steps, torch.stack(rows).tolist(), float(step.skipped_in_a_row))

    def take(self) -> Record:
        """Means of every term over all ranks since the last call, images/s, and a fresh interval.

        The gradients' norms and the skipped steps are equal on all ranks; their mean is themselves.
        """
        step = self.step
        # Gloo reduces CPU tensors and NCCL those of the GPU: the sums stay where they were made.
        times = [self.waited, self.communicated, self.stepped]
        # One place for each rank's own work, in which the others say 0: who is slow, by the same all-reduce.
        busy = [0.0] * step.world_size
        busy[step.rank] = self.stepped - self.communicated
        totals = sum_over_ranks(torch.cat([step.sums, step.sums.new_tensor([*busy, *times])]), step.world_size)
        values = (totals / step.world_size).tolist()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        skipped = values[len(step.term_names) - 1]
        counted = max(step.steps - skipped, 1.0)
        means = {name: value / counted for name, value in zip(step.term_names[:-1], values, strict=False)}
        record: Record = {name: value for name, value in means.items() if not name.startswith(LATENT_STATISTICS)}
        record |= latent_record(means, step.units)
        if step.state.config.ema.half_life_images:
            record["ema_distance"] = step.state.ema_distance().item()
        record["skipped_steps"] = skipped
        record["images_per_second"] = self.images / seconds
        waited, communicated, stepped = values[-3:]
        record["data_wait_ratio"] = waited / seconds
        record |= _step_times(waited, communicated, stepped, self.images // step.batch_size)
        record |= _skew(totals[len(step.term_names) : -3].tolist())
        self.step.sums.zero_()
        self.step.steps, self.images, self.started = 0, 0, time.perf_counter()
        self.waited = self.communicated = self.stepped = 0.0
        return record


def _step_times(waited: float, communicated: float, stepped: float, steps: int) -> Record:
    """Seconds of a mean step and of its parts, from those of the interval."""
    if not steps:
        return {}
    return {
        "step_seconds": stepped / steps,
        "data_wait_seconds": waited / steps,
        "communication_seconds": communicated / steps,
        "compute_seconds": max(stepped - waited - communicated, 0.0) / steps,
    }


def _skew(busy: list[float]) -> Record:
    """How much longer the slowest rank worked than the median one, and which it is; from each rank's seconds."""
    median = statistics.median_low(busy)
    if len(busy) < 2 or median <= 0:
        return {}
    return {"rank_skew_ratio": max(busy) / median, "slowest_rank": float(busy.index(max(busy)))}


def latent_record(means: dict[str, float], units: int) -> Record:
    """Divergence of the latent units, and how many vary with the picture: Var(mu) > 0.01 (Burda et al. 2016)."""
    if not units:
        return {}
    kl, mu, squared = ([means[f"{what}.{unit}"] for unit in range(units)] for what in LATENT_STATISTICS)
    active = sum(square - mean**2 > ACTIVE_VARIANCE for mean, square in zip(mu, squared, strict=True))
    record: Record = {
        "active_units": active,
        "kl_per_dim_min": min(kl),
        "kl_per_dim_median": statistics.median(kl),
        "kl_per_dim_max": max(kl),
    }
    if units <= LISTED_UNITS:
        record["kl_per_dim"] = " ".join(f"{value:.4g}" for value in kl)
    return record


def _own_sums(interval: Interval, step: Step) -> torch.Tensor:
    """This rank's sums; with another number of ranks than before, rank 0 takes the total.

    `take` divides by the number of ranks, so that the total of W ranks counts for W' of them as total · W' / W.
    """
    rows = torch.tensor(interval.sums, dtype=torch.float64, device=step.sums.device)
    before, now = len(rows), step.world_size
    if before == now:
        return rows[step.rank]
    return rows.sum(0) * (now / before) * float(step.rank == 0)


class Agreement:
    """Lets all ranks learn at the same step what only one of them knows, about every two seconds.

    The ranks must call a collective equally often, so they cannot look at their own clocks: rank 0 proposes after how
    many steps they meet again, and the proposal travels in the same all-reduce as the answers.
    """

    INTERVAL_SECONDS = 2.0

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.steps_left = 1
        self.steps, self.since = 0, time.perf_counter()

    def due(self) -> bool:
        """Count a step; whether the ranks meet after it. Equal on all ranks."""
        self.steps += 1
        self.steps_left -= 1
        return self.steps_left <= 0

    def meet(self, news: int = 0) -> tuple[bool, int]:
        """Whether the run must stop after this step, and rank 0's `news`; equal on all ranks."""
        elapsed = max(time.perf_counter() - self.since, 1e-6)
        proposal = int(min(max(self.steps * self.INTERVAL_SECONDS / elapsed, 1), 10_000))
        first = self.runtime.rank == 0
        mine = [int(self.runtime.stop_requested()), proposal if first else 0, news if first else 0]
        stop, self.steps_left, told = sum_over_ranks(
            torch.tensor(mine, device=self.runtime.device), self.runtime.world_size
        ).tolist()
        self.steps, self.since = 0, time.perf_counter()
        return stop > 0, told

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; a collective."""
        mine = torch.tensor([int(flag)], device=self.runtime.device)
        return bool(sum_over_ranks(mine, self.runtime.world_size).item())

    def share(self, news: int) -> int:
        """Rank 0's `news` alone, on every rank; asks nobody to stop."""
        mine = torch.tensor([news if self.runtime.rank == 0 else 0], device=self.runtime.device)
        return int(sum_over_ranks(mine, self.runtime.world_size).item())


def from_all_ranks(runtime: Runtime, value: T) -> list[T]:
    """Every rank's value, in the order of the ranks; a collective."""
    values = [value] * runtime.world_size
    if runtime.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def from_rank_0(runtime: Runtime, value: T) -> T:
    """Rank 0's value, on every rank; a collective."""
    if runtime.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
