"""What a rank measures of itself while it trains, told to whoever watches without waiting for anybody."""

import secrets
import time
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from vaegan_dist.config import Config
from vaegan_dist.data.dataset import ShardDataset
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.snapshot import RankSnapshot, StepTimes
from vaegan_dist.training.meter import Meter
from vaegan_dist.training.profiling import StepProfile
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import Runtime
from vaegan_dist.training.schedule import ema_half_life
from vaegan_dist.training.step import Step

SNAPSHOT_SECONDS = 2.0
NANOSECOND = 1e-9


class Observer:
    """One rank's times and counts, from the first step of its process to the last.

    Args:
        bad_samples: how many samples of each shard were replaced so far, over all ranks.
    """

    def __init__(
        self, config: Config, runtime: Runtime, dataset: ShardDataset, bad_samples: Callable[[], dict[str, int]]
    ) -> None:
        self.config, self.runtime, self.dataset, self.bad_samples = config, runtime, dataset, bad_samples
        self.life = secrets.token_hex(8)
        self.times = StepTimes()
        self.steps = 0
        self._waited = 0.0
        self._told = time.perf_counter()
        # All ranks step alike; one of them is enough.
        profiled = config.reporting.profile_steps if runtime.rank == 0 else 0
        self.profile = StepProfile(run_folder(config), profiled, runtime.device)
        self._utilization = runtime.device.type == "cuda"

    def begin(self, step: Step) -> None:
        """A phase begins."""
        self._waited = 0.0
        self.profile.begin(step)
        for module in step.modules:
            # On a GPU a look at every step would make the host wait for it; there DDP's own rate of sampling stays.
            if isinstance(module, DistributedDataParallel) and self.runtime.device.type == "cpu":
                module._set_ddp_runtime_logging_sample_rate(1)  # type: ignore[no-untyped-call]
        self.tell()

    def after_step(self, step: Step, meter: Meter, since: float) -> None:
        """Count a step that began, with the wait for its batch, at `since` (of `time.perf_counter`)."""
        now = time.perf_counter()
        # A log record in between has set the meter back.
        waited = meter.waited - self._waited if meter.waited >= self._waited else meter.waited
        self._waited = meter.waited
        communicated = exposed_communication(step)
        self.times.add(now - since, waited, communicated)
        self.profile.after_step(now - since, waited, communicated)
        meter.communicated += communicated
        meter.stepped += now - since
        self.steps += 1
        if now - self._told >= SNAPSHOT_SECONDS:
            self.tell()

    def close(self) -> None:
        """Say the last counts, and write a profile that has not come to its end."""
        self.profile.close()
        self.tell()

    def measurements(self, images_seen: int) -> Record:
        """What a log record says beside the means over its interval."""
        return {"ema_half_life_images": ema_half_life(self.config.ema, images_seen)}

    def tell(self) -> None:
        """Send a snapshot on its way."""
        self._told = time.perf_counter()
        self.runtime.observe(self._snapshot())

    def _snapshot(self) -> RankSnapshot:
        hits, misses, fetched_bytes = self.dataset.cache_counts
        memory, utilization = self._gpu()
        return RankSnapshot(
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            life=self.life,
            steps=self.steps,
            images=self.steps * self.config.training.batch_size,
            parts=self.times.parts(),
            bad_samples=self.bad_samples(),
            cache_hits=hits,
            cache_misses=misses,
            cache_fetched_bytes=fetched_bytes,
            gpu_memory_bytes=memory,
            gpu_utilization=utilization,
        )

    def _gpu(self) -> tuple[int | None, float | None]:
        if self.runtime.device.type != "cuda":
            return None, None
        memory, busy = torch.cuda.max_memory_allocated(self.runtime.device), None
        if self._utilization:
            try:
                busy = torch.cuda.utilization(self.runtime.device) / 100.0
            except (ImportError, RuntimeError):  # the driver's library for it is not installed
                self._utilization = False
        return memory, busy


def exposed_communication(step: Step) -> float:
    """Seconds of the last step in which a rank only waited for gradients: what the backward pass did not hide.

    From DDP's own log, which is of the last step that it sampled.
    """
    seconds = 0.0
    for module in step.modules:
        if isinstance(module, DistributedDataParallel):
            log = module._get_ddp_logging_data()  # type: ignore[no-untyped-call]
            seconds += log.get("backward_comm_time", 0) - log.get("backward_compute_comm_overlap_time", 0)
    return max(seconds, 0.0) * NANOSECOND
