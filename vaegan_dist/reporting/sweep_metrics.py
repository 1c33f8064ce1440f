"""What a sweep exports to Prometheus: the table of metrics, and the server of them for as long as it runs.

The driver serves them, who alone knows the ledger; its trials serve nothing. Series with a trial's label exist for the
trials under way only, so that their number is bounded by what runs at a time, however many trials there are.
"""

import json
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import vaegan_dist
from vaegan_dist.config import Config
from vaegan_dist.files import write_whole
from vaegan_dist.reporting.endpoint import STATE_FILE, Collector, Endpoint
from vaegan_dist.reporting.metrics import Labels, Metric, Sample

logger = logging.getLogger(__name__)

STATES = ("running", "done", "stopped", "failed")
# waiting: not begun, or to be continued; early: stopped by the scheduler; failed: crashed for good
TRIAL_STATES = ("waiting", "running", "done", "early", "failed")
Ending = Literal["done", "already done", "stopped", "failed"]

SWEEP_METRICS: tuple[Metric, ...] = (
    Metric(
        "vaegan_sweep_info",
        "gauge",
        "Always 1; what the sweep is.",
        ("preset", "network", "searcher", "scheduler", "version"),
    ),
    Metric("vaegan_sweep_state", "gauge", "1 for the state that the sweep is in, 0 for the others.", ("state",)),
    Metric("vaegan_sweep_start_timestamp_seconds", "gauge", "When this start of the sweep began, seconds since 1970."),
    Metric("vaegan_sweep_trials", "gauge", "Trials by state; all states together are the target.", ("state",)),
    Metric("vaegan_sweep_trials_target", "gauge", "Trials of the whole sweep."),
    Metric("vaegan_sweep_trial_failures_total", "counter", "Trials that failed for good, by the ledger."),
    Metric(
        "vaegan_sweep_images_total", "counter", "Images spent on trials up to the last value of each, by the ledger."
    ),
    Metric(
        "vaegan_sweep_images_seen", "gauge", "Places of all trials together, of those under way by their last record."
    ),
    Metric("vaegan_sweep_target_images", "gauge", "Images of all trials together if none were stopped early."),
    Metric(
        "vaegan_sweep_images_per_second", "gauge", "Throughput of the trials under way, over their last log intervals."
    ),
    Metric("vaegan_sweep_progress_age_seconds", "gauge", "Time since any trial began, logged, was judged or ended."),
    Metric("vaegan_sweep_remaining_seconds", "gauge", "Time to the end, estimated from what ended trials have spent."),
    Metric("vaegan_sweep_best_trial", "gauge", "Number of the best trial that has ended."),
    Metric("vaegan_sweep_best_images_seen", "gauge", "Images that the best trial has seen."),
    Metric("vaegan_sweep_best_value", "gauge", "Last value of a metric in the best trial.", ("metric", "mode")),
    Metric("vaegan_sweep_best_parameter", "gauge", "Value of a searched key in the best trial, if a number.", ("key",)),
    Metric("vaegan_sweep_trial_images_seen", "gauge", "Place of a trial under way.", ("trial",)),
    Metric("vaegan_sweep_trial_images_per_second", "gauge", "Throughput of a trial under way.", ("trial",)),
    Metric("vaegan_sweep_trial_value", "gauge", "Last value of a metric in a trial under way.", ("trial", "metric")),
)


_Rows = list[tuple[Labels, float]]


@dataclass(frozen=True)
class SweepIdentity:
    """What does not change while a sweep runs."""

    sweep: str
    modes: Mapping[str, str]
    """metric by which trials are judged -> min or max"""
    trials: int
    total_images: int
    """of all trials, if none is stopped early"""
    preset: str = ""
    network: str = ""
    searcher: str = ""
    scheduler: str = ""


@dataclass(frozen=True)
class TrialSnapshot:
    """A trial: how far it is, and its last values of the metrics that are numbers."""

    number: int
    name: str
    images_seen: int
    values: Mapping[str, float]
    images_per_second: float = 0.0
    params: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepSnapshot:
    """Where a sweep stands."""

    trials: Mapping[str, int]
    """number of trials by state"""
    images_trained: int
    """by the ledger; never less than before"""
    images_seen: int
    silent_seconds: float
    remaining_seconds: float | None
    best: TrialSnapshot | None
    under_way: tuple[TrialSnapshot, ...]


def samples_of(about: SweepIdentity, now: SweepSnapshot, state: str, began: float) -> Iterator[Sample]:
    """Every metric that has a value, in the order of the table.

    Args:
        began: seconds since 1970.
    """
    values = _values(about, now, state, began)
    for metric in SWEEP_METRICS:
        for labels, value in values.get(metric.name, ()):
            yield metric, labels, float(value)


