"""What one rank says of itself from time to time: counts since its process began, and where its steps' time went."""

import bisect
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["total", "data_wait", "compute", "communication"]
PARTS: tuple[Part, ...] = ("total", "data_wait", "compute", "communication")

# Upper ends in seconds: from a millisecond (digits on a CPU) to a minute.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class RankSnapshot:
    """Counts are of this process, from its beginning: a lost snapshot costs nothing."""

    rank: int
    world_size: int
    life: str
    """names the process: another one begins to count from zero"""
    steps: int = 0
    images: int = 0
    """over all ranks"""
    parts: dict[str, tuple[list[int], float]] = field(default_factory=dict)
    """for each part of a step: counts by bucket (the last one unbounded), and seconds in all"""
    bad_samples: dict[str, int] = field(default_factory=dict)
    """by shard; over all ranks and restarts"""
    cache_hits: int = 0
    cache_misses: int = 0
    cache_fetched_bytes: int = 0
    gpu_memory_bytes: int | None = None
    gpu_utilization: float | None = None


class StepTimes:
    """Histograms of the parts of a step."""

    def __init__(self) -> None:
        self._counts = {part: [0] * (len(BUCKETS) + 1) for part in PARTS}
        self._totals = dict.fromkeys(PARTS, 0.0)

    def add(self, total: float, data_wait: float, communication: float) -> None:
        """Count a step; what is neither waiting for data nor for other ranks is computing."""
        compute = max(total - data_wait - communication, 0.0)
        for part, seconds in zip(PARTS, (total, data_wait, compute, communication), strict=True):
            self._counts[part][bisect.bisect_left(BUCKETS, seconds)] += 1
            self._totals[part] += seconds

    def parts(self) -> dict[str, tuple[list[int], float]]:
        """A copy, as a snapshot carries it."""
        return {part: (list(self._counts[part]), self._totals[part]) for part in PARTS}
