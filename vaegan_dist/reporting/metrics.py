"""What a run exports to Prometheus: the table of metrics, and the numbers behind them.

`RunMetrics` takes a run's records and the ranks' snapshots and knows nothing of how metrics are served
(`prometheus.py`). Counters only grow: over restarts of the workers, because a snapshot counts from its process' start
and says which process it is; over restarts of whoever holds this object, because its state can be kept.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vaegan_dist.reporting.records import NONFINITE, Record, integer, measurements, number, text
from vaegan_dist.reporting.snapshot import BUCKETS, Part, RankSnapshot

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]

CAUSES = ("worker", "start", "preemption", "resize", "command")
STATES = ("starting", "running", "done", "stopped", "failed")
# Shards that are named; a label must not take a value for each of thousands.
MOST_SHARDS = 20
OTHER_SHARDS = "other"


@dataclass(frozen=True)
class Metric:
    """One exported metric; each has the label `run` besides its own."""

    name: str
    kind: Kind
    help: str
    labels: Labels = ()


METRICS: tuple[Metric, ...] = (
    Metric("vaegan_build_info", "gauge", "Always 1; the versions that the run uses.", ("version", "torch", "python")),
    Metric("vaegan_run_info", "gauge", "Always 1; what the run is.", ("preset", "network", "seed")),
    Metric("vaegan_run_state", "gauge", "1 for the state that the run is in, 0 for the others.", ("state",)),
    Metric("vaegan_phase_info", "gauge", "Always 1; the phase under way.", ("phase",)),
    Metric("vaegan_start_timestamp_seconds", "gauge", "When this start of the run began, in seconds since 1970."),
    Metric("vaegan_workers", "gauge", "Training workers (ranks) that take part."),
    Metric("vaegan_images_total", "counter", "Images trained on by all workers, those that were done again included."),
    Metric("vaegan_steps_total", "counter", "Optimiser steps, those that were done again included."),
    Metric("vaegan_skipped_steps_total", "counter", "Steps skipped because a gradient was not finite."),
    Metric("vaegan_images_seen", "gauge", "The run's place: images that its weights have seen."),
    Metric("vaegan_target_images", "gauge", "Images at which the run will be done."),
    Metric("vaegan_epoch", "gauge", "Epoch of the data set, from 0."),
    Metric("vaegan_images_per_second", "gauge", "Throughput of all workers over the last log interval."),
    Metric(
        "vaegan_step_seconds",
        "histogram",
        "Time of an optimiser step on a worker: waiting for data, for other workers' gradients, computing, in total.",
        ("part",),
    ),
    Metric("vaegan_step_mean_seconds", "gauge", "Mean time of a step over the last log interval, by part.", ("part",)),
    Metric("vaegan_data_wait_ratio", "gauge", "Share of the last log interval spent waiting for data."),
    Metric("vaegan_rank_skew_ratio", "gauge", "Busy time of the slowest worker over that of the median one."),
    Metric("vaegan_slowest_rank", "gauge", "Rank of the slowest worker of the last log interval."),
    Metric("vaegan_progress_age_seconds", "gauge", "Time since the last sign of a finished step."),
    Metric("vaegan_loss", "gauge", "Mean of a loss term over the last log interval, nats per image.", ("term",)),
    Metric("vaegan_penalty", "gauge", "Mean of a discriminator penalty over the last log interval.", ("term",)),
    Metric(
        "vaegan_discriminator_accuracy_ratio",
        "gauge",
        "Share of real, reconstructed or generated pictures that the discriminator judged right.",
        ("judged",),
    ),
    Metric("vaegan_discriminator_logit", "gauge", "Mean output of the discriminator.", ("judged",)),
    Metric("vaegan_gradient_norm", "gauge", "Mean norm of a network's gradient, before clipping.", ("network",)),
    Metric("vaegan_learning_rate", "gauge", "Learning rate at the last step.", ("network",)),
    Metric("vaegan_beta", "gauge", "Weight of the KL divergence."),
    Metric("vaegan_kl_active_units", "gauge", "Latent units whose posterior mean varies over the data."),
    Metric("vaegan_psnr_decibels", "gauge", "Peak signal to noise ratio of the reconstructions."),
    Metric("vaegan_ema_half_life_images", "gauge", "Images after which an old weight counts half in the average."),
    Metric("vaegan_measurement", "gauge", "Any further measured quantity of the last log interval.", ("name",)),
    Metric("vaegan_nonfinite_records_total", "counter", "Log records in which a quantity was not a finite number."),
    Metric("vaegan_evaluation_result", "gauge", "Result of the last evaluation, by metric (fid, kid, …).", ("metric",)),
    Metric("vaegan_evaluation_images_seen", "gauge", "The run's place at the last evaluation."),
    Metric("vaegan_checkpoints_total", "counter", "Whole checkpoints written."),
    Metric("vaegan_checkpoint_seconds", "gauge", "Time that training stood still for the last checkpoint."),
    Metric("vaegan_checkpoint_bytes", "gauge", "Size of the last checkpoint."),
    Metric("vaegan_checkpoint_age_seconds", "gauge", "Time since a whole checkpoint, or since the start without one."),
    Metric("vaegan_restarts_total", "counter", "Starts after the first one, by what ended the one before.", ("cause",)),
    Metric("vaegan_preemptions_total", "counter", "Restarts because a worker's machine was taken away."),
    Metric("vaegan_rollbacks_total", "counter", "Returns to a checkpoint because the numbers were not finite."),
    Metric("vaegan_warnings_total", "counter", "Warnings of the run."),
    Metric("vaegan_bad_samples_total", "counter", "Broken samples that were replaced, by shard.", ("shard",)),
    Metric("vaegan_bad_samples_budget", "gauge", "Broken samples that may be replaced (data.max_bad_samples)."),
    Metric("vaegan_cache_hits_total", "counter", "Shards that a worker found in its node's cache."),
    Metric("vaegan_cache_misses_total", "counter", "Shards that a worker fetched."),
    Metric("vaegan_cache_fetched_bytes_total", "counter", "Bytes of shards that the workers fetched."),
    Metric("vaegan_gpu_memory_bytes", "gauge", "Largest memory that tensors took on a worker's GPU.", ("rank",)),
    Metric("vaegan_gpu_utilization_ratio", "gauge", "Share of time in which a worker's GPU was busy.", ("rank",)),
)
BY_NAME = {metric.name: metric for metric in METRICS}

# What a short job leaves behind at a Pushgateway, beside the run's own metrics.
JOB_METRICS: tuple[Metric, ...] = (
    Metric("vaegan_job_last_success_timestamp_seconds", "gauge", "When the job last ended well, seconds since 1970."),
    Metric("vaegan_job_last_end_timestamp_seconds", "gauge", "When the job last ended, seconds since 1970."),
    Metric("vaegan_job_duration_seconds", "gauge", "How long the job's last start took."),
    Metric("vaegan_job_success", "gauge", "1 if the job's last start ended well, else 0."),
)

# Key of a `train` row, by its beginning, and the metric and label value it becomes.
_PREFIXES = (
    ("loss_", "vaegan_loss"),
    ("penalty_", "vaegan_penalty"),
    ("accuracy_", "vaegan_discriminator_accuracy_ratio"),
    ("logits_", "vaegan_discriminator_logit"),
    ("grad_norm_", "vaegan_gradient_norm"),
    ("lr_", "vaegan_learning_rate"),
)
_KEYS = {
    "images_per_second": "vaegan_images_per_second",
    "data_wait_ratio": "vaegan_data_wait_ratio",
    "rank_skew_ratio": "vaegan_rank_skew_ratio",
    "slowest_rank": "vaegan_slowest_rank",
    "beta": "vaegan_beta",
    "active_units": "vaegan_kl_active_units",
    "psnr": "vaegan_psnr_decibels",
    "ema_half_life_images": "vaegan_ema_half_life_images",
}
_PARTS: dict[str, Part] = {
    "step_seconds": "total",
    "data_wait_seconds": "data_wait",
    "compute_seconds": "compute",
    "communication_seconds": "communication",
}


def metric_of(key: str) -> tuple[str, Labels]:
    """The metric that a measured quantity of a `train` row becomes, and its label values."""
    if key in _KEYS:
        return _KEYS[key], ()
    if key in _PARTS:
        return "vaegan_step_mean_seconds", (_PARTS[key],)
    for prefix, name in _PREFIXES:
        if key.startswith(prefix):
            return name, (key.removeprefix(prefix),)
    return "vaegan_measurement", (key,)


@dataclass(frozen=True)
class RunIdentity:
    """What does not change while a run trains, in the labels that its metrics carry."""

    run: str
    preset: str = ""
    network: str = ""
    seed: int = 0
    max_bad_samples: int = 0
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Histogram:
    """Counts by bucket (not cumulated, the last one unbounded) and the sum of what was observed."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, counts: list[int], total: float) -> None:
        """Take further observations."""
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.total += total