def _values(about: SweepIdentity, now: SweepSnapshot, state: str, began: float) -> dict[str, _Rows]:
    info = (about.preset, about.network, about.searcher, about.scheduler, vaegan_dist.__version__)
    values: dict[str, _Rows] = {
        "vaegan_sweep_info": [(info, 1.0)],
        "vaegan_sweep_state": [((each,), float(each == state)) for each in STATES],
        "vaegan_sweep_start_timestamp_seconds": [((), began)],
        "vaegan_sweep_trials": [((each,), now.trials.get(each, 0)) for each in TRIAL_STATES],
        "vaegan_sweep_trials_target": [((), about.trials)],
        "vaegan_sweep_trial_failures_total": [((), now.trials.get("failed", 0))],
        "vaegan_sweep_images_total": [((), now.images_trained)],
        "vaegan_sweep_images_seen": [((), now.images_seen)],
        "vaegan_sweep_target_images": [((), about.total_images)],
        "vaegan_sweep_images_per_second": [((), sum(trial.images_per_second for trial in now.under_way))],
        "vaegan_sweep_progress_age_seconds": [((), now.silent_seconds)],
        "vaegan_sweep_trial_images_seen": [((each.name,), each.images_seen) for each in now.under_way],
        "vaegan_sweep_trial_images_per_second": [((each.name,), each.images_per_second) for each in now.under_way],
        "vaegan_sweep_trial_value": [
            ((each.name, metric), value) for each in now.under_way for metric, value in each.values.items()
        ],
    }
    if now.remaining_seconds is not None:
        values["vaegan_sweep_remaining_seconds"] = [((), now.remaining_seconds)]
    return values | (_best(about, now.best) if now.best is not None else {})


def _best(about: SweepIdentity, best: TrialSnapshot) -> dict[str, _Rows]:
    numbers = {key: float(value) for key, value in best.params.items() if isinstance(value, int | float)}
    return {
        "vaegan_sweep_best_trial": [((), best.number)],
        "vaegan_sweep_best_images_seen": [((), best.images_seen)],
        "vaegan_sweep_best_value": [((name, about.modes[name]), value) for name, value in best.values.items()],
        "vaegan_sweep_best_parameter": [((key,), value) for key, value in numbers.items() if math.isfinite(value)],
    }


class SweepExporter:
    """Serves a sweep's metrics from `__init__` to `close`, and pushes them where a run would; never ends the sweep.

    Args:
        folder: the sweep's; where its metrics are served is kept in it, for the next start.
        look: where the sweep stands; called at each scrape, from any thread.
        warn: takes one line for each kind of trouble.
    """

    def __init__(
        self,
        config: Config,
        about: SweepIdentity,
        folder: Path,
        look: Callable[[], SweepSnapshot],
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self._about, self._look, self._folder = about, look, folder
        self._began, self._ending = time.time(), ""
        served = Collector("sweep", about.sweep, self._samples)
        pushed = Collector("sweep", about.sweep, self._lasting)
        self.endpoint = Endpoint(config, served, pushed, what="the sweep", warn=warn)
        self.endpoint.open(self._port_before())
        if self.address:
            self.endpoint.guard("metrics state", self._keep_address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    @property
    def address(self) -> str:
        """host:port of the metrics; empty where they are not served."""
        return self.endpoint.address

    def ended(self, ending: Ending) -> None:
        """How the sweep ended."""
        self._ending = ending

    def close(self, failed: bool = False) -> None:
        """Push the end and serve no longer."""
        if failed or not self._ending:
            self._ending = "failed"
        self.endpoint.close(self._ending)

    def _samples(self) -> list[Sample]:
        state = {"": "running", "already done": "done"}.get(self._ending, self._ending)
        return list(samples_of(self._about, self._look(), state, self._began))

    def _lasting(self) -> list[Sample]:
        """A Pushgateway keeps what nothing replaces: trials that have ended would stand there as if under way."""
        return [sample for sample in self._samples() if "trial" not in sample[0].labels]

    def _port_before(self) -> int:
        """The port that the start before this one served at, or 0."""
        try:
            kept = json.loads((self._folder / STATE_FILE).read_bytes())
            return int(str(kept["address"]).rpartition(":")[2] or 0)
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _keep_address(self) -> None:
        state = {"address": self.address, "host": socket.gethostname(), "sweep": self._about.sweep}
        write_whole(self._folder / STATE_FILE, json.dumps(state).encode())