Sample = tuple[Metric, Labels, "float | Histogram"]


class RunMetrics:
    """The numbers behind a run's metrics; not safe for threads by itself."""

    def __init__(self, identity: RunIdentity, clock: Callable[[], float] = time.time) -> None:
        self.identity, self._clock = identity, clock
        self._started = self._progressed = self._checkpointed = clock()
        self._counters: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[str, Histogram] = {}
        self._place: dict[str, float] = {}
        self._terms: dict[tuple[str, Labels], float] = {}
        self._evaluation: dict[str, float] = {}
        self._snapshots: dict[int, RankSnapshot] = {}
        self._lives: dict[int, str] = {}
        self._state, self._phase = "starting", ""
        self._bad: dict[str, int] = {}
        self._announced = False
        self._began: set[str] = set()
        for metric in METRICS:
            if metric.kind == "counter" and not metric.labels:
                # A counter that appears with its first event shows Prometheus no increase.
                self._counters[metric.name, ()] = 0.0
        for cause in CAUSES:
            self._counters["vaegan_restarts_total", (cause,)] = 0.0

    @property
    def begun(self) -> bool:
        """Whether a rank has begun to train."""
        return bool(self._lives)

    def record(self, record: Record) -> None:
        """Take a record of the run."""
        event = record.get("event")
        # A checkpoint's record comes some steps after its place.
        if event in ("train", "phase", "resume", "rollback", "end"):
            keys = ("images_seen", "total_images", "epoch")
            self._place |= {key: value for key in keys if (value := number(record, key)) is not None}
            self._phase = text(record, "phase") or self._phase
        match event:
            case "train":
                self._train(record)
            case "phase" | "resume":
                self._state, self._progressed = "running", self._clock()
            case "checkpoint":
                self._checkpoint(record)
            case "evaluation":
                self._evaluation = measurements(record)
                self._place["evaluated"] = float(integer(record, "images_seen") or 0)
            case "rollback":
                self._count("vaegan_rollbacks_total")
            case "attempt":
                self._restarted(text(record, "name"))
                self._announced = True
            case "warning":
                self._count("vaegan_warnings_total")
            case "end":
                reason = text(record, "reason")
                self._state = {"already done": "done"}.get(reason, reason if reason in STATES else "failed")

    def observe(self, snapshot: RankSnapshot) -> None:
        """Take what a rank says of itself; snapshots may be late, doubled or lost."""
        life = self._lives.get(snapshot.rank)
        before = self._snapshots.get(snapshot.rank) if life == snapshot.life else None
        if life != snapshot.life:
            if snapshot.life in self._began:
                return  # late news of a process that has been replaced
            self._began.add(snapshot.life)
            if snapshot.rank == 0 and life is not None and not self._announced:
                self._restarted("command" if self._state == "starting" else "worker")
            self._announced = self._announced and snapshot.rank != 0
            self._lives[snapshot.rank] = snapshot.life
        elif before is not None and snapshot.steps < before.steps:
            return
        self._snapshots[snapshot.rank] = snapshot
        self._snapshots = {rank: last for rank, last in self._snapshots.items() if rank < snapshot.world_size}
        self._grow(snapshot, before)

    def samples(self) -> Iterator[Sample]:
        """Every metric that has a value now."""
        values = {**self._counters, **self._gauges()}
        for metric in METRICS:
            if metric.kind == "histogram":
                for part, histogram in sorted(self._histograms.items()):
                    yield metric, (part,), histogram
            for (name, labels), value in values.items():
                if name == metric.name:
                    yield metric, labels, value

    def to_json(self) -> dict[str, Any]:
        """What must outlive this object: the counters, and where each rank's own count stood."""
        return {
            "counters": [[name, list(labels), value] for (name, labels), value in self._counters.items()],
            "histograms": {part: asdict(histogram) for part, histogram in self._histograms.items()},
            "bad": self._bad,
            "place": self._place,
            "snapshots": [asdict(snapshot) for snapshot in self._snapshots.values()],
            "checkpointed": self._checkpointed,
            "time": self._clock(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        snapshots = [RankSnapshot(**each) for each in state["snapshots"]]
        histograms = {part: Histogram(**each) for part, each in state["histograms"].items()}
        counters = {(name, tuple(labels)): float(value) for name, labels, value in state["counters"]}
        self._counters |= {key: value for key, value in counters.items() if key[0] in BY_NAME}
        self._histograms, self._bad = histograms, dict(state["bad"])
        self._place = dict(state["place"])
        self._snapshots = {each.rank: each for each in snapshots}
        self._lives = {each.rank: each.life for each in snapshots}
        self._began = set(self._lives.values())
        self._checkpointed = float(state["checkpointed"])

    def _train(self, record: Record) -> None:
        self._state, self._progressed = "running", self._clock()
        values = measurements(record)
        self._count("vaegan_skipped_steps_total", values.pop("skipped_steps", 0.0))
        odd = any(not math.isfinite(value) for value in values.values())
        if odd or any(key.endswith(NONFINITE) for key in record):
            self._count("vaegan_nonfinite_records_total")
        # Another phase has other terms: what is not measured any more must not stand there as if it were.
        self._terms = {metric_of(key): value for key, value in values.items()}

    def _checkpoint(self, record: Record) -> None:
        took, size = number(record, "checkpoint_seconds"), number(record, "checkpoint_bytes")
        if took is None:
            return  # said again after a restart
        self._count("vaegan_checkpoints_total")
        self._checkpointed = self._clock()
        self._place["checkpoint_seconds"] = took
        if size is not None:
            self._place["checkpoint_bytes"] = size

    def _restarted(self, cause: str) -> None:
        self._count("vaegan_restarts_total", 1.0, (cause if cause in CAUSES else "worker",))
        if cause == "preemption":
            self._count("vaegan_preemptions_total")

    def _grow(self, now: RankSnapshot, before: RankSnapshot | None) -> None:
        """Add to the counters what a rank has done since its last snapshot."""
        if now.steps > (before.steps if before else 0):
            self._progressed = self._clock()
        for part, (counts, total) in now.parts.items():
            old, seconds = before.parts.get(part, ([0] * len(counts), 0.0)) if before else ([0] * len(counts), 0.0)
            histogram = self._histograms.setdefault(part, Histogram())
            histogram.add([a - b for a, b in zip(counts, old, strict=True)], total - seconds)
        for name, key in _COUNTED.items():
            if now.rank == 0 or key in _OF_EACH_RANK:
                self._count(name, getattr(now, key) - (getattr(before, key) if before else 0))
        for shard, count in now.bad_samples.items():
            self._bad[shard] = max(self._bad.get(shard, 0), count)
        named = list(self._bad)[:MOST_SHARDS]
        by_shard = {shard: self._bad[shard] for shard in named}
        if len(named) < len(self._bad):
            by_shard[OTHER_SHARDS] = sum(self._bad.values()) - sum(by_shard.values())
        self._counters |= {("vaegan_bad_samples_total", (shard,)): float(count) for shard, count in by_shard.items()}

    def _count(self, name: str, by: float = 1.0, labels: Labels = ()) -> None:
        self._counters[name, labels] = self._counters.get((name, labels), 0.0) + max(by, 0.0)

    def _gauges(self) -> dict[tuple[str, Labels], float]:
        now, about, place = self._clock(), self.identity, self._place
        versions = tuple(about.versions.get(name, "") for name in BY_NAME["vaegan_build_info"].labels)
        gauges: dict[tuple[str, Labels], float] = {
            ("vaegan_build_info", versions): 1.0,
            ("vaegan_run_info", (about.preset, about.network, str(about.seed))): 1.0,
            ("vaegan_start_timestamp_seconds", ()): self._started,
            ("vaegan_progress_age_seconds", ()): max(now - self._progressed, 0.0),
            ("vaegan_checkpoint_age_seconds", ()): max(now - max(self._checkpointed, self._started), 0.0),
            ("vaegan_bad_samples_budget", ()): float(about.max_bad_samples),
            **{("vaegan_run_state", (state,)): float(state == self._state) for state in STATES},
            **self._terms,
            **{("vaegan_evaluation_result", (key,)): value for key, value in self._evaluation.items()},
        }
        if self._phase:
            gauges["vaegan_phase_info", (self._phase,)] = 1.0
        if self._snapshots:
            gauges["vaegan_workers", ()] = float(max(each.world_size for each in self._snapshots.values()))
        gauges |= {(name, ()): place[key] for key, name in _PLACES.items() if key in place}
        for rank, each in self._snapshots.items():
            if each.gpu_memory_bytes is not None:
                gauges["vaegan_gpu_memory_bytes", (str(rank),)] = float(each.gpu_memory_bytes)
            if each.gpu_utilization is not None:
                gauges["vaegan_gpu_utilization_ratio", (str(rank),)] = each.gpu_utilization
        return gauges


_PLACES = {
    "images_seen": "vaegan_images_seen",
    "total_images": "vaegan_target_images",
    "epoch": "vaegan_epoch",
    "evaluated": "vaegan_evaluation_images_seen",
    "checkpoint_seconds": "vaegan_checkpoint_seconds",
    "checkpoint_bytes": "vaegan_checkpoint_bytes",
}
# Counters that grow with a field of the snapshots: of rank 0, which counts for all, or of each rank.
_COUNTED = {
    "vaegan_images_total": "images",
    "vaegan_steps_total": "steps",
    "vaegan_cache_hits_total": "cache_hits",
    "vaegan_cache_misses_total": "cache_misses",
    "vaegan_cache_fetched_bytes_total": "cache_fetched_bytes",
}
_OF_EACH_RANK = ("cache_hits", "cache_misses", "cache_fetched_bytes")
